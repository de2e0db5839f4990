"""What is asked of the generator, and what it answers: plain data, without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

from megakda.errors import ConfigError

MAX_LOGPROBS = 20
"""Alternatives that can be asked for with each token, as many as OpenAI's interface allows."""


@dataclass(frozen=True)
class SamplingParams:
    """How to continue a prompt.

    The order is that of `transformers`: repetition penalty, temperature, top-k, top-p, min-p.
    Log-probabilities are those of the model itself, before any of these.

    Attributes:
        max_tokens: at most so many new ones; 0 only scores the prompt.
        temperature: 0 takes the likeliest token.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens that together have this probability, in (0, 1].
        min_p: only tokens with at least this share of the likeliest one's probability, in [0, 1).
        repetition_penalty: divides positive and multiplies negative logits of tokens that the
            prompt or the answer holds already; 1: none.
        stop: texts that end the answer and are not part of it. Special tokens have no text: name
            them in `stop_token_ids`.
        stop_token_ids: tokens that end the answer, besides the tokenizer's end of document; they
            are in its `tokens`, and not in its text.
        ignore_eos: go on after the end of a document.
        seed: of the draws, so that a request repeats; None: another one each time.
        logprobs: how many alternatives to return with each token's log-probability, 0 to 20; None
            for no log-probabilities.
        prompt_logprobs: the same for the tokens of the prompt, the first of which has none.
        cache_prefix: whether this prompt may use and feed the prefix cache.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    cache_prefix: bool = True

    def check(self) -> None:
        """Raises ConfigError for a value that cannot work."""
        rules = [
            ("max_tokens", 0 <= self.max_tokens < 2**31, "in 0..2^31-1"),
            ("temperature", 0 <= self.temperature < math.inf, "a finite number, at least 0"),
            ("top_k", 0 <= self.top_k < 2**31, "in 0..2^31-1 (0: all tokens)"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p < 1, "in [0, 1)"),
            (
                "repetition_penalty",
                0.01 <= self.repetition_penalty <= 100,
                "in 0.01..100 (1: none)",
            ),
            (
                "stop",
                not isinstance(self.stop, str) and all(self.stop),
                "a tuple of texts that are not empty",
            ),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "in 0..2^63-1, or None"),
        ]
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            right = value is None or 0 <= value <= MAX_LOGPROBS
            rules.append((name, right, f"in 0..{MAX_LOGPROBS}, or None"))
        for name, right, rule in rules:
            if not right:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be {rule}")

    def greedy(self) -> SamplingParams:
        """The same with the likeliest token at every step."""
        return replace(self, temperature=0.0)


@dataclass(frozen=True)
class TokenLogprob:
    """One token's log-probability (natural logarithm) and its rivals', likeliest first."""

    token: int
    logprob: float
    rank: int  # 1 for the likeliest token
    top: tuple[tuple[int, float], ...] = ()  # (token, log-probability)


@dataclass(frozen=True)
class Update:
    """What one step of the engine brought for one request.

    `text` is new text that is safe to show: characters are whole, and it cannot become part of a
    stop text any more. `finish_reason` is "stop" (end of document, stop token or text), "length"
    or "cancelled" in a request's last update, None before.
    """

    request: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # in the first update
    cached_tokens: int = 0  # in the first update: of the prompt, how many a prefix covered
    finish_reason: str | None = None


@dataclass
class Completion:
    """A whole answer.

    Attributes:
        prompt: its tokens.
        tokens: new ones, the stop token included where one ended the answer.
        text: of the new tokens, without a stop text.
        logprobs: one per new token, where asked for.
        prompt_logprobs: one per prompt token, the first None, where asked for.
        finish_reason: "stop", "length" or "cancelled".
        cached_tokens: of the prompt, how many a cached prefix covered.
    """

    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish_reason: str | None = None
    cached_tokens: int = 0

    def add(self, update: Update) -> None:
        """Appends what a step brought."""
        self.tokens += update.tokens
        self.text += update.text
        self.logprobs += update.logprobs
        if update.prompt_logprobs is not None:
            self.prompt_logprobs = list(update.prompt_logprobs)
        self.cached_tokens += update.cached_tokens
        self.finish_reason = update.finish_reason
