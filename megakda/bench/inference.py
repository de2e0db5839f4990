"""Prefill, decoding and memory against context length: Kimi Linear beside its two baselines.

The models have the same shape and random weights; what differs is the token mixer. Times to decode
at a context of n tokens are taken with n tokens in the caches, however they came there, so that
long contexts need no long prefill.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from megakda.config import Config, compose, validate
from megakda.errors import ConfigError
from megakda.inference.runner import ModelRunner
from megakda.layers.cached import LatentCache, NewTokens
from megakda.layers.kda import KimiDeltaAttention
from megakda.layers.lean import make_lean
from megakda.models.cache_size import cache_size
from megakda.models.init import initialize
from megakda.models.kimi_linear import build_chunks
from megakda.runtime.distributed import process_groups

VARIANTS = {
    "Kimi Linear": [],
    "GDN hybrid": ["model.linear.mixer=gdn"],
    "full MLA": ["model.pattern=0:1", "model.mla.rope=true"],
}
PAGE = 64
WARM_UPS = 2


@dataclass(frozen=True)
class Point:
    """One variant at one context length.

    Attributes:
        prefill_s: seconds for the whole context, or None where it was not run.
        decode_ms: per token of each sequence, all layers.
        linear_ms, full_ms: of the linear and of the full token mixers together, projections
            included; None where the model has none.
        cache_bytes: of one sequence.
    """

    variant: str
    context: int
    prefill_s: float | None
    decode_ms: float
    linear_ms: float | None
    full_ms: float | None
    cache_bytes: int


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        overrides: of the recipe, as model=tiny.
        contexts: tokens before the one that is decoded.
        prefill_contexts: of those, the ones to prefill too.
        batch: sequences decoded together.
        chunk: tokens per forward pass of a prefill.
        repeats: timed runs, of which the median counts.
    """

    overrides: Sequence[str]
    contexts: Sequence[int]
    prefill_contexts: Sequence[int]
    batch: int = 1
    chunk: int = 2048
    repeats: int = 5

    def check(self) -> None:
        """Raises ConfigError for numbers that cannot work."""
        for name in ("batch", "chunk", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.contexts or min(self.contexts) < 1:
            raise ConfigError(f"contexts={list(self.contexts)} must be positive numbers")


def measure(
    plan: Plan, variants: Sequence[str], device: torch.device, say: Callable[[str], None]
) -> list[Point]:
    """Runs every variant at every length, in process groups of its own.

    Raises:
        ConfigError: a recipe that cannot work, or an unknown variant.
    """
    plan.check()
    unknown = [name for name in variants if name not in VARIANTS]
    if unknown:
        raise ConfigError(f"variants {unknown}: must be some of {list(VARIANTS)}")
    configs = {name: compose([*plan.overrides, *VARIANTS[name]]) for name in variants}
    for config in configs.values():
        config.train.context = config.parallel.tensor
        validate(config, 1)
    points: list[Point] = []
    for name, config in configs.items():
        with process_groups(config.parallel, config.runtime, device):
            points += _variant(name, config, plan, device, say)
    return points


def _variant(
    name: str, config: Config, plan: Plan, device: torch.device, say: Callable[[str], None]
) -> Iterator[Point]:
    (chunk,) = build_chunks(config.model, config.parallel, config.precision, 1)
    initialize([chunk], config.train.seed, config.model.init_std)
    make_lean(chunk.eval())
    per_sequence = -(-(max(plan.contexts) + 1) // PAGE)
    runner = ModelRunner(chunk, plan.batch, plan.batch * per_sequence, PAGE)
    for cache in runner.caches.values():
        if isinstance(cache, LatentCache):
            cache.latents.normal_()
    size = cache_size(config.model, config.precision)
    sequences = [
        NewTokens(n, 0, 1, range(n * per_sequence, (n + 1) * per_sequence))
        for n in range(plan.batch)
    ]
    for context in plan.contexts:
        prefill = None
        if context in plan.prefill_contexts:
            prefill = _prefill(runner, sequences[0], context, plan.chunk, device)
        at = [replace(sequence, past=context) for sequence in sequences]

        def step(at: list[NewTokens] = at) -> float:
            return _timed(lambda: runner.forward(at, [1] * len(at), range(len(at))), device)

        for _ in range(WARM_UPS):
            step()
        decode = median(step() for _ in range(plan.repeats))
        spent = [_mixer_seconds(chunk, device, step) for _ in range(plan.repeats)]
        times = {kind: 1e3 * median(found[kind] for found in spent) for kind in spent[0]}
        point = Point(
            name,
            context,
            prefill,
            1e3 * decode,
            times.get("linear"),
            times.get("full"),
            size.total(context),
        )
        say(f"{name}, {context:,} tokens: {point.decode_ms:.2f} ms per token")
        yield point


def _prefill(
    runner: ModelRunner, sequence: NewTokens, context: int, chunk: int, device: torch.device
) -> float:
    """Seconds to compute `context` tokens from nothing, `chunk` at a time."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 256, (context,), generator=generator).tolist()

    def run() -> None:
        runner.clear(sequence.row)
        for past in range(0, context, chunk):
            count = min(chunk, context - past)
            new = replace(sequence, past=past, count=count)
            runner.forward([new], tokens[past : past + count], [count - 1])

    runner.forward([replace(sequence, count=min(chunk, context))], tokens[:chunk], [0])  # warm
    return _timed(run, device)


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _mixer_seconds(chunk: Any, device: torch.device, step: Callable[[], Any]) -> dict[str, float]:
    """Seconds that `step` spends in token mixers, by kind of layer."""
    spent: dict[str, float] = {}
    started = 0.0

    def before(*_: Any) -> None:
        nonlocal started
        _wait(device)
        started = time.perf_counter()

    hooks = []
    for layer in chunk.decoder.layers:
        mixer = layer.self_attention
        kind = "linear" if isinstance(mixer, KimiDeltaAttention) else "full"

        def after(*_: Any, kind: str = kind) -> None:
            _wait(device)
            spent[kind] = spent.get(kind, 0.0) + time.perf_counter() - started

        hooks += [mixer.register_forward_pre_hook(before), mixer.register_forward_hook(after)]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    return spent
