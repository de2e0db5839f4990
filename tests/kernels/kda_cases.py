"""One way to call the KDA operators, with inputs for it and the float64 truth: `Case`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations, product
from typing import Any

import torch
import torch.nn.functional as F

from megakda.kernels.kda.reference import kda_recurrence
from tests.kernels.helpers import outputs_and_gradients, rms_error

Tensors = dict[str, torch.Tensor]
GATES = {"softplus": None, "bounded": -5.0}  # and their lower bounds


@dataclass(frozen=True)
class Case:
    """Shapes, values and options of one call.

    Attributes:
        tokens: of each row of the batch, or of all packed sequences together.
        sizes: K and V.
        heads: H and HV.
        layout: "one" sequence, a "batch" of two, or "packed": seven, three of them empty and two of
            one token.
        dtype: of q, k, v, beta, and of the gate's raw input.
        decay: "soft" is softplus of random numbers. "mixed" forgets all in one step out of five and
            next to nothing in the others. A number is the least forgetting of each step, scaled by
            up to 1.1. "softplus" and "bounded" take the gate into the operator, with A_log and
            dt_bias unless followed by " without A_log" or " without dt_bias".
        head_decay: g is [..., 1].
        beta: "plain", or its logit: "sigmoid", or "negative" for eigenvalues down to -1.
        l2_norm: q and k are normalised by the operator; those of q are so short that its 1e-6
            counts.
        initial_state: whether there is one.
        state_v_first: states are [..., V, K].
        chunk_size: as the operator has it.
        chunks_per_range: of the split of long sequences; None for no split.
    """

    tokens: int = 70
    sizes: tuple[int, int] = (32, 24)
    heads: tuple[int, int] = (1, 2)
    layout: str = "one"
    dtype: torch.dtype = torch.float32
    decay: float | str = "soft"
    head_decay: bool = False
    beta: str = "plain"
    l2_norm: bool = False
    initial_state: bool = True
    state_v_first: bool = False
    chunk_size: int = 64
    chunks_per_range: int | None = None

    def __str__(self) -> str:
        """What differs from the default."""
        changed = [
            str(getattr(self, name)).removeprefix("torch.")
            if name in ("decay", "layout", "dtype", "beta")
            else f"{name}={getattr(self, name)}"
            for name, field in self.__dataclass_fields__.items()
            if getattr(self, name) != field.default
        ]
        return "-".join(changed).replace(" ", "") or "default"

    @property
    def bounds(self) -> list[int] | None:
        """Where packed sequences begin and end."""
        if self.layout != "packed":
            return None
        third = self.tokens // 3
        cuts = (0, 0, third, third, third + 1, self.tokens - 1, self.tokens, self.tokens)
        return sorted(min(max(0, x), self.tokens) for x in cuts)

    def inputs(self) -> Tensors:
        """The operator's tensors, by its names for them."""
        generator = torch.Generator().manual_seed(self.tokens + self.sizes[0])

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        (key_dim, value_dim), (heads, value_heads) = self.sizes, self.heads
        rows = (2 if self.layout == "batch" else 1, self.tokens)
        channels = 1 if self.head_decay else key_dim
        x = {"q": randn(*rows, heads, key_dim), "k": randn(*rows, heads, key_dim)}
        if self.l2_norm:
            x = {"q": 3e-4 * x["q"], "k": 3 * x["k"]}
        else:
            x = {name: F.normalize(y, dim=-1) for name, y in x.items()}
        x["v"] = randn(*rows, value_heads, value_dim)
        x["g"] = self._decay(randn(*rows, value_heads, channels), generator)
        beta = randn(*rows, value_heads)
        x["beta"] = beta.sigmoid() if self.beta == "plain" else 2 * beta
        in_kernel = self.gate is not None
        x = {n: y if n == "g" and not in_kernel else y.to(self.dtype) for n, y in x.items()}
        if self.gate is not None:
            if "without A_log" not in str(self.decay):
                # Rates of 1 to 16, as Kimi Linear starts with.
                x["A_log"] = (1 + 15 * torch.rand(value_heads, generator=generator)).log()
            if "without dt_bias" not in str(self.decay):
                x["dt_bias"] = randn(value_heads * channels)
        if self.initial_state:
            sequences = rows[0] if self.bounds is None else len(self.bounds) - 1
            sizes = (value_dim, key_dim) if self.state_v_first else (key_dim, value_dim)
            x["initial_state"] = randn(sequences, value_heads, *sizes)
        return x

    def _decay(self, noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if self.gate is not None:
            return noise
        if self.decay == "soft":
            return -F.softplus(noise)
        if self.decay == "mixed":
            return torch.where(noise > 0.84, -60.0, -0.01)
        assert isinstance(self.decay, float)
        return self.decay * (1 + 0.1 * torch.rand(noise.shape, generator=generator))

    @property
    def gate(self) -> str | None:
        """The gate that the operator applies."""
        name = str(self.decay).split()[0]
        return name if name in GATES else None

    def options(self) -> dict[str, Any]:
        """The operator's arguments that are no tensors with gradients."""
        options: dict[str, Any] = {
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": self.l2_norm,
            "use_beta_sigmoid_in_kernel": self.beta != "plain",
            "allow_neg_eigval": self.beta == "negative",
            "state_v_first": self.state_v_first,
            "chunk_size": self.chunk_size,
        }
        if self.gate is not None:
            options |= {"use_gate_in_kernel": True, "lower_bound": GATES[self.gate]}
        if self.bounds is not None:
            options["cu_seqlens"] = torch.tensor(self.bounds)
        return options

    def check(self, operator: Any, tolerance: float | dict[str, float], **options: Any) -> Tensors:
        """Outputs and gradients of `operator` are within tolerance; returns them.

        The gradients of A_log and dt_bias are sums over tokens, which may cancel by chance. Their
        errors are compared with the root of the sum of squares of the terms.
        """
        got, reference = self.results(operator, **options), self.reference()
        assert got.keys() == reference.keys()
        errors = {}
        for name, value in reference.items():
            if name in ("dA_log", "ddt_bias"):
                errors[name] = self._parameter_error(got[name], value)
            else:
                errors[name] = rms_error(got[name], value)
        wrong = {}
        for name, error in errors.items():
            limit = tolerance if isinstance(tolerance, float) else tolerance[name]
            if not error <= limit:
                wrong[name] = f"{error:.2e} > {limit:.0e}"
        assert not wrong, wrong
        return got

    def _parameter_error(self, got: torch.Tensor, terms: torch.Tensor) -> float:
        assert got.isfinite().all()
        terms = terms.flatten(0, 1).flatten(1)
        heads = self.heads[1]
        if got.numel() == heads:  # A_log, or dt_bias of one decay per head
            terms = terms.unflatten(1, (heads, -1)).movedim(2, 1).flatten(0, 1)
        error = got.flatten().double() - terms.sum(0)
        size = terms.square().sum(0).mean().sqrt().item()
        error_size = error.square().mean().sqrt().item()
        return error_size / size if size else error_size

    def results(self, operator: Any, **options: Any) -> Tensors:
        """Outputs of `operator` and the gradients of a weighted sum of them."""
        options = self.options() | options
        return outputs_and_gradients(lambda **x: operator(**x, **options), self.inputs())

    def reference(self) -> Tensors:
        """What `results` should be, in float64; A_log's and dt_bias's gradients by token."""
        inputs = self.inputs()
        for name in ("A_log", "dt_bias"):
            if name in inputs:
                parameter = inputs[name].view(self.heads[1], -1)
                inputs[name] = parameter.expand_as(inputs["g"])
        return outputs_and_gradients(self.formulas, inputs, torch.float64)

    def formulas(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        A_log: torch.Tensor | None = None,
        dt_bias: torch.Tensor | None = None,
        initial_state: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """o and the final state by the formulas, one sequence after the other.

        A_log and dt_bias are of the shape of g.
        """
        if self.l2_norm:
            q, k = (x / (x.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
        if self.gate is not None:
            x = g if dt_bias is None else g + dt_bias
            rate = 1.0 if A_log is None else A_log.exp()
            if GATES[self.gate] is None:
                g = -rate * torch.logaddexp(x, torch.zeros_like(x))
            else:
                g = GATES[self.gate] / (1 + torch.exp(-rate * x))
        if self.beta != "plain":
            beta = (2 if self.beta == "negative" else 1) / (1 + (-beta).exp())
        if initial_state is not None and self.state_v_first:
            initial_state = initial_state.mT
        if self.bounds is None:
            o, state = kda_recurrence(q, k, v, g, beta, initial_state=initial_state)
            return o, state.mT if self.state_v_first else state
        outputs, states = [], []
        for n, (start, end) in enumerate(pairwise(self.bounds)):
            if initial_state is None:
                state = q.new_zeros(1, v.shape[2], k.shape[3], v.shape[3])
            else:
                state = initial_state[n : n + 1]
            if start < end:
                sequence = (x[:, start:end] for x in (q, k, v, g, beta))
                o, state = kda_recurrence(*sequence, initial_state=state)
                outputs.append(o)
            states.append(state)
        state = torch.cat(states)
        return torch.cat(outputs, 1), state.mT if self.state_v_first else state


def covering(**factors: list[Any]) -> Iterator[Case]:
    """Few cases in which each two values of two different factors meet at least once."""
    settings = [[(name, value) for value in values] for name, values in factors.items()]
    missing = {pair for a, b in combinations(settings, 2) for pair in product(a, b)}

    def gain(setting: tuple[str, Any], row: list[tuple[str, Any]]) -> int:
        return sum((x, setting) in missing or (setting, x) in missing for x in row)

    for a, b in combinations(settings, 2):
        for pair in product(a, b):
            if pair in missing:
                row = list(pair)
                for values in settings:
                    if values is not a and values is not b:
                        row.append(max(values, key=lambda setting: gain(setting, row)))
                missing -= set(permutations(row, 2))
                yield Case(**dict(row))
