"""Latency of decode steps: one new token of each sequence of a batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from megakda.kernels.kda import peers
from megakda.kernels.kda.decode import kda_decode_step
from megakda.kernels.kda.decode_fused import kda_decode_fused
from megakda.kernels.mla_decode import mla_decode
from megakda.kernels.verify.bench import agreement
from megakda.kernels.verify.bench.measure import Clock, Lap, summary
from megakda.kernels.verify.bench.problems import Problem, Shape, make_problem
from megakda.kernels.verify.bench.run import Disagreement, Results, Settings
from megakda.kernels.verify.bench.sides import OURS, CannotRun, load

LATENT, SHARED, TAPS = 512, 64, 4
MLA_SCALE = (128 + 64) ** -0.5
COLD_BYTES = 256 << 20
"""Steps that are timed one after the other on a GPU use states of this size in all, so that none is
still in a cache: between two steps of a model its weights have passed through."""

Call = Callable[[], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Operator:
    """A decode operator.

    Attributes:
        name: of it.
        tensors: random inputs of a shape, B sequences with T tokens of context; those named in
            `updated` are changed by a step.
        updated: names of these.
        reference: the results in float64, of the tensors.
        sides: by name, a function of the tensors that does one step; raises `CannotRun` when it is
            called with tensors that it has no form for.
    """

    name: str
    tensors: Callable[[Shape, Settings], dict[str, Any]]
    updated: tuple[str, ...]
    reference: Callable[[dict[str, Any]], tuple[torch.Tensor, ...]]
    sides: dict[str, Callable[[dict[str, Any]], Call]]

    def fresh(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """The tensors with copies of those that a step changes."""
        return {**tensors, **{name: _copy(tensors[name]) for name in self.updated}}


def decode_benchmark(settings: Settings, say: Callable[[str], None] = print) -> Results:
    """Checks and times a step of every operator; B sequences with T tokens of context each.

    Raises:
        Disagreement: our own step is wrong; nothing of it was timed.
    """
    results = Results([], [], [], [])
    wanted = {side.name for side in settings.sides}
    for shape in settings.shapes:
        for operator in OPERATORS:
            say(f"{operator.name}, {shape.label}")
            tensors = operator.tensors(shape, settings)
            expected = operator.reference(operator.fresh(tensors))
            for name, prepare in operator.sides.items():
                if name not in wanted:
                    continue
                where = f"{operator.name}, {shape.label}"
                try:
                    got = prepare(operator.fresh(tensors))()
                except CannotRun as reason:
                    entry = {"side": f"{name}, {operator.name}", "shape": shape.label}
                    results.skipped.append({**entry, "reason": str(reason)})
                    continue
                if not _right(name, where, got, expected, settings, results):
                    continue
                call, graph = _times(prepare, tensors, operator, settings)
                row = {"operator": operator.name, "shape": shape.label, "side": name}
                results.rows.append({**row, "call": call, "graph": graph})
                fast = "" if graph is None else f", {1e3 * graph['median_ms']:.2f} us in a graph"
                say(f"  {name:14} {1e3 * call['median_ms']:10.2f} us{fast}")
    return results


def _copy(x: Any) -> Any:
    return tuple(map(_copy, x)) if isinstance(x, tuple) else x.clone()


def _right(
    side: str,
    where: str,
    got: tuple[torch.Tensor, ...],
    expected: tuple[torch.Tensor, ...],
    settings: Settings,
    results: Results,
) -> bool:
    named = [dict(zip(("o", "state"), x, strict=False)) for x in (got, expected)]
    found = agreement.errors(*named)
    results.errors.append({"side": side, "where": f"{where} against float64", "errors": found})
    problems = agreement.too_large(found, settings.dtype)
    sentence = f"{side}, {where}: {'; '.join(problems)}"
    if problems and side == OURS:
        raise Disagreement(sentence)
    if problems:
        results.wrong.append(sentence)
    return not problems


def _times(
    prepare: Callable[[dict[str, Any]], Call],
    tensors: dict[str, Any],
    operator: Operator,
    settings: Settings,
) -> tuple[dict[str, float], dict[str, float] | None]:
    """Of a call from Python, and of one in a CUDA graph."""
    cuda = settings.device.type == "cuda"
    size = sum(x.numel() * x.element_size() for x in _flat(tensors[n] for n in operator.updated))
    size = size or tensors["cache"].numel() * tensors["cache"].element_size()
    copies = min(64, max(4, COLD_BYTES // size)) if cuda else 1
    calls = [prepare(_cold(tensors, operator)) for _ in range(copies)]
    with torch.no_grad():
        for call in calls:
            call()
        if not cuda:
            seconds = []
            for _ in range(max(settings.repeats, 20)):
                began = time.perf_counter()
                calls[0]()
                seconds.append(time.perf_counter() - began)
            return summary(seconds), None
        return _eager(calls, settings.repeats), _captured(calls, settings)


def _cold(tensors: dict[str, Any], operator: Operator) -> dict[str, Any]:
    """With its own copies of what is large: states, or the cache."""
    fresh = operator.fresh(tensors)
    return {**fresh, "cache": fresh["cache"].clone()} if "cache" in fresh else fresh


def _eager(calls: list[Call], repeats: int) -> dict[str, float]:
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - began) / len(calls))
    return summary(seconds)


def _captured(calls: list[Call], settings: Settings) -> dict[str, float]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def step(lap: Lap) -> None:
        graph.replay()
        lap()

    clock = Clock(settings.device)
    clock.time(step)
    return summary(clock.time(step)[0] / len(calls) for _ in range(settings.repeats))


def _flat(tensors: Iterator[Any]) -> Iterator[torch.Tensor]:
    for x in tensors:
        if isinstance(x, tuple):
            yield from x
        else:
            yield x


# ------------------------------------------------------------------ kda_decode_step


def _step_tensors(shape: Shape, settings: Settings) -> dict[str, Any]:
    one = replace(shape, lengths=(1,))
    problem = make_problem(one, settings.gate, settings.dtype, settings.device)
    sizes = (shape.batch, shape.heads, shape.key_dim, shape.value_dim)
    return {"problem": problem, "state": _randn(sizes, torch.float32, settings.device)}


def _step_arguments(p: Problem) -> dict[str, Any]:
    raw = p.gate != "none"
    return {
        "A_log": p.A_log,
        "dt_bias": p.dt_bias,
        "use_qk_l2norm_in_kernel": raw,
        "use_gate_in_kernel": raw,
        "use_beta_sigmoid_in_kernel": raw,
        "lower_bound": p.lower_bound,
    }


def _step(tensors: dict[str, Any], backend: str | None = None) -> Call:
    p, state = tensors["problem"], tensors["state"]
    arguments = _step_arguments(p)

    def call() -> tuple[torch.Tensor, ...]:
        o = kda_decode_step(p.q, p.k, p.v, p.g, p.beta, state, **arguments, backend=backend)
        return o, state

    return call


def _step_fla(tensors: dict[str, Any]) -> Call:
    reason = peers.why_not("fla")
    if reason is not None:
        raise CannotRun(reason)
    recurrent = load("fla.ops.kda").fused_recurrent_kda
    p, state = tensors["problem"], tensors["state"]
    arguments = {"initial_state": state, "output_final_state": True, **_step_arguments(p)}
    return lambda: recurrent(p.q, p.k, p.v, p.g, p.beta, **arguments)


def _step_transformers(tensors: dict[str, Any]) -> Call:
    p, state = tensors["problem"], tensors["state"]
    if state.device.type != "cpu":
        raise CannotRun("is compared on a CPU alone; a GPU has faster forms")
    module = load("transformers.models.kimi_linear.modeling_kimi_linear")
    recurrent = module.recurrent_kimi_delta_attention.__wrapped__

    def call() -> tuple[torch.Tensor, ...]:
        x = p.activated()
        return recurrent(x.q, x.k, x.v, x.g, x.beta, state, True)

    return call


# ------------------------------------------------------------------ kda_decode_fused


def _fused_tensors(shape: Shape, settings: Settings) -> dict[str, Any]:
    gated = replace(settings, gate="bounded" if settings.gate == "bounded" else "softplus")
    tensors = _step_tensors(shape, gated)
    widths = (shape.heads * shape.key_dim,) * 2 + (shape.heads * shape.value_dim,)
    kind = (settings.dtype, settings.device)
    return {
        **tensors,
        "gate": _randn((shape.batch, widths[2]), *kind),
        "conv_states": tuple(_randn((shape.batch, w, TAPS - 1), *kind) for w in widths),
        "conv_weights": tuple(_randn((w, TAPS), *kind) for w in widths),
        "norm_weight": torch.ones(shape.value_dim, dtype=settings.dtype, device=settings.device),
    }


def _fused(tensors: dict[str, Any], backend: str | None = None) -> Call:
    p, state = tensors["problem"], tensors["state"]
    q, k, v, g, beta = (x.flatten(1) for x in (p.q, p.k, p.v, p.g, p.beta))
    names = ("gate", "conv_states", "conv_weights", "norm_weight", "state")
    rest = [tensors[name] for name in names]
    options = {"A_log": p.A_log, "dt_bias": p.dt_bias, "lower_bound": p.lower_bound}

    def call() -> tuple[torch.Tensor, ...]:
        o = kda_decode_fused(q, k, v, g, beta, *rest, **options, backend=backend)
        return o, state

    return call


# ------------------------------------------------------------------ mla_decode


def _mla_tensors(shape: Shape, settings: Settings) -> dict[str, Any]:
    kind = (settings.dtype, settings.device)
    return {
        "q": _randn((shape.batch, shape.heads, LATENT + SHARED), *kind),
        "cache": _randn((shape.batch, shape.tokens, LATENT + SHARED), *kind),
        "lengths": torch.full((shape.batch,), shape.tokens, device=settings.device),
    }


def _mla(tensors: dict[str, Any], backend: str | None = None) -> Call:
    arguments = (tensors["q"], tensors["cache"], tensors["lengths"], LATENT)

    def call() -> tuple[torch.Tensor, ...]:
        o = mla_decode(*arguments, scale=MLA_SCALE, backend=backend)
        assert isinstance(o, torch.Tensor)
        return (o,)

    return call


def _mla_sdpa(tensors: dict[str, Any]) -> Call:
    # One key and value head, whose queries are those of all heads.
    q, k = tensors["q"].unsqueeze(1), tensors["cache"].unsqueeze(1)
    v = k[..., :LATENT]
    return lambda: (F.scaled_dot_product_attention(q, k, v, scale=MLA_SCALE).squeeze(1),)


def _randn(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(1)
    return (0.5 * torch.randn(size, generator=generator, device=device)).to(dtype)


OPERATORS = (
    Operator(
        "kda_decode_step",
        _step_tensors,
        ("state",),
        lambda x: _step({**x, "problem": x["problem"].to(torch.float64)}, "reference")(),
        {OURS: _step, "fla": _step_fla, "transformers": _step_transformers},
    ),
    Operator(
        "kda_decode_fused",
        _fused_tensors,
        ("state", "conv_states"),
        lambda x: _fused(x, "reference")(),
        {OURS: _fused},
    ),
    Operator(
        "mla_decode",
        _mla_tensors,
        (),
        lambda x: _mla(x, "reference")(),
        {OURS: _mla, "softmax": _mla_sdpa},
    ),
)
