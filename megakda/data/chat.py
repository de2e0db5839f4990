"""Conversations as documents: what a model reads of one, and which tokens it is trained on.

An answer is what the assistant wrote, with the end of its turn and without the header of its role.
Where a template marks answers with ``{% generation %}``, these marks say where they are. Otherwise
a template is asked twice for each answer: for the conversation before it, up to where the answer
begins (`add_generation_prompt`), and for the conversation with it. The first has to be the
beginning of the second, and the second of the whole, or the record is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megakda.data.chat_template import (
    PLAIN_NAME,
    PLAIN_TEMPLATE,
    ChatTemplate,
    Message,
    Messages,
    Span,
    UnclearBlocks,
    read_template,
)
from megakda.data.tokenizer import ByteTokenizer, Tokenizer, first_line, some
from megakda.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
ANSWERS = ("all", "last")
_MARK_THEM = (
    "mark answers in the template with {% generation %} and {% endgeneration %} (--chat-template "
    "FILE)"
)


class BadChat(Exception):
    """A record that cannot be trained on; it says why."""


@dataclass(frozen=True)
class ChatInput:
    """That inputs hold conversations, and how they become documents.

    Attributes:
        messages_key: key (JSON lines) or column (parquet) of the messages.
        template: a Jinja file, or ``plain``; None: the tokenizer's own template, and ``plain`` for
            the byte tokenizer.
        answers: which answers are trained on: ``all``, or the ``last`` one of each conversation.
            Messages with ``"weight": 0`` or ``"train": false`` are left out before.
    """

    messages_key: str = "messages"
    template: str | Path | None = None
    answers: str = "all"


@dataclass(frozen=True)
class ChatFormat:
    """A `ChatInput` whose template was found: plain values, for worker processes."""

    messages_key: str
    source: str
    name: str
    answers: str


@dataclass(frozen=True)
class EncodedChat:
    """A conversation in tokens.

    Attributes:
        ids: [tokens] integer.
        answers: [tokens] uint8, 1 where a token is part of an answer.
        size: bytes of the text in UTF-8.
        cut_tokens: tokens that lie on the edge of an answer, and count as part of it.
    """

    ids: np.ndarray
    answers: np.ndarray
    size: int
    cut_tokens: int


def chat_format(tokenizer: Tokenizer, chat: ChatInput) -> ChatFormat:
    """Finds the template, and tries whether this tokenizer can say what its tokens stand for.

    Raises:
        ConfigError: the template's file cannot be read, or is no template.
        DataError: there is no template, or the tokenizer cannot say.
    """
    if chat.answers not in ANSWERS:
        raise DataError(
            f"answers (--answers) is {chat.answers!r}, but must be one of {', '.join(ANSWERS)}"
        )
    if chat.template is not None:
        name, source = f"--chat-template {chat.template}", read_template(Path(chat.template))
    elif isinstance(tokenizer, ByteTokenizer):
        name, source = PLAIN_NAME, PLAIN_TEMPLATE
    else:
        found = tokenizer.chat_template()
        if found is None:
            raise DataError(
                f"the tokenizer {tokenizer.spec!r} has no chat template, and --chat needs one: "
                f"give --chat-template FILE, or --chat-template {PLAIN_NAME} for the plain one"
            )
        name, source = f"the chat template of {tokenizer.spec}", found
    ChatTemplate(tokenizer, source, name)  # what is wrong with it is said before any work
    tokenizer.encode_with_offsets("")
    return ChatFormat(chat.messages_key, source, name, chat.answers)


def encode_chat(
    record: dict[str, Any], chat: ChatFormat, template: ChatTemplate, tokenizer: Tokenizer
) -> EncodedChat:
    """One conversation.

    Args:
        record: the messages under their key, and ``tools`` for the template, where there are any.

    Raises:
        BadChat: the messages break a rule, there is nothing to train on, or the template does
            not tell where an answer is.
        UnicodeEncodeError: a message holds half of a surrogate pair.
        DataError: the tokenizer cannot say what its tokens stand for.
    """
    messages = _checked(record[chat.messages_key])
    tools = record.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise BadChat(f"key 'tools' holds {type(tools).__name__}, not a list")
    text, spans = find_answers(messages, template, chat.answers, tools)
    size = len(text.encode("utf-8"))
    ids, offsets = tokenizer.encode_with_offsets(text)
    answers = np.zeros(len(ids), np.uint8)
    starts, ends = offsets[:, 0], offsets[:, 1]
    cut = np.zeros(len(ids), bool)
    for first, last in spans:
        answers[(ends > first) & (starts < last)] = 1
        cut |= ((starts < first) & (first < ends)) | ((starts < last) & (last < ends))
    if not answers[1:].any():  # nothing stands before the first token, which would predict it
        raise BadChat("no token of an answer is left to train on")
    return EncodedChat(ids, answers, size, int(cut.sum()))


def find_answers(
    messages: Messages, template: ChatTemplate, answers: str, tools: list[Any] | None = None
) -> tuple[str, list[Span]]:
    """A conversation as text, and the characters of the answers to train on.

    Args:
        messages: checked ones.
        answers: ``all`` or ``last``.

    Raises:
        BadChat: there are none, or the template does not tell where they are.
    """
    turns = [number for number, m in enumerate(messages) if m["role"] == "assistant"]
    wanted = [number for number in turns if _is_trained(messages[number])]
    if not wanted:
        rule = "all have weight 0 or train false" if turns else "no message is the assistant's"
        raise BadChat(f"no answer to train on: {rule}")
    if answers == "last":
        wanted = wanted[-1:]
    rendered = [{k: v for k, v in m.items() if k not in ("weight", "train")} for m in messages]
    try:
        text, blocks = template.generated(rendered, tools)
    except UnclearBlocks as error:
        raise BadChat(str(error)) from error
    except Exception as error:
        raise _failed(error) from error
    if not template.has_generation:
        spans = [_span(template, rendered, tools, number, text) for number in wanted]
    elif len(blocks) == len(turns):
        spans = [block for turn, block in zip(turns, blocks, strict=True) if turn in wanted]
    elif wanted == turns:
        spans = blocks
    else:
        raise BadChat(
            f"the template has {len(blocks)} {{% generation %}} blocks for {len(turns)} messages "
            "of the assistant, so it does not tell which of them are not to be trained on: let it "
            "write one for each"
        )
    spans = [(first, last) for first, last in spans if first < last]
    if not spans:
        raise BadChat("the template writes nothing for the answers")
    return text, spans


def _checked(value: Any) -> Messages:
    if not isinstance(value, list) or not value:
        held = "an empty list" if value == [] else type(value).__name__
        raise BadChat(f"the messages are {held}, not a list of messages")
    return [_checked_message(f"messages[{n}]", message) for n, message in enumerate(value)]


def _checked_message(name: str, value: Any) -> Message:
    if not isinstance(value, dict):
        raise BadChat(f"{name} is {type(value).__name__}, not an object with role and content")
    # Parquet gives every message all keys that any has.
    message = {k: v for k, v in value.items() if v is not None or k == "content"}
    if "role" not in message:
        raise BadChat(f"{name} has no role (keys: {some(list(message))})")
    role, content = message["role"], message.get("content")
    if role not in ROLES:
        raise BadChat(f"{name} has role {role!r}, which is none of {', '.join(ROLES)}")
    if content is None and role == "assistant" and message.get("tool_calls"):
        message["content"] = ""
    elif not isinstance(content, str | list):
        held = "no content" if content is None else f"content of type {type(content).__name__}"
        raise BadChat(f"{name} has {held}, not text")
    weight, train = message.get("weight"), message.get("train")
    if weight not in (None, 0, 1) or isinstance(weight, bool):
        raise BadChat(f"{name} has weight {weight!r}, which is neither 0 nor 1")
    if train is not None and not isinstance(train, bool):
        raise BadChat(f"{name} has train {train!r}, which is neither true nor false")
    if role != "assistant" and (weight or train):
        raise BadChat(f"{name} is to be trained on and has role {role}: only answers can be")
    return message


def _is_trained(message: Message) -> bool:
    return message.get("weight", 1) != 0 and message.get("train", True)


def _span(
    template: ChatTemplate, messages: Messages, tools: list[Any] | None, number: int, text: str
) -> Span:
    """Where messages[number] is in `text`, which is all of them."""

    def render(count: int, prompt: bool) -> str:
        try:
            return template.render(messages[:count], prompt, tools)
        except Exception as error:
            raise _failed(error, count) from error

    before = render(number, True)
    after = text if number + 1 == len(messages) else render(number + 1, False)
    _check_beginning(before, after, f"{_first(number)} with add_generation_prompt", number)
    _check_beginning(after, text, _first(number + 1), number)
    answer = after[len(before) :]
    content = messages[number]["content"]
    content = content.strip() if isinstance(content, str) else ""
    header, _, tail = answer.rpartition(content) if content else ("", "", answer)
    if header.strip() and before == render(number, False):
        raise BadChat(
            f"the template writes {header[:80]!r} before the answer in messages[{number}], and not "
            "with add_generation_prompt, so that it would count as part of the answer: let it "
            f"write that with add_generation_prompt too, or {_MARK_THEM}"
        )
    # Blanks behind the end of the turn are nobody's; where the turn has no other end they are it.
    end = len(after.rstrip()) if tail.strip() else len(after)
    return len(before), end


def _first(count: int) -> str:
    return "the first message" if count == 1 else f"the first {count} messages"


def _check_beginning(part: str, whole: str, what: str, number: int) -> None:
    if whole.startswith(part):
        return
    at = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), len(whole))
    raise BadChat(
        f"where the answer in messages[{number}] is cannot be told: the template writes {what} "
        f"alone as {part[at : at + 40]!r} where the conversation goes on with "
        f"{whole[at : at + 40]!r} (character {at}): {_MARK_THEM}, or train on the last answers "
        "alone with --answers last"
    )


def _failed(error: Exception, count: int | None = None) -> BadChat:
    of = "" if count is None else f" for {_first(count)} alone"
    return BadChat(f"the chat template fails{of} ({type(error).__name__}: {first_line(error)})")
