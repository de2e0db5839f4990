"""What clients may send: OpenAI's request bodies, checked field by field.

Everything that is not understood is refused with the field's name. Nothing is ignored in silence,
but for `user`, which has no effect on the answer at OpenAI either.
"""

from __future__ import annotations

import json
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from megakda.errors import ConfigError
from megakda.inference.request import MAX_LOGPROBS, SamplingParams

MAX_STOPS = 16
MAX_STOP_TOKENS = 64
SEEDS = 2**63
DEFAULT_MAX_TOKENS = 16
"""Of completions, as at OpenAI; a chat completion may use what is left of the context."""


class ApiError(Exception):
    """An answer that is an error, in OpenAI's format."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.error = {"message": message, "type": type, "param": param, "code": code}

    @property
    def body(self) -> dict[str, Any]:
        return {"error": self.error}


def invalid(message: str, param: str | None, code: str = "invalid_value") -> ApiError:
    """A 400 about one field."""
    return ApiError(400, message, param=param, code=code)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        max_context: tokens of prompt and answer together.
        vocab_size: of the model; token ids are below it.
        max_choices: answers to each prompt (`n`).
        max_requests: answers to all prompts of one HTTP request.
    """

    max_context: int
    vocab_size: int
    max_choices: int = 16
    max_requests: int = 80


# ------------------------------------------------------------------ fields


def _is_int(value: object) -> bool:
    return type(value) is int  # True is an int too, but not here


def _prompts(value: Any) -> list[str | list[int]]:
    """Four forms of prompt as one: a list of texts or of token lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(map(_is_int, value)):
            return [value]
        if all(isinstance(x, str) for x in value):
            return value
        if all(isinstance(x, list) and all(map(_is_int, x)) for x in value):
            return value
    raise PydanticCustomError(
        "form", "expected a string, a list of strings, a list of token ids or a list of those"
    )


def _stops(value: Any) -> list[str] | None:
    if value is None or isinstance(value, str):
        return None if value is None else [value]
    if isinstance(value, list) and all(isinstance(x, str) for x in value):
        return value
    raise PydanticCustomError("form", "expected a string or a list of strings")


def _content(value: Any) -> str:
    """A message's text, given as a string or as parts."""
    if isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [None]
    texts = [
        part["text"]
        for part in parts
        if isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"
    ]
    if len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise PydanticCustomError(
            "form", 'expected a string or a list of {{"type": "text", "text": ...}}'
        )
    return "".join(texts)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    include_usage: bool | None = None


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_content)]
    name: str | None = None
    # What OpenAI's client adds, as null, to an answer that is sent back as part of a conversation.
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None


class _Request(_Strict):
    """What both kinds of request have in common. null is the same as leaving a field out."""

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_stops)] = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    # OpenAI's, here only at the value that changes nothing:
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    # not OpenAI's:
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None

    @property
    def choices(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def check(self, limits: Limits) -> None:
        """Raises ApiError for what is understood, but not possible here."""
        for name in ("presence_penalty", "frequency_penalty"):
            if getattr(self, name):
                raise invalid(
                    f"{name}={getattr(self, name)} is not supported, only 0: use "
                    "repetition_penalty (1: none) instead",
                    name,
                )
        if self.logit_bias:
            raise invalid("logit_bias is not supported: leave it out", "logit_bias")
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only allowed with stream=true", "stream_options")
        if not 1 <= self.choices <= limits.max_choices:
            raise invalid(f"n={shown(self.n)} must be in 1..{limits.max_choices}", "n")
        if self.stop is not None and len(self.stop) > MAX_STOPS:
            raise invalid(f"stop has {len(self.stop)} texts; at most {MAX_STOPS}", "stop")
        tokens = self.stop_token_ids or []
        if len(tokens) > MAX_STOP_TOKENS:
            raise invalid(
                f"stop_token_ids has {len(tokens)} ids; at most {MAX_STOP_TOKENS}",
                "stop_token_ids",
            )
        for token in tokens:
            _check_token(token, "stop_token_ids", limits)
        if self.seed is not None and not 0 <= self.seed <= SEEDS - self.choices:
            raise invalid(f"seed={shown(self.seed)} must be in 0..2^63-n", "seed")

    def sampling(
        self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> list[SamplingParams]:
        """One for each of the n choices: choice i draws with seed + i.

        Raises:
            ApiError: a value out of its range.
        """
        given = {
            name: value
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if (value := getattr(self, name)) is not None
        }
        # Without a seed still one number for all ranks, and all choices with seeds of their own.
        seed = self.seed if self.seed is not None else secrets.randbelow(SEEDS - self.choices)
        params = [
            SamplingParams(
                max_tokens=max_tokens,
                stop=tuple(self.stop or ()),
                stop_token_ids=tuple(self.stop_token_ids or ()),
                ignore_eos=bool(self.ignore_eos),
                seed=seed + choice,
                logprobs=logprobs,
                prompt_logprobs=prompt_logprobs,
                **given,
            )
            for choice in range(self.choices)
        ]
        try:
            params[0].check()
        except ConfigError as error:
            name = str(error).partition("=")[0]
            text = str(error)
            if hasattr(params[0], name):
                value = getattr(params[0], name)
                text = text.replace(repr(value), shown(value))
            raise invalid(text, name if name in type(self).model_fields else None) from error
        return params


class CompletionRequest(_Request):
    """The body of POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    suffix: str | None = None

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.suffix:
            raise invalid(
                "suffix is not supported: the model continues text, it does not fill gaps", "suffix"
            )
        if self.best_of is not None and self.best_of != self.choices:
            raise invalid(
                f"best_of={shown(self.best_of)} is not supported, unless it is n={self.choices}",
                "best_of",
            )
        _check_logprobs("logprobs", self.logprobs)
        answers = len(self.prompt) * self.choices
        if answers > limits.max_requests:
            raise invalid(
                f"{len(self.prompt)} prompts with n={self.choices} are {answers} answers; this "
                f"server takes at most {limits.max_requests} at once: send fewer prompts",
                "prompt",
            )


class ChatRequest(_Request):
    """The body of POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if not self.messages:
            raise invalid("messages is empty: give at least one message", "messages")
        if self.max_completion_tokens is not None and self.max_tokens is not None:
            raise invalid(
                "max_tokens and max_completion_tokens are the same: give one of them", "max_tokens"
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs is only allowed with logprobs=true", "top_logprobs")
        _check_logprobs("top_logprobs", self.top_logprobs)

    @property
    def alternatives(self) -> int | None:
        """With each token's log-probability; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


# ------------------------------------------------------------------ rules


def _check_logprobs(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= MAX_LOGPROBS:
        raise invalid(f"{name}={shown(value)} must be in 0..{MAX_LOGPROBS}", name)


def _check_token(token: int, param: str, limits: Limits) -> None:
    if not 0 <= token < limits.vocab_size:
        raise invalid(
            f"{param} has the token id {shown(token)}; ids are in 0..{limits.vocab_size - 1}",
            param,
        )


def check_prompt(tokens: list[int], param: str, limits: Limits) -> None:
    """Raises ApiError for a prompt that is empty, or has ids that the model does not know."""
    if not tokens:
        raise invalid(f"{param} has no tokens: give at least one character", param)
    for token in tokens:
        _check_token(token, param, limits)


def fit_context(
    longest: int, max_tokens: int | None, default: int | None, param: str, limits: Limits
) -> int:
    """Tokens that an answer may have.

    Args:
        longest: tokens of the longest prompt.
        default: for max_tokens=None; None: all that is left of the context.

    Raises:
        ApiError: prompt and answer do not fit into the context.
    """
    left = limits.max_context - longest
    wanted = min(left, default) if default is not None else left
    if max_tokens is not None:
        if max_tokens < 0:
            raise invalid(f"max_tokens={shown(max_tokens)} must be at least 0", "max_tokens")
        wanted = max_tokens
    if wanted > left or (wanted < 1 and max_tokens != 0):
        asked = f" and {shown(wanted)} for the answer" if wanted > 0 else ""
        raise invalid(
            f"This server's context is {limits.max_context} tokens, but {longest} in the prompt"
            f"{asked} were asked for: shorten the prompt or max_tokens",
            param,
            "context_length_exceeded",
        )
    return wanted


# ------------------------------------------------------------------ reading

R = TypeVar("R", bound=_Request)

_TYPES = {
    "string_type": "a string",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
}


def read(kind: type[R], body: bytes) -> R:
    """Reads a request body.

    Raises:
        ApiError: no JSON, or a field that is unknown, missing, given twice or of a wrong type.
    """
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from error
    json.loads(body, object_pairs_hook=_refuse_duplicates)  # pydantic takes the last of them
    return asked


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise invalid(
                f"The body of the request has {shown(key)} twice in one object: give it once",
                key if len(key) <= 80 else None,
                "duplicate_parameter",
            )
        seen.add(key)


def _explain(error: ValidationError) -> ApiError:
    """The first thing that is wrong, in the words of OpenAI's interface."""
    first = error.errors(include_url=False)[0]
    kind, where = first["type"], first["loc"]
    path = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in where)
    param = path.removeprefix(".") or None
    if kind == "json_invalid":
        why = first.get("ctx", {}).get("error", first["msg"])
        return invalid(f"The body of the request is not valid JSON: {why}", None, "invalid_json")
    if not where:
        return invalid("The body of the request must be a JSON object", None, "invalid_type")
    if kind == "extra_forbidden":
        return invalid(
            f"Unrecognized request argument supplied: {param}", param, "unknown_parameter"
        )
    if kind == "missing":
        return invalid(
            f"Missing required parameter: '{param}'", param, "missing_required_parameter"
        )
    got = shown(first["input"])
    if kind in _TYPES:
        return invalid(
            f"Invalid type for '{param}': expected {_TYPES[kind]}, but got {got}",
            param,
            "invalid_type",
        )
    return invalid(f"Invalid value for '{param}': {first['msg']}, but got {got}", param)


def shown(value: object) -> str:
    """What a client sent, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
