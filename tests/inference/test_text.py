"""Text of a growing answer: the same as all at once, never a broken character or a stop text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakda.data.tokenizer import ByteTokenizer
from megakda.inference.text import TextStream

TOKENIZER = ByteTokenizer()


def parts(tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(TOKENIZER, stop)
    found = []
    for token in tokens:
        found.append(stream.push(token))
        if stream.stopped:
            return found
    return [*found, stream.finish()]


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=40))
def test_pieces_add_up_and_are_whole(text):
    found = parts(TOKENIZER.encode(text))
    assert "".join(found) == text.encode("utf-8", "replace").decode()
    assert all("\ufffd" not in piece for piece in found) or "\ufffd" in text


@settings(max_examples=100, deadline=None)
@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_texts_end_it_and_never_show(text, stop):
    found = "".join(parts(TOKENIZER.encode(text), tuple(stop)))
    assert not any(mark in found for mark in stop)
    # Where several end at the same character, the one that began first counts.
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(mark) for mark in stop)]
    if ends:
        seen = text[: ends[0]]
        assert found == seen[: min(seen.find(mark) for mark in stop if mark in seen)]
    else:
        assert found == text


def test_what_may_become_a_stop_text_waits():
    assert parts(TOKENIZER.encode("x END"), ("ENDING",)) == ["x", " ", "", "", "", "END"]


@pytest.mark.parametrize("broken", [[0xFF] * 30, [0xE4, 0xBD] * 20, list("aé".encode()) + [0x80]])
def test_broken_bytes_do_not_wait_for_ever(broken):
    found = parts([*broken, ord("z")])
    assert "".join(found).endswith("z") and "\ufffd" in "".join(found)
    assert "".join(found[:12])  # after a few tokens they count as broken


class Words:
    """Joins words by blanks, as tokenizers of the SentencePiece kind do: none before the first."""

    def decode(self, ids):
        return " ".join("word" if i else "\ufffd" for i in ids)


def test_the_blank_between_prompt_and_answer():
    stream = TextStream(Words(), context=[1, 1])
    assert stream.push(1) + stream.push(1) + stream.finish() == " word word"
    assert TextStream(Words()).push(1) == "word"
    assert TextStream(Words(), context=[1, 0]).push(1) == "word"  # ends within a character
