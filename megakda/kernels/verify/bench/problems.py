"""Shapes to measure, and random inputs of a shape that all sides share."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from megakda.kernels.kda.gate import kda_gate

GATES = ("none", "softplus", "bounded")
LOWER_BOUND = -5.0
_PART = re.compile(r"([BHKVT])(\d+(?:[x+]\d+)*)")


@dataclass(frozen=True)
class Shape:
    """Sizes of one problem.

    Attributes:
        batch: rows; 1 if packed.
        heads: of queries, keys and values alike.
        key_dim, value_dim: channels of a head.
        lengths: tokens of each row, or of each packed sequence.
        packed: whether the sequences lie one after the other in one row.
    """

    batch: int
    heads: int
    key_dim: int
    value_dim: int
    lengths: tuple[int, ...]
    packed: bool = False

    @property
    def tokens(self) -> int:
        """Of a row."""
        return sum(self.lengths) if self.packed else self.lengths[0]

    @property
    def label(self) -> str:
        """As `parse_shape` reads it."""
        lengths = str(self.lengths[0])
        if self.packed:
            equal = len(set(self.lengths)) == 1
            lengths = (
                f"{len(self.lengths)}x{self.lengths[0]}"
                if equal
                else "+".join(map(str, self.lengths))
            )
        value = "" if self.value_dim == self.key_dim else f",V{self.value_dim}"
        return f"B{self.batch},H{self.heads},K{self.key_dim}{value},T{lengths}"


def parse_shape(text: str) -> Shape:
    """A shape from "B1,H16,K128,T8192", "H16,T8x1024" or "H16,T1300+547+2048".

    B is 1, K is 128 and V is K unless they are given. Lengths joined by x or + are packed.

    Raises:
        ValueError: anything else.
    """
    parts = {}
    for part in text.split(","):
        match = _PART.fullmatch(part)
        if match is None or match[1] in parts:
            raise ValueError(
                f"shape {text!r}: {part!r} is not one of B1, H16, K128, V128, T8192, T8x1024 and "
                "T1300+547, each once and joined by commas"
            )
        parts[match[1]] = match[2]
    if not {"H", "T"} <= parts.keys():
        raise ValueError(f"shape {text!r}: needs heads and tokens, such as H16,T8192")
    lengths = parts.pop("T")
    packed = not lengths.isdigit()
    try:
        if "x" in lengths:
            count, length = map(int, lengths.split("x"))
            sizes = (length,) * count
        else:
            sizes = tuple(map(int, lengths.split("+")))
        numbers = {name: int(size) for name, size in parts.items()}
    except ValueError:
        raise ValueError(f"shape {text!r}: a size that is no number, or both x and +") from None
    shape = Shape(
        numbers.get("B", 1),
        numbers["H"],
        numbers.get("K", 128),
        numbers.get("V", numbers.get("K", 128)),
        sizes,
        packed,
    )
    if min(*numbers.values(), *sizes) < 1:
        raise ValueError(f"shape {text!r}: every size must be at least 1")
    if packed and shape.batch != 1:
        raise ValueError(f"shape {text!r}: packed sequences lie in one row, B1")
    return shape


def small_shape(shape: Shape) -> Shape:
    """The same channels, few heads and tokens: for the float64 recurrence."""
    lengths: tuple[int, ...] = (256,)
    if shape.packed:
        lengths = (128, 128) if len(set(shape.lengths)) == 1 else (64, 1, 100, 91)
    return replace(shape, batch=1, heads=min(2, shape.heads), lengths=lengths)


@dataclass(frozen=True, eq=False)
class Problem:
    """Inputs of KDA, or with a g of one channel of Gated DeltaNet.

    Attributes:
        shape: of the inputs.
        gate: "none": g is the decay, beta the step size, and k and q have unit norm. Otherwise
            they are raw, and the operator applies this gate, the sigmoid and the norm.
        q, k, v: [B, T, H, K or V].
        g: [B, T, H, K] or [B, T, H, 1].
        beta: [B, T, H].
        A_log: fp32 [H], and dt_bias: fp32 [H*K] or [H]; None without gate.
        do: [B, T, H, V], the gradient of the output.
        cu_seqlens: int64 [N + 1] on the device, or None.
    """

    shape: Shape
    gate: str
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    A_log: torch.Tensor | None
    dt_bias: torch.Tensor | None
    do: torch.Tensor
    cu_seqlens: torch.Tensor | None

    @property
    def inputs(self) -> dict[str, torch.Tensor]:
        """All that an operator reads, by name."""
        names = ("q", "k", "v", "g", "beta", "A_log", "dt_bias")
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    @property
    def lower_bound(self) -> float | None:
        """Of the bounded gate."""
        return LOWER_BOUND if self.gate == "bounded" else None

    def to(self, dtype: torch.dtype) -> Problem:
        """The same values in another dtype."""
        values: dict[str, Any] = {name: x.to(dtype) for name, x in self.inputs.items()}
        return replace(self, **values)

    def with_gradients(self) -> Problem:
        """The same values as fresh leaves that require gradients."""
        values: dict[str, Any] = {
            name: x.detach().clone().requires_grad_() for name, x in self.inputs.items()
        }
        return replace(self, **values)

    def activated(self) -> Problem:
        """What the operator works on after gate, sigmoid and norm, in fp32; differentiable."""
        if self.gate == "none":
            return self
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (self.q, self.k))
        g = kda_gate(self.g, self.A_log, self.dt_bias, self.lower_bound, backend="torch")
        beta = self.beta.to(g.dtype).sigmoid()
        return replace(self, gate="none", q=q, k=k, g=g, beta=beta, A_log=None, dt_bias=None)

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, T, ...] of packed sequences of equal length as [N, T/N, ...].

        Raises:
            ValueError: lengths differ.
        """
        if not self.shape.packed:
            return x
        if len(set(self.shape.lengths)) > 1:
            raise ValueError("has no form for packed sequences of different lengths")
        return x.view(len(self.shape.lengths), self.shape.lengths[0], *x.shape[2:])


def make_problem(
    shape: Shape,
    gate: str = "none",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    scalar_decay: bool = False,
    seed: int = 0,
) -> Problem:
    """Random inputs with the decay of a layer at initialisation.

    Rates and steps are those of Mamba-2's initialisation but for rates of 1 to 2 instead of 1 to
    16: with stronger decay the gradients of fla's plain PyTorch form and of transformers' are NaN,
    and there would be nothing to compare with.

    Args:
        shape: of the inputs.
        gate: "none", "softplus" or "bounded", see `Problem`.
        dtype: of q, k, v, g, beta and do.
        device: where they are made.
        scalar_decay: one decay per head, as in Gated DeltaNet.
        seed: of the random numbers.
    """
    if gate not in GATES:
        raise ValueError(f"gate: {gate!r} must be one of {GATES}")
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": device}
    rows = (shape.batch, shape.tokens, shape.heads)
    channels = 1 if scalar_decay else shape.key_dim
    q, k, g, v, do = (
        torch.randn(*rows, size, **options)
        for size in (shape.key_dim, shape.key_dim, channels, shape.value_dim, shape.value_dim)
    )
    beta = torch.randn(*rows, **options)
    A_log = torch.empty(shape.heads, device=device).uniform_(1, 2, generator=generator).log()
    step = torch.empty(shape.heads * channels, device=device)
    step = step.uniform_(math.log(0.001), math.log(0.1), generator=generator).exp()
    dt_bias = step + torch.log(-torch.expm1(-step))  # the inverse of softplus
    bounds = [0, *accumulate(shape.lengths)]
    raw = Problem(
        shape=shape,
        gate="softplus" if gate == "none" else gate,
        **{name: x.to(dtype) for name, x in zip("qkvg", (q, k, v, g), strict=True)},
        beta=beta.to(dtype),
        A_log=A_log,
        dt_bias=dt_bias,
        do=do.to(dtype),
        cu_seqlens=torch.tensor(bounds, device=device) if shape.packed else None,
    )
    if gate != "none":
        return raw
    plain = raw.activated()
    q, k, beta = (x.to(dtype) for x in (plain.q, plain.k, plain.beta))
    return replace(plain, q=q, k=k, beta=beta)


def floor_bytes(problem: Problem, mode: str) -> int:
    """The bytes that a pass has to move at least: each input read and each result written once.

    Args:
        problem: its tensors are counted.
        mode: "forward", "backward" or "both".
    """
    inputs = sum(x.numel() * x.element_size() for x in problem.inputs.values())
    output = problem.do.numel() * problem.do.element_size()
    forward = inputs + output
    backward = 2 * inputs + output  # inputs and do are read, gradients of the inputs written
    return {"forward": forward, "backward": backward, "both": forward + backward}[mode]


def attention_reference(problem: Problem) -> torch.Tensor:
    """Causal softmax attention of q, k and v in float64, [B, T, H, V]; differentiable."""
    q, k, v = (problem.rows(x).double().transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    o = F.softmax(scores.masked_fill(later, -math.inf), dim=-1) @ v
    return o.transpose(1, 2).reshape(problem.v.shape)
