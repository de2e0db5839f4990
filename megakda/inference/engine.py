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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state

from megakda.config.pattern import FULL, layer_kinds
from megakda.errors import ConfigError, MegakdaError
from megakda.inference.loading import LoadedModel
from megakda.inference.pages import PagePool
from megakda.inference.prefix import Prefix, PrefixCache
from megakda.inference.request import Completion, SamplingParams, TokenLogprob, Update
from megakda.inference.runner import ModelRunner
from megakda.inference.sampling import choose_tokens, token_logprobs
from megakda.inference.text import TextStream
from megakda.layers.cached import NewTokens

DEFAULT_CACHE_TOKENS = 1 << 20


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


@dataclass
class _Sequence:
    """A request on its way."""

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


@dataclass(frozen=True)
class _Chosen:
    """What a forward pass says about one sequence; None where it has nothing to say."""

    token: int | None
    logprob: TokenLogprob | None
    prompt: list[TokenLogprob]


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
        except RuntimeError as error:  # torch.OutOfMemoryError is one
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
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._cancelled: list[int] = []
        self._sampler, self._is_sampler = _find_sampler(model)
        self._next_request = self._prompt_tokens = self._generated = 0
        self._hits = self._hit_tokens = self._steps = 0

    # ------------------------------------------------------------------ whole answers

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Answers all prompts; `params` for all of them, or one for each.

        Raises:
            ConfigError: a request that can never be answered, before any work.
        """
        if isinstance(params, SamplingParams):
            params = [params] * len(prompts)
        for prompt, one in zip(prompts, params, strict=True):
            self.check(prompt, one)
        answers: dict[int, Completion] = {}
        for prompt, one in zip(prompts, params, strict=True):
            answers[self.submit(prompt, one)] = Completion(list(prompt))
        while any(answer.finish_reason is None for answer in answers.values()):
            for update in self.step():
                if update.request in answers:
                    answers[update.request].add(update)
        return list(answers.values())

    def stream(self, prompt: Sequence[int], params: SamplingParams) -> Iterator[Update]:
        """Answers one prompt as it goes; closing the iterator early cancels the request."""
        request = self.submit(prompt, params)
        ended = False
        try:
            while not ended:
                for update in self.step():
                    if update.request == request:
                        ended = update.finish_reason is not None
                        yield update
        finally:
            if not ended:
                self.cancel(request)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[TokenLogprob | None]]:
        """Log-probability of every token given those before it; the first one's is None."""
        params = SamplingParams(max_tokens=0, prompt_logprobs=0)
        return [answer.prompt_logprobs or [] for answer in self.generate(sequences, params)]

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
        text = TextStream(self.model.tokenizer, params.stop)
        self._waiting.append(_Sequence(request, ids, params, ids.tolist(), text, generator))
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
            MegakdaError: the model's logits are not finite.
        """
        updates = [Update(request, finish_reason="cancelled") for request in self._cancelled]
        self._cancelled.clear()
        self._admit()
        batch = self._batch()
        if not batch:
            return updates
        logits = self._runner.forward(
            [NewTokens(s.row, s.computed, count, s.pages) for s, count in batch],
            [t for s, count in batch for t in s.tokens[s.computed : s.computed + count]],
            _wanted(batch),
        )
        chosen = self._told(batch, logits)
        self._steps += 1
        for (sequence, count), choice in zip(batch, chosen, strict=True):
            self._advance(sequence, count)
            update = self._take(sequence, choice)
            if update is not None:
                updates.append(update)
        return updates

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
            while self._pool.free < needed and self._prefixes.evict(keep=prefix):
                pass
            if self._pool.free < needed:
                if prefix is None or self._running:
                    return
                self._prefixes.clear()  # alone with a prefix that leaves no room
                continue
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

    def _enter(self, sequence: _Sequence, prefix: Prefix | None, pages: int) -> None:
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

    def _leave(self, sequence: _Sequence) -> None:
        self._running.remove(sequence)
        self._rows.append(sequence.row)
        self._pool.give_back(sequence.pages)

    def _batch(self) -> list[tuple[_Sequence, int]]:
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

    def _advance(self, sequence: _Sequence, count: int) -> None:
        """The caches hold `count` tokens more; saves the prefix where that is due."""
        self._prompt_tokens += max(0, min(count, len(sequence.prompt) - sequence.computed))
        sequence.computed += count
        if sequence.computed in sequence.places:
            sequence.places.remove(sequence.computed)
            prefix = self._prefixes.save(sequence.prompt[: sequence.computed], sequence.pages)
            if prefix is not None:
                self._runner.copy_row(sequence.row, prefix.row)

    # ------------------------------------------------------------------ the tokens

    def _told(
        self, batch: list[tuple[_Sequence, int]], logits: torch.Tensor | None
    ) -> list[_Chosen]:
        """The choice of the rank that makes it, on every rank."""
        chosen: list[Any] = [None]
        if self._is_sampler:
            assert logits is not None
            chosen = [self._choose(batch, logits)]
        if torch.distributed.get_world_size() > 1:
            torch.distributed.broadcast_object_list(chosen, src=self._sampler)
        if isinstance(chosen[0], str):
            raise MegakdaError(chosen[0])
        return chosen[0]

    def _choose(
        self, batch: list[tuple[_Sequence, int]], logits: torch.Tensor
    ) -> list[_Chosen] | str:
        """From the rows of logits that `_wanted` asked for; a text says what is wrong."""
        if not bool(logits.isfinite().all()):
            return "the model's logits are not finite: its weights are damaged or have diverged"
        receiving: list[tuple[_Sequence, int]] = []  # with their rows of logits
        asked: list[tuple[int, int, int]] = []  # row, token and alternatives of a log-probability
        row = 0
        for sequence, count in batch:
            wanted = len(_wanted_of(sequence, count))
            last = sequence.computed + count == len(sequence.tokens)
            if last and sequence.params.max_tokens:
                receiving.append((sequence, row + wanted - 1))
            if sequence.params.prompt_logprobs is not None:
                first = sequence.computed + 1
                targets = sequence.prompt[first : first + wanted].tolist()
                top = sequence.params.prompt_logprobs
                asked += [(row + i, target, top) for i, target in enumerate(targets)]
            row += wanted
        prompts = len(asked)
        tokens = self._draw([s for s, _ in receiving], logits[[at for _, at in receiving]])
        for (sequence, at), token in zip(receiving, tokens, strict=True):
            if sequence.params.logprobs is not None:
                asked.append((at, token, sequence.params.logprobs))
        rows, ids, tops = ([entry[i] for entry in asked] for i in range(3))
        found = token_logprobs(logits[rows], ids, tops)

        scored, chosen_scores = iter(found[:prompts]), iter(found[prompts:])
        drawn = dict(zip((id(s) for s, _ in receiving), tokens, strict=True))
        chosen = []
        for sequence, count in batch:
            params, prompt = sequence.params, []
            if params.prompt_logprobs is not None:
                left = len(sequence.prompt) - 1 - sequence.computed
                prompt = [next(scored) for _ in range(min(count, max(0, left)))]
            new = drawn.get(id(sequence))
            has_score = new is not None and params.logprobs is not None
            chosen.append(_Chosen(new, next(chosen_scores) if has_score else None, prompt))
        return chosen

    def _draw(self, sequences: list[_Sequence], logits: torch.Tensor) -> list[int]:
        """The next token of each sequence from its row of logits."""
        if not sequences:
            return []
        seen = [
            torch.tensor(sorted(set(s.tokens)), device=logits.device)
            if s.params.repetition_penalty != 1
            else None
            for s in sequences
        ]
        uniforms = [
            float(torch.rand((), generator=s.generator, dtype=torch.float64)) for s in sequences
        ]
        vocabulary = min(self.model.tokenizer.vocab_size, logits.shape[1])
        return choose_tokens(logits, [s.params for s in sequences], uniforms, seen, vocabulary)

    def _take(self, sequence: _Sequence, choice: _Chosen) -> Update | None:
        """Appends the chosen token and ends the request where it is over."""
        params = sequence.params
        sequence.prompt_logprobs += choice.prompt
        if choice.token is None and sequence.computed < len(sequence.prompt):
            return None
        if choice.token is None and params.max_tokens:
            return None  # the state was saved one token before the prompt's end
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

    def _ending(self, sequence: _Sequence, token: int) -> tuple[str, str | None]:
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


def _wanted_of(sequence: _Sequence, count: int) -> list[int]:
    """Which of a sequence's new tokens need logits: for the prompt's scores, and the last one."""
    last = sequence.computed + count == len(sequence.tokens)
    if sequence.params.prompt_logprobs is not None and sequence.computed < len(sequence.prompt):
        return list(range(count))
    return [count - 1] if last else []


def _wanted(batch: list[tuple[_Sequence, int]]) -> list[int]:
    """The same over the flat batch."""
    wanted, start = [], 0
    for sequence, count in batch:
        wanted += [start + i for i in _wanted_of(sequence, count)]
        start += count
    return wanted


def _find_sampler(model: LoadedModel) -> tuple[int, bool]:
    """The rank that chooses tokens, and whether it is this one: first with the model's logits."""
    mine = model.chunk.post_process and parallel_state.get_tensor_model_parallel_rank() == 0
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    sampler = everyone.index(True)
    return sampler, sampler == torch.distributed.get_rank()
