"""A request on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from megakda.inference.request import SamplingParams, TokenLogprob
from megakda.inference.text import TextStream


@dataclass
class ActiveRequest:
    """One request: its tokens so far, and what it holds of the caches."""

    request: int
    prompt: np.ndarray
    params: SamplingParams
    tokens: list[int]  # of the prompt and the answer
    text: TextStream
    generator: torch.Generator
    row: int = -1
    pages: list[int] = field(default_factory=list)
    computed: int = 0  # tokens that the caches hold
    places: list[int] = field(default_factory=list)  # at which to save the prefix
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    cached: int = 0  # prompt tokens that a prefix covered
    told: bool = False  # whether an update has gone out

    @property
    def answered(self) -> int:
        return len(self.tokens) - len(self.prompt)

    @property
    def uses_prefixes(self) -> bool:
        return self.params.cache_prefix and self.params.prompt_logprobs is None

    def due(self, most: int) -> int:
        """Tokens to compute next, up to `most`, stopping where the prefix is to be saved."""
        ahead = [place - self.computed for place in self.places if place > self.computed]
        return min(len(self.tokens) - self.computed, most, *ahead)

    def wanted(self, count: int) -> list[int]:
        """Which of the next `count` tokens need logits: the prompt's scored ones, and the last."""
        if self.params.prompt_logprobs is not None and self.computed < len(self.prompt):
            return list(range(count))
        return [count - 1] if self.computed + count == len(self.tokens) else []


Batch = list[tuple[ActiveRequest, int]]
"""Requests with the number of tokens that each computes next."""
