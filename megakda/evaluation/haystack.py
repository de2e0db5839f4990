"""Filler text, and the names and values hidden in it, all drawn from a seed."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterator

from megakda.errors import ConfigError

KINDS = ("words", "numbers", "uuids")
HAYSTACKS = ("repeat", "text")

_PARAGRAPH = (
    "The river runs past the mill.",
    "Rain falls on the hills in spring.",
    "A boat leaves at noon and comes back at night.",
    "Birds rest on the roof of the barn.",
    "The road goes on to the next village.",
)

_SUBJECTS = (
    "the baker", "an old sailor", "the youngest pupil", "a travelling painter", "the gardener",
    "her neighbour", "the town clerk", "a quiet shepherd", "the night guard", "his cousin",
    "the carpenter", "a visiting doctor", "the choir", "an unknown poet", "the mayor",
    "the fisherman", "a tired courier", "the librarian", "the tailor", "a young engineer",
)  # fmt: skip
_VERBS = (
    "repaired", "carried", "remembered", "sold", "described", "found", "borrowed", "painted",
    "measured", "forgot", "returned", "hid", "collected", "admired", "counted", "weighed",
    "cleaned", "traded", "sketched", "lost",
)  # fmt: skip
_OBJECTS = (
    "a copper kettle", "the wooden ladder", "two letters", "a basket of pears", "the broken clock",
    "an empty barrel", "a map of the coast", "the red lantern", "a pair of boots", "the long rope",
    "some candles", "a box of nails", "the church bell", "a woollen coat", "three small stones",
    "the garden gate", "a sack of flour", "the silver spoon", "an iron wheel", "a leather bag",
)  # fmt: skip
_PLACES = (
    "near the harbour", "behind the mill", "at the market", "on the stone bridge", "by the lake",
    "in the upper field", "outside the inn", "under the oak", "along the canal", "at the crossing",
    "in the attic", "beside the well", "past the last house", "on the hill", "in the workshop",
    "below the dam", "at the ferry", "near the forest", "inside the tower", "on the north shore",
)  # fmt: skip
_TIMES = (
    "before dawn", "in early autumn", "after the storm", "one winter evening", "on a Sunday",
    "during the fair", "late in May", "at midday", "a week later", "when the snow melted",
    "that same night", "before the harvest", "in the spring", "after supper", "on market day",
    "as the fog lifted",
)  # fmt: skip

_ADJECTIVES = (
    "amber brave brisk broad calm clever cold coral crisp curious dapper deep distant dusty eager "
    "early faint fair fancy fierce fine firm fleet fond frosty gentle giant glad golden grand "
    "grave green hardy hasty hidden hollow humble icy jolly keen kind late lean light lively lone "
    "loud lucky mellow merry mild misty modest narrow neat nimble noble odd olive pale patient "
    "plain polite prime proud quick quiet rapid rare ready rich rough round royal rustic sharp "
    "shiny silent silver simple sleek slow small smooth sober soft solid steady steep stern still "
    "stout sturdy sunny swift tall tame tender thin tidy tiny vast vivid warm wary wide wild wise "
    "young"
)
_NOUNS = (
    "acorn anchor anvil apron arrow badger basin beacon beaver bishop blossom bottle branch "
    "bridge bucket button cabin camel candle canyon castle cedar cellar chapel cherry chisel "
    "cliff cloud compass copper cradle crane creek crystal dagger desert dolphin eagle engine "
    "falcon feather fern fiddle flagon forest fountain gable garnet glacier goblet granite hammer "
    "harbor harvest hazel helmet heron island ivory jacket jasmine kernel kettle ladder lagoon "
    "lantern lemon lizard magnet maple marble meadow mirror mitten nettle needle oyster paddle "
    "parrot pebble pepper pigeon pillar pocket prairie quarry rabbit raven ribbon saddle salmon "
    "scarf shield sparrow spindle stable summit temple thistle timber tunnel turtle valley velvet "
    "walnut willow"
)


def sentences(kind: str, rng: random.Random) -> Iterator[str]:
    """Sentences without end.

    Args:
        kind: ``repeat``: the same five over and over; ``text``: drawn from a small grammar.

    Raises:
        ConfigError: another kind.
    """
    if kind not in HAYSTACKS:
        raise ConfigError(f"haystack={kind!r} must be one of {', '.join(HAYSTACKS)}")
    while True:
        if kind == "repeat":
            yield from _PARAGRAPH
            continue
        subject, verb, thing = rng.choice(_SUBJECTS), rng.choice(_VERBS), rng.choice(_OBJECTS)
        place, time = rng.choice(_PLACES), rng.choice(_TIMES)
        if rng.random() < 0.5:
            yield f"{subject[0].upper()}{subject[1:]} {verb} {thing} {place} {time}."
        else:
            yield f"{time[0].upper()}{time[1:]} {subject} {verb} {thing} {place}."


def distinct(make: Callable[[random.Random], str], rng: random.Random) -> Iterator[str]:
    """What `make` draws, without repetitions; `make` has to have enough to draw from."""
    seen: set[str] = set()
    while True:
        value = make(rng)
        if value not in seen:
            seen.add(value)
            yield value


def drawing(kind: str) -> Callable[[random.Random], str]:
    """How to draw one key or value.

    ``words`` ("quiet-amber-harbor", more than a million), ``numbers`` (seven digits) or ``uuids``.

    Raises:
        ConfigError: another kind.
    """
    if kind not in KINDS:
        raise ConfigError(f"keys and values are one of {', '.join(KINDS)}, not {kind!r}")
    return {"words": _words, "numbers": _number, "uuids": _uuid}[kind]


def letters(count: int, upper: bool = False) -> Callable[[random.Random], str]:
    """How to draw `count` letters."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if upper else "abcdefghijklmnopqrstuvwxyz"
    return lambda rng: "".join(rng.choices(alphabet, k=count))


def _words(rng: random.Random) -> str:
    first, second = rng.sample(_ADJECTIVES.split(), 2)
    return f"{first}-{second}-{rng.choice(_NOUNS.split())}"


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
