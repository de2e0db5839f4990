"""The implementations that are compared, each behind the same `Problem`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megakda.kernels.kda import peers
from megakda.kernels.kda.checks import Options
from megakda.kernels.kda.op import chunk_kda
from megakda.kernels.verify.bench.problems import Problem, attention_reference

OURS = "megakda"
FAMILIES = ("kda", "gdn", "softmax")


class CannotRun(Exception):
    """A side has no such form, or is not installed: why."""


@dataclass(frozen=True, eq=False)
class Run:
    """One side on one problem.

    Attributes:
        forward: computes o [B, T, H, V].
        leaves: what gradients are taken of, by name.
    """

    forward: Callable[[], torch.Tensor]
    leaves: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Side:
    """An implementation.

    Attributes:
        name: in tables, and for --only.
        family: sides of one family compute the same of the same inputs.
        prepare: makes a run of a problem whose inputs require gradients; raises `CannotRun`.
        what: for the reader.
        backward: whether it has gradients.
        slack: how many times the error of others it may have.
    """

    name: str
    family: str
    prepare: Callable[[Problem], Run]
    what: str
    backward: bool = True
    slack: float = 1.0


def kda_arguments(problem: Problem) -> dict[str, Any]:
    """Keyword arguments of `chunk_kda` besides q, k, v, g and beta."""
    raw = problem.gate != "none"
    return {
        "A_log": problem.A_log,
        "dt_bias": problem.dt_bias,
        "use_qk_l2norm_in_kernel": raw,
        "use_gate_in_kernel": raw,
        "use_beta_sigmoid_in_kernel": raw,
        "safe_gate": problem.lower_bound is not None,
        "lower_bound": problem.lower_bound,
        "cu_seqlens": problem.cu_seqlens,
    }


def reference(family: str, problem: Problem) -> torch.Tensor:
    """o in float64, token by token from the formula; differentiable."""
    if family == "softmax":
        return attention_reference(problem)
    x = problem.to(torch.float64)
    return chunk_kda(x.q, x.k, x.v, x.g, x.beta, **kda_arguments(x), backend="reference")[0]


def _ours(problem: Problem) -> Run:
    p = problem
    arguments = kda_arguments(p)
    if p.cu_seqlens is not None:
        arguments["cu_seqlens"] = p.cu_seqlens.cpu()  # it is read on the host
    return Run(lambda: chunk_kda(p.q, p.k, p.v, p.g, p.beta, **arguments)[0], p.inputs)


def _peer(name: str, function: Callable[..., Any]) -> Callable[[Problem], Run]:
    def prepare(problem: Problem) -> Run:
        reason = peers.why_not(name)
        if reason is not None:
            raise CannotRun(reason)
        p = problem
        inputs, options = (p.q, p.k, p.v, p.g, p.beta), Options(**kda_arguments(p))
        return Run(lambda: function(inputs, options)[0], p.inputs)

    return prepare


def _flash(problem: Problem) -> Run:
    run = _peer("flash_kda", peers.chunk_kda_flash)(problem)
    try:
        with torch.no_grad():
            run.forward()
    except ValueError as error:
        raise CannotRun(str(error)) from None
    return run


def _fla_naive(problem: Problem) -> Run:
    _cpu_only(problem)
    naive = load("fla.ops.kda.naive").naive_chunk_kda
    if problem.shape.lengths[0] % 64:
        raise CannotRun("needs a multiple of 64 tokens")
    rows = _rows(problem)

    def forward() -> torch.Tensor:
        p = problem.activated()
        o = naive(*(rows(x) for x in (p.q, p.k, p.v, p.g, p.beta)))[0]
        return o.view(p.v.shape)

    return Run(forward, problem.inputs)


def _transformers(problem: Problem) -> Run:
    _cpu_only(problem)
    module = load("transformers.models.kimi_linear.modeling_kimi_linear")
    # Where fla is installed, the decorated function runs its Triton kernels, GPU or not.
    chunked = module.chunk_kimi_delta_attention.__wrapped__
    rows = _rows(problem)

    def forward() -> torch.Tensor:
        p = problem.activated()
        return chunked(*(rows(x) for x in (p.q, p.k, p.v, p.g, p.beta)))[0].view(p.v.shape)

    return Run(forward, problem.inputs)


def _fla_gdn(problem: Problem) -> Run:
    _gpu_only(problem)
    p = problem
    if p.lower_bound is not None:
        raise CannotRun("has no bounded gate")
    raw = p.gate != "none"
    chunked = load("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    arguments: dict[str, Any] = {
        "use_qk_l2norm_in_kernel": raw,
        "use_beta_sigmoid_in_kernel": raw,
        "cu_seqlens": p.cu_seqlens,
    }
    if raw:
        arguments |= {"use_gate_in_kernel": True, "A_log": p.A_log, "dt_bias": p.dt_bias}
    return Run(lambda: chunked(p.q, p.k, p.v, p.g.squeeze(-1), p.beta, **arguments)[0], p.inputs)


def _fla_dplr(problem: Problem) -> Run:
    """KDA as a diagonal plus a low-rank matrix: S <- Diag(exp g) S + b (S^T a)^T + k v^T.

    What makes a and b is not timed, nor are norm, gate and sigmoid. In bf16 a, b and beta k are
    rounded once more, hence the slack.
    """
    _gpu_only(problem)
    chunked = load("fla.ops.generalized_delta_rule").chunk_dplr_delta_rule
    with torch.no_grad():
        p = problem.activated()
        write = p.beta.unsqueeze(-1) * p.k
        tensors = {"q": p.q, "k": write, "v": p.v, "a": p.g.exp() * p.k, "b": -write, "gk": p.g}
        dtypes = {name: torch.float32 if name == "gk" else problem.q.dtype for name in tensors}
        tensors = {name: x.to(dtypes[name]).contiguous() for name, x in tensors.items()}
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    arguments = {"cu_seqlens": p.cu_seqlens, "lower_bound": problem.lower_bound}
    # Their gradients are not those of q and k, and have no names that other sides have.
    named = {f"dplr_{name}": x for name, x in leaves.items()}
    return Run(lambda: chunked(**leaves, **arguments)[0], named)


def _softmax(problem: Problem) -> Run:
    leaves = {name: getattr(problem, name) for name in ("q", "k", "v")}
    rows = _rows(problem)

    def forward() -> torch.Tensor:
        q, k, v = (rows(x).transpose(1, 2) for x in leaves.values())
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return o.transpose(1, 2).reshape(problem.v.shape)

    return Run(forward, leaves)


SIDES = (
    Side(OURS, "kda", _ours, "KDA of this repository"),
    Side("fla", "kda", _peer("fla", peers.chunk_kda_fla), "fla's chunk_kda, Triton"),
    Side("fla_naive", "kda", _fla_naive, "fla's naive_chunk_kda, plain PyTorch"),
    Side("transformers", "kda", _transformers, "chunk form of transformers, plain PyTorch"),
    Side("flash_kda", "kda", _flash, "FlashKDA, CUTLASS, forward only", backward=False),
    Side("fla_dplr", "kda", _fla_dplr, "KDA as fla's chunk_dplr_delta_rule", slack=4.0),
    Side("megakda_gdn", "gdn", _ours, "Gated DeltaNet of this repository: one decay per head"),
    Side("fla_gdn", "gdn", _fla_gdn, "fla's chunk_gated_delta_rule"),
    Side("softmax", "softmax", _softmax, "causal softmax attention, torch's SDPA"),
)


def find_sides(names: list[str] | None) -> list[Side]:
    """The sides named, or all, in the order of `SIDES`.

    Raises:
        ValueError: an unknown name.
    """
    known = [side.name for side in SIDES]
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"no side {', '.join(unknown)}; there are {', '.join(known)}")
    return [side for side in SIDES if not names or side.name in names]


def _rows(problem: Problem) -> Callable[[torch.Tensor], torch.Tensor]:
    try:
        problem.rows(problem.beta)
    except ValueError as error:
        raise CannotRun(str(error)) from None
    return problem.rows


def _gpu_only(problem: Problem) -> None:
    if problem.q.device.type != "cuda":
        raise CannotRun("runs on a GPU")


def _cpu_only(problem: Problem) -> None:
    if problem.q.device.type != "cpu":
        raise CannotRun("is compared on a CPU alone; a GPU has faster forms")


def load(module: str) -> Any:
    """A module of a library that may not be installed; raises `CannotRun`."""
    package = module.split(".")[0]
    if importlib.util.find_spec(package) is None:
        raise CannotRun(f"the package {package} is not installed")
    return importlib.import_module(module)
