"""Long-context tests made of text that is drawn from a seed: nothing is downloaded.

The tasks follow RULER (arXiv 2404.06654): needles in a haystack with one or several keys, values
and questions, and variable tracking; and multi-query associative recall from Zoology (arXiv
2312.04927). Wording, names and fillers are megakda's own, so scores are comparable between models
here, and not with published tables.

A sample is put together from tokens: every sentence is encoded by itself, with the blank before it,
and haystacks are cut to the token. So a sample has exactly the length that was asked for, and the
place of every needle is known.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megakda.data.tokenizer import Tokenizer
from megakda.errors import ConfigError
from megakda.evaluation.haystack import distinct, drawing, letters, sentences

_SLACK = 32  # tokens a generated answer may take beyond those of the true one


@dataclass(frozen=True)
class Span:
    """A piece of a sample: its text, and its tokens start..end."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Question:
    """One answer to give.

    Attributes:
        prompt_end: the prompt is the sample's tokens before this one.
        room: tokens that a generated answer may take.
        references: what has to be in the answer; their spans are in the sample's tokens.
    """

    prompt_end: int
    room: int
    references: tuple[Span, ...]


@dataclass(frozen=True)
class Sample:
    """A test with its true answers.

    Attributes:
        task, length, depth, index: of which it is; equal ones with equal seeds are equal.
        tokens: prompts and true answers, at most `length`. The prompt of the last question and its
            room are `length` together.
        questions: in the order of the tokens; a prompt holds the true answers to earlier ones.
        facts: what the answers follow from, where it lies.
    """

    task: str
    length: int
    depth: float | None
    index: int
    tokens: tuple[int, ...]
    questions: tuple[Question, ...]
    facts: tuple[Span, ...]

    def prompt(self, question: Question) -> list[int]:
        """Tokens to continue with an answer to `question`."""
        return list(self.tokens[: question.prompt_end])


@dataclass
class _Draft:
    """Tokens so far, and where the facts among them are."""

    encode: Callable[[str], list[int]]
    tokens: list[int] = field(default_factory=list)
    facts: list[Span] = field(default_factory=list)

    def add(self, text: str) -> Span:
        """Appends a text."""
        start = len(self.tokens)
        self.tokens += self.encode(text)
        return Span(text.strip(" ,"), start, len(self.tokens))

    def add_answer(self, references: Iterable[str]) -> tuple[Span, ...]:
        """Appends references, with commas between them, which belong to no span."""
        spans = []
        for number, reference in enumerate(references):
            if number:
                self.add(",")
            spans.append(self.add(f" {reference}"))
        return tuple(spans)


@dataclass(frozen=True)
class NeedleTask:
    """Facts of the form "key: value" in a haystack, and the question for the values of some keys.

    Attributes:
        haystack: ``repeat``, ``text``, or ``needles`` for one that consists of other facts.
        keys, values: ``words``, ``numbers`` or ``uuids``.
        asked: keys that the question names.
        values_per_key: facts about each key that is asked for.
        others: facts about further keys.
    """

    name: str
    haystack: str = "text"
    keys: str = "words"
    values: str = "numbers"
    asked: int = 1
    values_per_key: int = 1
    others: int = 0

    @property
    def takes_depth(self) -> bool:
        """Whether the place of the one needle asked for can be chosen."""
        return self.asked == self.values_per_key == 1

    def build(
        self, tokenizer: Tokenizer, length: int, depth: float | None, rng: random.Random
    ) -> tuple[_Draft, tuple[Question, ...]]:
        """The draft of a sample and its question. See `make_sample`."""
        keys = distinct(drawing(self.keys), rng)
        values = distinct(drawing(self.values), rng)
        asked = list(itertools.islice(keys, self.asked))
        wanted = [(key, next(values)) for key in asked for _ in range(self.values_per_key)]
        rng.shuffle(wanted)  # facts about several keys lie mixed
        others = [(next(keys), next(values)) for _ in range(self.others)]
        places = [depth] if depth is not None else sorted(rng.random() for _ in wanted)
        places += [rng.random() for _ in others]

        one = {"words": "word", "numbers": "number", "uuids": "code"}[self.values]
        what, verb = (one, "is") if len(wanted) == 1 else (f"{one}s", "are")
        what = f"secret {what} of {_and(asked)}"

        def fact(pair: tuple[str, str]) -> str:
            return f" The secret {one} of {pair[0]} is {pair[1]}."

        filler: Iterator[str]
        if self.haystack == "needles":
            filler = map(fact, zip(keys, values, strict=False))
        else:
            filler = (f" {sentence}" for sentence in sentences(self.haystack, rng))
        return _text_sample(
            _Draft(tokenizer.encode),
            f"Some secret {one}s are mentioned in the text below. Remember them.\n\nText:",
            filler,
            list(map(fact, [*wanted, *others])),
            places,
            f"\n\nQuestion: What {verb} the {what}?\nAnswer: The {what} {verb}",
            # Of each key in the order of the question, of one key in the order of the text.
            [value for key in asked for k, value in wanted if k == key],
            len(wanted),
            length,
            self.name,
        )


@dataclass(frozen=True)
class VariableTask:
    """Chains of assignments in a haystack; which variables hold the value at the start of one?

    Attributes:
        chains: of which the first is asked for.
        hops: assignments in a chain after the one of the value.
    """

    name: str
    haystack: str = "repeat"
    chains: int = 1
    hops: int = 4
    takes_depth = False

    def build(
        self, tokenizer: Tokenizer, length: int, depth: float | None, rng: random.Random
    ) -> tuple[_Draft, tuple[Question, ...]]:
        """The draft of a sample and its question. See `make_sample`."""
        names = distinct(letters(5, upper=True), rng)
        values = distinct(lambda rng: str(rng.randrange(10**4, 10**5)), rng)
        chains = [list(itertools.islice(names, self.hops + 1)) for _ in range(self.chains)]
        starts = list(itertools.islice(values, self.chains))
        statements = []
        for chain, value in zip(chains, starts, strict=True):
            held = [value, *(f"the value of {name}" for name in chain)]
            statements.append(
                [f" Let {name} be {what}." for name, what in zip(chain, held, strict=False)]
            )
        # Each chain in its own order, several chains mixed at random.
        order = [number for number, chain in enumerate(statements) for _ in chain]
        rng.shuffle(order)
        queues = [iter(chain) for chain in statements]
        mixed = [next(queues[number]) for number in order]

        start = starts[0]
        return _text_sample(
            _Draft(tokenizer.encode),
            "Some variables are given values in the text below. Keep track of them.\n\nText:",
            (f" {sentence}" for sentence in sentences(self.haystack, rng)),
            mixed,
            sorted(rng.random() for _ in mixed),
            f"\n\nQuestion: Which variables hold the value {start}, by themselves or through "
            f"others?\nAnswer: The variables that hold the value {start} are",
            chains[0],
            len(mixed),
            length,
            self.name,
        )


@dataclass(frozen=True)
class RecallTask:
    """Pairs of a name and a number, then names again, between filler: the number of each?

    As in Zoology's experiments the number of pairs grows with the length, and most questions come
    soon: the filler before each is log-uniform in sentences, the limit of its power law. One
    question comes at the very end.

    Attributes:
        pairs: how many; 0: as many as an eighth of the tokens hold.
        questions: at most so many of the names are asked for.
    """

    name: str
    haystack: str = "repeat"
    pairs: int = 0
    questions: int = 16
    takes_depth = False

    def build(
        self, tokenizer: Tokenizer, length: int, depth: float | None, rng: random.Random
    ) -> tuple[_Draft, tuple[Question, ...]]:
        """The draft of a sample and its questions. See `make_sample`."""
        # Three letters make 17,576 names; beyond a tenth of them a draw would often repeat.
        names = distinct(letters(3 if (self.pairs or length // 8) < 1700 else 5), rng)
        draft = _Draft(tokenizer.encode)
        numbers: dict[str, str] = {}
        for name in itertools.islice(names, self.pairs or None):
            numbers[name] = str(rng.randrange(100, 1000))
            draft.facts.append(draft.add(f" {name}:{numbers[name]}"))
            if not self.pairs and 8 * len(draft.tokens) >= length:
                break
        asked = rng.sample(sorted(numbers), min(self.questions, len(numbers)))
        texts = [(tokenizer.encode(f" {name}:"), tokenizer.encode(numbers[name])) for name in asked]
        gap = length - len(draft.tokens) - sum(len(a) + len(b) for a, b in texts)
        if gap < 0:
            raise _too_short(self.name, length, length - gap)
        filler = (f" {sentence}" for sentence in sentences(self.haystack, rng))
        hay = _hay(filler, gap, tokenizer.encode)
        most = math.log(len(hay) + 1)
        ends = sorted(int(math.exp(rng.random() * most)) - 1 for _ in asked[1:])
        found, done = [], 0
        for name, (query, answer), end in zip(asked, texts, [*ends, len(hay)], strict=True):
            draft.tokens += [*itertools.chain.from_iterable(hay[done:end]), *query]
            done = end
            start = len(draft.tokens)
            draft.tokens += answer
            span = Span(numbers[name], start, len(draft.tokens))
            found.append(Question(start, len(answer), (span,)))
        return draft, tuple(found)


Task = NeedleTask | VariableTask | RecallTask

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        NeedleTask("needle_single_1", haystack="repeat"),
        NeedleTask("needle_single_2"),
        NeedleTask("needle_single_3", values="uuids"),
        NeedleTask("needle_multikey_1", others=3),
        NeedleTask("needle_multikey_2", haystack="needles"),
        NeedleTask("needle_multikey_3", haystack="needles", keys="uuids", values="uuids"),
        NeedleTask("needle_multivalue", values_per_key=4),
        NeedleTask("needle_multiquery", asked=4),
        VariableTask("variable_tracking"),
        RecallTask("associative_recall"),
    )
}
"""Needles in the eight configurations of RULER, whose names end the same."""


def choose_tasks(
    names: Iterable[str],
    keys: str | None = None,
    values: str | None = None,
    haystack: str | None = None,
    pairs: int | None = None,
    chains: int | None = None,
    hops: int | None = None,
) -> list[Task]:
    """Tasks by name, with some of their settings changed where they have them.

    Args:
        names: of `TASKS`, or ``all``.

    Raises:
        ConfigError: an unknown name, or a value that cannot work.
    """
    chosen: dict[str, Task] = {}
    for name in names:
        if name != "all" and name not in TASKS:
            raise ConfigError(f"tasks={name!r} must be all or of {', '.join(TASKS)}")
        chosen.update(TASKS if name == "all" else {name: TASKS[name]})
    if not chosen:
        raise ConfigError(f"tasks=[]: name at least one of {', '.join(TASKS)}, or all")
    for name, value, least in (("pairs", pairs, 0), ("chains", chains, 1), ("hops", hops, 0)):
        if value is not None and value < least:
            raise ConfigError(f"{name}={value} must be at least {least}")
    for kind in (keys, values):
        if kind is not None:
            drawing(kind)
    if haystack is not None:
        next(sentences(haystack, random.Random(0)))
    for name, task in chosen.items():
        if isinstance(task, NeedleTask):
            text = None if task.haystack == "needles" else haystack
            chosen[name] = replace(task, **_given(keys=keys, values=values, haystack=text))
        elif isinstance(task, VariableTask):
            chosen[name] = replace(task, **_given(chains=chains, hops=hops, haystack=haystack))
        else:
            chosen[name] = replace(task, **_given(pairs=pairs, haystack=haystack))
    return list(chosen.values())


def make_sample(
    task: Task,
    tokenizer: Tokenizer,
    length: int,
    depth: float | None = None,
    seed: int = 0,
    index: int = 0,
) -> Sample:
    """Draws one sample.

    Args:
        length: tokens of the last question's prompt and its room for an answer, together.
        depth: where in the haystack the needle asked for begins, from 0 (first) to 1 (last), up to
            half a sentence; None: anywhere.
        seed: of the draws; samples differ by their task's name, length, depth and index too.

    Raises:
        ConfigError: a length that the text around the haystack does not fit in, a depth out of
            range, or one for a task without a single needle.
    """
    if depth is not None and not (task.takes_depth and 0 <= depth <= 1):
        rule = "between 0 and 1" if task.takes_depth else f"None for {task.name}"
        raise ConfigError(f"depth={depth} must be {rule}")
    rng = random.Random(f"{seed}/{task.name}/{length}/{depth}/{index}")
    draft, questions = task.build(tokenizer, length, depth, rng)
    return Sample(
        task=task.name,
        length=length,
        depth=depth,
        index=index,
        tokens=tuple(draft.tokens),
        questions=questions,
        facts=tuple(draft.facts),
    )


def _given(**changes: Any) -> dict[str, Any]:
    return {name: value for name, value in changes.items() if value is not None}


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _hay(filler: Iterator[str], size: int, encode: Callable[[str], list[int]]) -> list[list[int]]:
    """Sentences of `size` tokens together; the last one is cut to fit."""
    hay: list[list[int]] = []
    while size > 0:
        hay.append(encode(next(filler))[:size])
        size -= len(hay[-1])
    return hay


def _text_sample(
    draft: _Draft,
    opening: str,
    filler: Iterator[str],
    facts: list[str],
    places: list[float],
    ending: str,
    answers: list[str],
    kept: int,
    length: int,
    name: str,
) -> tuple[_Draft, tuple[Question, ...]]:
    """Opening, haystack with facts, ending and answers.

    Each fact goes to the sentence end next to its place, which is a share of the haystack; facts at
    the same one keep their order. The last sentence of the haystack is cut to fit. Of the facts the
    first `kept` are those that the answers follow from.
    """
    draft.add(opening)
    question, answer = draft.encode(ending), _Draft(draft.encode)
    spans = answer.add_answer(answers)
    room = len(answer.tokens) + _SLACK
    size = length - len(draft.tokens) - len(question) - room
    size -= sum(len(draft.encode(fact)) for fact in facts)
    if size < 0:
        raise _too_short(name, length, length - size)
    hay = _hay(filler, size, draft.encode)
    ends = list(itertools.accumulate(map(len, hay), initial=0))
    at: dict[int, list[int]] = {}
    for number, place in enumerate(places):
        after = bisect.bisect_left(ends, place * size)
        before = max(after - 1, 0)
        nearer = ends[after] - place * size <= place * size - ends[before]
        at.setdefault(after if nearer else before, []).append(number)
    for end, sentence in enumerate([*hay, []]):
        for number in at.get(end, ()):
            span = draft.add(facts[number])
            if number < kept:
                draft.facts.append(span)
        draft.tokens += sentence
    draft.tokens += question
    here = len(draft.tokens)
    draft.tokens += answer.tokens
    moved = (replace(span, start=span.start + here, end=span.end + here) for span in spans)
    return draft, (Question(here, room, tuple(moved)),)


def _too_short(name: str, length: int, needed: int) -> ConfigError:
    return ConfigError(
        f"length={length} is too short for {name}, whose text around the haystack takes {needed} "
        "tokens with this tokenizer: use longer --lengths, or leave it out of --tasks"
    )
