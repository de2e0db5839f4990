"""The generator: requests come and go while every step computes whatever tokens are due.

A step is one forward pass over a flat batch: one token of each sequence that is being answered, and
chunks of the prompts of those that are not yet. Sequences leave when they end, and waiting requests
take their rows (continuous batching). A request enters only when there is room for its longest
answer, so none is ever put back.

With tensor and pipeline parallelism every rank makes the same calls and so comes to the same
schedule; only the choice of tokens is made on one rank and told to the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megakda.config.pattern import FULL, layer_kinds
from megakda.errors import ConfigError
from megakda.inference.active import ActiveRequest, Batch
from megakda.inference.choosing import Chosen, TokenChooser
from megakda.inference.loading import LoadedModel
from megakda.inference.pages import PagePool
from megakda.inference.prefix import Prefix, PrefixCache
from megakda.inference.request import Completion, SamplingParams, TokenLogprob, Update
from megakda.inference.runner import ModelRunner
from megakda.inference.text import TextStream
from megakda.layers.cached import NewTokens

DEFAULT_CACHE_TOKENS = 1 << 20
TEXT_CONTEXT = 4
"""Tokens of the prompt that the first ones of an answer are decoded with."""


@dataclass(frozen=True)
class EngineSettings:
    """How much the engine may do at once.

    Attributes:
        max_sequences: answered at the same time; each has a row of recurrent states.
        max_context: tokens of a prompt and its answer.
        cache_tokens: that the latents of all sequences and saved prefixes may be of together; None:
            max_sequences * max_context, but no more than 2^20 unless max_context is.
        prefill_chunk: prompt tokens per step; smaller ones disturb running answers less.
        prefix_slots: beginnings of prompts whose states are kept; 0 switches the prefix cache off.
        page_size: tokens per page of latents, and the shortest prefix worth keeping.
    """

    max_sequences: int = 16
    max_context: int = 4096
    cache_tokens: int | None = None
    prefill_chunk: int = 512
    prefix_slots: int = 8
    page_size: int = 64

    def check(self) -> None:
        """Raises ConfigError for a value that cannot work."""
        least = {"max_sequences": 1, "max_context": 2, "prefill_chunk": 1, "prefix_slots": 0}
        for name, lowest in {**least, "page_size": 1}.items():
            if getattr(self, name) < lowest:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least {lowest}")
        if self.cache_tokens is not None and self.cache_tokens < self.page_size:
            raise ConfigError(
                f"cache_tokens={self.cache_tokens} must be at least page_size={self.page_size}"
            )

    @property
    def latent_tokens(self) -> int:
        """`cache_tokens`, or its default."""
        if self.cache_tokens is not None:
            return self.cache_tokens
        most = max(self.max_context, DEFAULT_CACHE_TOKENS)
        return min(self.max_sequences * self.max_context, most)


@dataclass(frozen=True)
class EngineStats:
    """What the engine is doing, and what it has done since its start."""

    waiting: int
    running: int
    free_sequences: int
    max_sequences: int
    cache_tokens_used: int  # whole pages
    cache_tokens: int
    prefixes: int
    prompt_tokens: int  # computed
    generated_tokens: int
    prefix_hits: int
    prefix_hit_tokens: int  # prompt tokens that were not computed
    steps: int


class Engine:
    """Generates from a model. Every method is collective over the model's ranks.

    Args:
        model: as `open_model` yields it.
        settings: limits.

    Raises:
        ConfigError: limits that cannot work, or that do not fit into memory.
    """

    def __init__(self, model: LoadedModel, settings: EngineSettings | None = None):
        self.model, self.settings = model, settings or EngineSettings()
        self.settings.check()
        config, size = model.config, self.settings.page_size
        kinds = layer_kinds(config.pattern, config.num_layers, config.last_layer_full)
        pages = -(-self.settings.latent_tokens // size) if FULL in kinds else 0
        sequences, saved = self.settings.max_sequences, self.settings.prefix_slots
        try:
            self._runner = ModelRunner(model.chunk, sequences + saved, pages, size)
        except RuntimeError as error:
            text = str(error)
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in text:
                raise
            raise ConfigError(
                f"the caches of max_sequences={sequences}, prefix_slots={saved} and cache_tokens="
                f"{self.settings.latent_tokens} do not fit into memory: lower them ({error})"
            ) from error
        self._pool = PagePool(pages, size)
        self._paged = pages > 0
        self._rows = list(range(sequences - 1, -1, -1))
        self._prefixes = PrefixCache(
            list(range(sequences, sequences + saved)), self._pool, shortest=size
        )
        self._waiting: deque[ActiveRequest] = deque()
        self._running: list[ActiveRequest] = []
        self._cancelled: list[int] = []
        self._chooser = TokenChooser(model)
        self._next_request = self._prompt_tokens = self._generated = 0
        self._hits = self._hit_tokens = self._steps = 0

    # ------------------------------------------------------------------ whole answers

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Answers all prompts; `params` for all of them, or one for each.

        Raises:
            ConfigError: a request that can never be answered, or an engine that is busy with
                others, before any work.
        """
        self._check_idle()
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        for prompt, one in zip(prompts, params, strict=True):
            self.check(prompt, one)
        answers: dict[int, Completion] = {}
        for prompt, one in zip(prompts, params, strict=True):
            answers[self.submit(prompt, one)] = Completion(list(prompt))
        try:
            while any(answer.finish_reason is None for answer in answers.values()):
                for update in self.step():
                    answers[update.request].add(update)
        except BaseException:
            self._cancel_all()
            raise
        return list(answers.values())

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Update]:
        """Answers one prompt as it goes; closing the iterator early cancels the request.

        Raises:
            ConfigError: a request that can never be answered, or an engine that is busy with
                others: for several at once there are `submit` and `step`.
        """
        self._check_idle()
        self.submit(prompt, params)
        try:
            while self.busy:
                yield from self.step()
        finally:
            self._cancel_all()

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[TokenLogprob | None]]:
        """Log-probability of every token given those before it; the first one's is None."""
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        return [answer.prompt_logprobs or [] for answer in self.generate(sequences, params)]

    def _check_idle(self) -> None:
        if self.busy:
            raise ConfigError(
                "the engine is busy with other requests, whose answers would be lost: end the "
                "stream that is open, or use submit and step for several at once"
            )

    def _cancel_all(self) -> None:
        """Ends everything, and forgets it."""
        for sequence in [*self._waiting, *self._running]:
            self.cancel(sequence.request)
        self._cancelled.clear()

    # ------------------------------------------------------------------ step by step

    def check(self, prompt: Sequence[int], params: SamplingParams) -> None:
        """Raises ConfigError for a request that can never be answered."""
        params.check()
        vocabulary = self.model.config.vocab_size
        if len(prompt) == 0:
            raise ConfigError("the prompt is empty: give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ConfigError(
                f"the prompt holds the token {min(prompt)} or {max(prompt)}, but the model has "
                f"those from 0 to {vocabulary - 1}"
            )
        total = len(prompt) + params.max_tokens
        if total > self.settings.max_context:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens and max_tokens={params.max_tokens} make {total},"
                f" more than max_context={self.settings.max_context}: shorten the prompt, lower "
                "max_tokens, or start the engine with a larger max_context"
            )
        if self._paged and self._pool.needed(total) > self._pool.total:
            raise ConfigError(
                f"a prompt of {len(prompt)} tokens and max_tokens={params.max_tokens} make {total},"
                f" more than cache_tokens={self._pool.total * self._pool.size} can hold"
            )

    def submit(self, prompt: Sequence[int], params: SamplingParams) -> int:
        """Queues a request and returns its number.

        Raises:
            ConfigError: it can never be answered.
        """
        self.check(prompt, params)
        generator = torch.Generator()
        if params.seed is None:
            generator.seed()
        else:
            generator.manual_seed(params.seed)
        request = self._next_request
        self._next_request += 1
        ids = np.asarray(prompt, dtype=np.int64)
        text = TextStream(self.model.tokenizer, params.stop, ids[-TEXT_CONTEXT:].tolist())
        self._waiting.append(ActiveRequest(request, ids, params, ids.tolist(), text, generator))
        return request

    def cancel(self, request: int) -> None:
        """Ends a request; the next step says so. One that is over already is left alone."""
        for sequence in self._waiting:
            if sequence.request == request:
                self._waiting.remove(sequence)
                self._cancelled.append(request)
                return
        for sequence in self._running:
            if sequence.request == request:
                self._leave(sequence)
                self._cancelled.append(request)
                return

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._running or self._cancelled)

    @torch.no_grad()
    def step(self) -> list[Update]:
        """One forward pass over what is due; what it brought, request by request.

        Raises:
            MegakdaError: the model's logits are not finite. All running requests are cancelled, as
                after any other exception.
        """
        updates = [Update(request, finish_reason="cancelled") for request in self._cancelled]
        self._cancelled.clear()
        self._admit()
        batch = self._batch()
        if not batch:
            return updates
        try:
            chosen = self._compute(batch)
        except BaseException:
            # Some states may be a step ahead of what is known of them: none of it can go on.
            for sequence in list(self._running):
                self.cancel(sequence.request)
            raise
        self._steps += 1
        for (sequence, count), choice in zip(batch, chosen, strict=True):
            self._advance(sequence, count)
            update = self._take(sequence, choice)
            if update is not None:
                updates.append(update)
        return updates

    def _compute(self, batch: Batch) -> list[Chosen]:
        """The forward pass over a batch, and what comes of it."""
        tokens: list[int] = []
        wanted: list[int] = []
        for sequence, count in batch:
            wanted += [len(tokens) + i for i in sequence.wanted(count)]
            tokens += sequence.tokens[sequence.computed : sequence.computed + count]
        new = [NewTokens(s.row, s.computed, count, s.pages) for s, count in batch]
        return self._chooser.choose(batch, self._runner.forward(new, tokens, wanted))

    def stats(self) -> EngineStats:
        """Counters for dashboards."""
        size = self._pool.size
        return EngineStats(
            waiting=len(self._waiting),
            running=len(self._running),
            free_sequences=len(self._rows),
            max_sequences=self.settings.max_sequences,
            cache_tokens_used=(self._pool.total - self._pool.free) * size,
            cache_tokens=self._pool.total * size,
            prefixes=len(self._prefixes),
            prompt_tokens=self._prompt_tokens,
            generated_tokens=self._generated,
            prefix_hits=self._hits,
            prefix_hit_tokens=self._hit_tokens,
            steps=self._steps,
        )

    def cache_bytes(self) -> tuple[int, int]:
        """Bytes of the recurrent states and of the latents on this rank."""
        return self._runner.bytes()

    def clear_prefixes(self) -> None:
        """Forgets saved prefixes; needed after a change of the model's weights."""
        self._prefixes.clear()
        for sequence in self._running:  # their states began with the old weights
            sequence.places.clear()

    # ------------------------------------------------------------------ the schedule

    def _admit(self) -> None:
        """Gives rows and pages to waiting requests, first come, first served."""
        while self._waiting and self._rows:
            sequence = self._waiting[0]
            prefix = self._prefixes.find(sequence.prompt) if sequence.uses_prefixes else None
            if sequence.uses_prefixes and self._soon_saved(sequence.prompt, prefix):
                return
            shared = 0 if prefix is None else len(prefix.tokens) // self._pool.size
            total = len(sequence.prompt) + sequence.params.max_tokens
            needed = self._pool.needed(total) - shared if self._paged else 0
            if self._pool.free + self._prefixes.reclaimable(keep=prefix) < needed:
                if prefix is None or self._running:
                    return
                self._prefixes.clear()  # alone with a prefix that leaves no room
                continue
            while self._pool.free < needed:
                self._prefixes.evict(keep=prefix)
            self._waiting.popleft()
            self._enter(sequence, prefix, needed)

    def _soon_saved(self, prompt: np.ndarray, found: Prefix | None) -> bool:
        """Whether a running sequence is about to save a longer prefix than the one found."""
        known = 0 if found is None else len(found.tokens)
        return any(
            known < place < len(prompt) and np.array_equal(other.prompt[:place], prompt[:place])
            for other in self._running
            for place in other.places
        )

    def _enter(self, sequence: ActiveRequest, prefix: Prefix | None, pages: int) -> None:
        sequence.row = self._rows.pop()
        if prefix is None:
            self._runner.clear(sequence.row)
        else:
            self._runner.copy_row(prefix.row, sequence.row)
            sequence.computed = sequence.cached = len(prefix.tokens)
            self._hits += 1
            self._hit_tokens += sequence.computed
        own = self._pool.take(pages)
        if prefix is not None and self._paged:
            full, rest = divmod(sequence.computed, self._pool.size)
            self._pool.share(prefix.pages[:full])
            if rest:  # both go on writing to their last page
                self._runner.copy_page(prefix.pages[full], own[0])
            own = [*prefix.pages[:full], *own]
        sequence.pages = own
        if sequence.uses_prefixes:
            places = self._prefixes.places(sequence.prompt)
            sequence.places = [place for place in places if place > sequence.computed]
        self._running.append(sequence)

    def _leave(self, sequence: ActiveRequest) -> None:
        self._running.remove(sequence)
        self._rows.append(sequence.row)
        self._pool.give_back(sequence.pages)

    def _batch(self) -> Batch:
        """What to compute in this step, single tokens first."""
        answering = [s for s in self._running if len(s.tokens) - s.computed == 1]
        batch = [(s, 1) for s in answering]
        room = self.settings.prefill_chunk
        for sequence in self._running:
            if room and len(sequence.tokens) - sequence.computed > 1:
                count = sequence.due(room)
                room -= count
                batch.append((sequence, count))
        return sorted(batch, key=lambda entry: entry[1] > 1)

    def _advance(self, sequence: ActiveRequest, count: int) -> None:
        """The caches hold `count` tokens more; saves the prefix where that is due."""
        self._prompt_tokens += max(0, min(count, len(sequence.prompt) - sequence.computed))
        sequence.computed += count
        if sequence.computed in sequence.places:
            sequence.places.remove(sequence.computed)
            prefix = self._prefixes.save(sequence.prompt[: sequence.computed], sequence.pages)
            if prefix is not None:
                self._runner.copy_row(sequence.row, prefix.row)

    # ------------------------------------------------------------------ the tokens

    def _take(self, sequence: ActiveRequest, choice: Chosen) -> Update | None:
        """Appends the chosen token and ends the request where it is over."""
        params = sequence.params
        sequence.prompt_logprobs += choice.prompt
        if choice.token is None and sequence.computed < len(sequence.prompt):
            return None
        text, reason = "", None
        tokens: tuple[int, ...] = ()
        if choice.token is None:
            reason = "length"
        else:
            tokens = (choice.token,)
            sequence.tokens.append(choice.token)
            self._generated += 1
            text, reason = self._ending(sequence, choice.token)
        first, sequence.told = not sequence.told, True
        prompt: tuple[TokenLogprob | None, ...] | None = None
        if first and params.prompt_logprobs is not None:
            prompt = (None, *sequence.prompt_logprobs)
        if reason is not None:
            self._leave(sequence)
        logprobs = () if choice.logprob is None else (choice.logprob,)
        cached = sequence.cached if first else 0
        return Update(sequence.request, tokens, text, logprobs, prompt, cached, reason)

    def _ending(self, sequence: ActiveRequest, token: int) -> tuple[str, str | None]:
        """New text of `token`, and why the answer ends with it, if it does."""
        params = sequence.params
        ends = token in params.stop_token_ids
        ends |= token in self.model.end_tokens and not params.ignore_eos
        text = "" if ends else sequence.text.push(token)
        reason = None
        if ends or sequence.text.stopped:
            reason = "stop"
        elif sequence.answered >= params.max_tokens:
            reason = "length"
        if reason is not None:
            text += sequence.text.finish()
            if sequence.text.stopped:
                reason = "stop"
        return text, reason
