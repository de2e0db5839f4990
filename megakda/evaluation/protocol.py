"""What the evaluations need of a generator."""

from __future__ import annotations

from typing import Protocol

from megakda.inference.request import Completion, SamplingParams, TokenLogprob


class Scorer(Protocol):
    """Log-probabilities of given tokens, as `megakda.inference.engine.Engine` gives them."""

    def score(self, sequences: list[list[int]]) -> list[list[TokenLogprob | None]]:
        """Of every token given those before it; the first of each sequence has None."""
        ...


class Generator(Scorer, Protocol):
    """Continuations as well."""

    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[Completion]:
        """One per prompt, in their order."""
        ...
