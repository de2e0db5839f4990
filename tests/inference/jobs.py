"""Jobs for the rank pool: generation at a layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tests.inference.models import random_model, random_prompts


def answers(overrides: Sequence[str]) -> list:
    """Tokens and log-probabilities of ragged prompts, greedy and sampled, with shared prefixes."""
    from megakda.inference.engine import Engine, EngineSettings
    from megakda.inference.request import SamplingParams

    shared = random_prompts([30])[0]
    prompts = random_prompts([1, 7, 33, 20], seed=1)
    prompts += [shared + prompt for prompt in prompts]
    base = SamplingParams(max_tokens=12, logprobs=2, ignore_eos=True, temperature=0.0)
    params = [
        base if n % 2 else replace(base, temperature=0.9, seed=n, max_tokens=6 + n)
        for n in range(len(prompts))
    ]
    params[1] = replace(params[1], prompt_logprobs=1)
    settings = EngineSettings(
        max_sequences=3, max_context=96, prefill_chunk=19, page_size=8, prefix_slots=2
    )
    with random_model(overrides) as model:
        engine = Engine(model, settings)
        found = engine.generate(prompts, params)
        assert engine.stats().prefix_hits > 0
    return found
