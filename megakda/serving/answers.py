"""What clients get: the engine's updates as OpenAI's objects, whole or in pieces.

A whole answer is a stream with one piece, so both take the same way.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megakda.data.tokenizer import Tokenizer
from megakda.inference.request import Completion, TokenLogprob, Update
from megakda.serving.protocol import ChatRequest, CompletionRequest

LOWEST_LOGPROB = -9999.0
"""In the place of -inf, which JSON does not have; OpenAI's number for it."""


@dataclass(frozen=True)
class Prompt:
    """A prompt's tokens, and the text to echo."""

    tokens: list[int]
    text: str = ""


class TokenTexts:
    """The text of single tokens, for lists of log-probabilities.

    A token that is no whole text of its own (a part of a character, a special token) is shown as
    "token_id:ID".
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}  # at most one for each token of the vocabulary

    def __call__(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._tokenizer.decode([token])
            if not text or "\ufffd" in text:
                text = f"token_id:{token}"
            self._texts[token] = text
        return text


class _Offsets:
    """Where in the text each token begins; the parts of one character share their beginning."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._offset = 0
        self._pending: list[int] = []

    def next(self, token: int) -> int:
        offset = self._offset
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        # A character has at most four bytes, and a token at least one.
        if not text.endswith("\ufffd") or len(self._pending) >= 4:
            self._offset += len(text)
            self._pending = []
        return offset


class Answer:
    """The answer to one HTTP request: `choice` for each piece of each choice, then a body.

    Choice c belongs to prompt c // n.
    """

    kind: str  # `object` of a whole answer
    chunk_kind: str  # and of a piece
    prefix: str  # of its id

    def __init__(
        self,
        model: str,
        request: CompletionRequest | ChatRequest,
        prompts: Sequence[Prompt],
        tokenizer: Tokenizer,
        texts: TokenTexts,
    ) -> None:
        self.request = request
        self.prompts = prompts
        self.texts = texts
        self.stream = bool(request.stream)
        self._generated = 0
        self._cached = [0] * len(prompts)
        self._started: set[int] = set()
        self._offsets = [_Offsets(tokenizer) for _ in range(len(prompts) * request.choices)]
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.chunk_kind if self.stream else self.kind,
            "created": int(time.time()),
            "model": model,
        }

    def prompt(self, index: int) -> Prompt:
        return self.prompts[index // self.request.choices]

    def choice(self, index: int, update: Update) -> dict[str, Any] | None:
        """What `update` adds to a choice; None where it is nothing to speak of."""
        first = index not in self._started
        self._started.add(index)
        self._generated += len(update.tokens)
        prompt = index // self.request.choices
        self._cached[prompt] = max(self._cached[prompt], update.cached_tokens)
        choice = {
            "index": index,
            **self._text(index, update, first),
            "logprobs": self._logprobs(index, update),
            "finish_reason": update.finish_reason,
        }
        wordless = not update.text and choice["logprobs"] is None and not first
        if wordless and update.finish_reason is None and not self.request.return_token_ids:
            return None
        if self.request.return_token_ids:
            choice["token_ids"] = list(update.tokens)
        return choice

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        """The body of one piece."""
        usage = {"usage": None} if self.request.include_usage else {}
        return {**self._head, "choices": [choice], **usage}

    def usage_chunk(self) -> dict[str, Any]:
        """The last piece of a stream with usage."""
        return {**self._head, "choices": [], "usage": self._usage()}

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The body of an answer in one piece."""
        choices = [
            self.choice(
                index,
                Update(
                    request=index,
                    tokens=tuple(completion.tokens),
                    text=completion.text,
                    logprobs=tuple(completion.logprobs),
                    prompt_logprobs=tuple(completion.prompt_logprobs or ()) or None,
                    cached_tokens=completion.cached_tokens,
                    finish_reason=completion.finish_reason,
                ),
            )
            for index, completion in enumerate(completions)
        ]
        return {**self._head, "choices": choices, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        """Tokens; a prompt counts once, however many choices it has."""
        prompt = sum(len(prompt.tokens) for prompt in self.prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self._generated,
            "total_tokens": prompt + self._generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached)},
        }

    def _text(self, index: int, update: Update, first: bool) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, index: int, update: Update) -> dict[str, Any] | None:
        raise NotImplementedError


class CompletionAnswer(Answer):
    """Of POST /v1/completions."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"
    request: CompletionRequest

    def _text(self, index: int, update: Update, first: bool) -> dict[str, Any]:
        prompt = self.prompt(index)
        text = prompt.text if first and self.request.echo else ""
        ids = {"prompt_token_ids": prompt.tokens} if self.request.return_token_ids and first else {}
        return {"text": text + update.text, **ids}

    def _logprobs(self, index: int, update: Update) -> dict[str, Any] | None:
        """Lists with an entry per token; with echo the prompt's tokens come first."""
        if self.request.logprobs is None:
            return None
        entries: list[tuple[int, TokenLogprob | None]] = []
        if self.request.echo and update.prompt_logprobs is not None:
            entries += zip(self.prompt(index).tokens, update.prompt_logprobs, strict=True)
        entries += [(entry.token, entry) for entry in update.logprobs]
        return {
            "tokens": [self.texts(token) for token, _ in entries],
            "token_logprobs": [entry and _number(entry.logprob) for _, entry in entries],
            "top_logprobs": [entry and self._top(entry) for _, entry in entries],
            "text_offset": [self._offsets[index].next(token) for token, _ in entries],
        }

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        """The likeliest tokens, and the chosen one also where it is none of them."""
        both = [*entry.top, (entry.token, entry.logprob)]
        return {self.texts(token): _number(logprob) for token, logprob in both}


class ChatAnswer(Answer):
    """Of POST /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"
    request: ChatRequest

    def chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        ids = choice.pop("prompt_token_ids", None)
        return {**super().chunk(choice), **({} if ids is None else {"prompt_token_ids": ids})}

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        body = super().whole(completions)
        ids = [choice.pop("prompt_token_ids", None) for choice in body["choices"]]
        return {**body, **({} if ids[0] is None else {"prompt_token_ids": ids[0]})}

    def _text(self, index: int, update: Update, first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        ids = {}
        if self.request.return_token_ids and first:  # moved to the body by `chunk` and `whole`
            ids = {"prompt_token_ids": self.prompt(index).tokens}
        place = "delta" if self.stream else "message"
        return {place: {**role, "content": update.text}, **ids}

    def _logprobs(self, index: int, update: Update) -> dict[str, Any] | None:
        if not self.request.logprobs:
            return None
        return {
            "content": [
                {
                    **self._token(entry.token, entry.logprob),
                    "top_logprobs": [self._token(*rival) for rival in entry.top],
                }
                for entry in update.logprobs
            ]
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.texts(token)
        whole = not text.startswith("token_id:")
        return {
            "token": text,
            "logprob": _number(logprob),
            "bytes": list(text.encode()) if whole else None,
        }


def _number(logprob: float) -> float:
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
