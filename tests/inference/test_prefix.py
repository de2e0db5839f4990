"""Pages and saved prefixes: what is held, by whom, and what goes first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakda.inference.pages import PagePool
from megakda.inference.prefix import PrefixCache


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_a_page_is_free_when_its_last_holder_leaves():
    pool = PagePool(3, 4)
    pages = pool.take(2)
    pool.share(pages[:1])
    pool.give_back(pages)
    assert pool.free == 2
    pool.give_back(pages[:1])
    assert pool.free == 3
    with pytest.raises(AssertionError):
        pool.give_back(pages)
    assert [pool.needed(n) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]


def test_the_longest_saved_beginning_is_found():
    pool = PagePool(8, 2)
    cache = PrefixCache([10, 11, 12], pool, shortest=2)
    prompt = np.arange(10)
    pages = pool.take(5)
    for length in (2, 5):
        cache.save(prompt[:length], pages)
    assert len(cache.find(prompt).tokens) == 5
    assert len(cache.find(ids(0, 1, 2, 9, 9)).tokens) == 2
    assert cache.find(ids(1, 2, 3)) is None
    assert len(cache.find(prompt[:5]).tokens) == 2  # one token has to be left
    assert cache.save(prompt[:5], pages) is None  # there already
    pool.give_back(pages)
    assert pool.free == 8 - 3  # of five tokens, three pages stay
    cache.clear()
    assert pool.free == 8 and cache.find(prompt) is None


def test_places_worth_saving():
    cache = PrefixCache([0, 1], PagePool(8, 4), shortest=3)
    assert cache.places(np.arange(10)) == [9]
    assert cache.places(ids(0, 1, 2, 3, 4, 99, 98)) == [5, 6]  # where it departs, and its end
    assert cache.places(ids(7, 7)) == []  # too short
    assert cache.places(np.arange(10)) == [9]
    assert PrefixCache([], PagePool(8, 4), shortest=3).places(np.arange(10)) == []


def test_the_least_recently_used_goes_first():
    pool = PagePool(12, 2)
    cache = PrefixCache([0, 1], pool, shortest=2)
    pages = pool.take(6)
    cache.save(ids(1, 1), pages)
    cache.save(ids(2, 2), pages)
    assert cache.find(ids(1, 1, 5)) is not None
    cache.save(ids(3, 3), pages)
    assert cache.find(ids(2, 2, 5)) is None and cache.find(ids(1, 1, 5)) is not None
    kept = cache.find(ids(3, 3, 5))
    assert cache.evict(keep=kept) and not cache.evict(keep=kept)
    assert len(cache) == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=2, max_size=9), max_size=25))
def test_pages_are_never_lost(prompts):
    pool = PagePool(30, 2)
    cache = PrefixCache([0, 1, 2], pool, shortest=2)
    for prompt in map(np.array, prompts):
        found = cache.find(prompt)
        assert found is None or np.array_equal(prompt[: len(found.tokens)], found.tokens)
        pages = pool.take(pool.needed(len(prompt)))
        for place in cache.places(prompt):
            cache.save(prompt[:place], pages)
        pool.give_back(pages)
        assert len(cache) <= 3
    cache.clear()
    assert pool.free == 30
