"""Recorded collectives: what each operation moves, wherever and however it is called."""

from __future__ import annotations

import pytest

from tests.runtime import collective_jobs as jobs

RANKS = 3
N = 20  # bytes of 5 fp32 numbers


@pytest.fixture(scope="module")
def operations(ranks):
    return ranks.run(RANKS, jobs.every_operation)


F32, BF16 = "torch.float32", "torch.bfloat16"

SAME_ON_ALL = {
    "all_gather": ("all_gather", N, 2 * N, F32, (5,)),
    "all_gather_into_tensor": ("all_gather_into_tensor", N // 2, N, BF16, (5,)),
    "asynchronous": ("all_gather_into_tensor", N, 2 * N, F32, (5,)),
    "reduce_scatter": ("reduce_scatter", 2 * N, N, F32, (5,)),
    "reduce_scatter_tensor": ("reduce_scatter_tensor", 2 * N, N, F32, (15,)),
    "all_reduce": ("all_reduce", N, N, F32, (5,)),
    "all_to_all_single": ("all_to_all_single", 2 * N, 2 * N, F32, (15,)),
}


@pytest.mark.parametrize("case", SAME_ON_ALL)
def test_collectives_that_treat_all_ranks_alike(operations, case):
    name, sent, received, dtype, shape = SAME_ON_ALL[case]
    for found in operations:
        assert found[case] == [(name, RANKS, sent, received, dtype, shape)]


def test_uneven_all_to_all(operations):
    """Rank r sends r + 1 rows of 4 bytes to each; what it keeps does not count."""
    for rank, found in enumerate(operations):
        [(_, _, sent, received, dtype, shape)] = found["uneven"]
        rows = rank + 1
        assert (sent, received) == (4 * 2 * rows, 4 * (6 - rows))
        assert (dtype, shape) == (BF16, (3 * rows, 2))


@pytest.mark.parametrize(
    ("case", "root", "other"),
    [
        ("broadcast", (N, 0), (0, N)),
        ("reduce", (0, N), (N, 0)),
        ("gather", (0, 2 * N), (N, 0)),
        ("scatter", (2 * N, 0), (0, N)),
    ],
)
def test_collectives_with_a_root(operations, case, root, other):
    for rank, found in enumerate(operations):
        [(name, _, sent, received, _, shape)] = found[case]
        assert (name, shape) == (case, (5,))
        assert (sent, received) == (root if rank == 1 else other)


def test_point_to_point(operations):
    sender, receiver, third = (found["pair"] for found in operations)
    assert sender == [("send", RANKS, 2 * N, 0, "torch.float64", (5,))]
    assert receiver == [("recv", RANKS, 0, 2 * N, "torch.float64", (5,))]
    assert third == []
    for found in operations:
        both = [("isend", RANKS, N, 0, F32, (5,)), ("irecv", RANKS, 0, N, F32, (5,))]
        assert found["isend_irecv"] == both
        assert found["batch"] == both


def test_what_one_rank_sends_another_receives(operations):
    for case in ("all_to_all_single", "uneven", "pair", "isend_irecv", "batch"):
        rows = [row for found in operations for row in found[case]]
        assert sum(row[2] for row in rows) == sum(row[3] for row in rows)


def test_groups(ranks):
    first, second, third = ranks.run(RANKS, jobs.groups)
    alone = ("all_reduce", 1, 0, 0, F32)
    assert first == [(*alone, (3,)), (*alone, (7,))]
    reduced = ("all_reduce", 2, 12, 12, F32, (3,))
    sent, received = ("broadcast", 2, 12, 0, F32, (3,)), ("broadcast", 2, 0, 12, F32, (3,))
    assert second == [reduced, received, sent]
    assert third == [reduced, sent, received]


def test_threads_and_references_of_modules(ranks):
    for found in ranks.run(2, jobs.threads_and_names):
        assert found["thread"] == [("all_reduce", 2, 8, 8, F32, (2,))]
        assert found["by_name"] == [("all_reduce", 2, 12, 12, F32, (3,))]
        assert found["megatron"] == [
            ("all_gather_into_tensor", 2, 48, 48, F32, (4, 3)),
            ("reduce_scatter_tensor", 2, 48, 48, F32, (8, 3)),
        ]
        assert found["imported"] == [("all_reduce", 2, 16, 16, F32, (4,))]


def test_contexts_are_nested_and_everything_is_restored(ranks):
    for outer, inner, same in ranks.run(2, jobs.nested_and_failing):
        assert outer == ["all_reduce", "broadcast", "all_gather"]
        assert inner == ["broadcast"]
        assert same
