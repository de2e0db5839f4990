"""The next tokens and their log-probabilities: chosen on one rank, told to the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from megakda.errors import MegakdaError
from megakda.inference.active import ActiveRequest, Batch
from megakda.inference.loading import LoadedModel
from megakda.inference.request import TokenLogprob
from megakda.inference.sampling import choose_tokens, token_logprobs


@dataclass(frozen=True)
class Chosen:
    """What a forward pass says about one sequence; None where it has nothing to say."""

    token: int | None
    logprob: TokenLogprob | None
    prompt: list[TokenLogprob]


class TokenChooser:
    """Chooses tokens of a model; making one, and `choose`, are collective."""

    def __init__(self, model: LoadedModel):
        self.vocabulary = min(model.tokenizer.vocab_size, model.config.vocab_size)
        # The first rank that has the whole model's logits.
        mine = model.chunk.post_process and parallel_state.get_tensor_model_parallel_rank() == 0
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        self._rank = everyone.index(True)
        self._is_here = self._rank == torch.distributed.get_rank()

    def choose(self, batch: Batch, logits: torch.Tensor | None) -> list[Chosen]:
        """What each sequence gets, the same on every rank.

        Args:
            logits: of the tokens that `ActiveRequest.wanted` names, on the rank that has them.

        Raises:
            MegakdaError: on every rank, where the choice failed on the one that makes it.
        """
        chosen: list[Any] = [None]
        if self._is_here:
            assert logits is not None
            try:
                chosen = [self._choose(batch, logits)]
            except Exception as error:  # the others wait for it, and would for long
                chosen = [f"choosing tokens failed: {type(error).__name__}: {error}"]
        if torch.distributed.get_world_size() > 1:
            torch.distributed.broadcast_object_list(chosen, src=self._rank)
        if isinstance(chosen[0], str):
            raise MegakdaError(chosen[0])
        return chosen[0]

    def _choose(self, batch: Batch, logits: torch.Tensor) -> list[Chosen] | str:
        """From the rows of logits that `wanted` asked for; a text says what is wrong."""
        if not bool(logits.isfinite().all()):
            return "the model's logits are not finite: its weights are damaged or have diverged"
        receiving: list[tuple[ActiveRequest, int]] = []  # with their rows of logits
        asked: list[tuple[int, int, int]] = []  # row, token and alternatives of a log-probability
        row = 0
        for sequence, count in batch:
            wanted = len(sequence.wanted(count))
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
            chosen.append(Chosen(new, next(chosen_scores) if has_score else None, prompt))
        return chosen

    def _draw(self, sequences: list[ActiveRequest], logits: torch.Tensor) -> list[int]:
        """The next token of each sequence from its row of logits."""
        if not sequences:
            return []
        seen = [
            torch.tensor([t for t in set(s.tokens) if t < self.vocabulary], device=logits.device)
            if s.params.repetition_penalty != 1
            else None
            for s in sequences
        ]
        uniforms = [
            float(torch.rand((), generator=s.generator, dtype=torch.float64)) for s in sequences
        ]
        params = [s.params for s in sequences]
        return choose_tokens(logits, params, uniforms, seen, self.vocabulary)
