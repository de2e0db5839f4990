"""The engine's thread: order, limits, faults, and several ranks."""

from __future__ import annotations

import queue

import pytest

from megakda.errors import ConfigError
from megakda.inference.request import SamplingParams, Update
from megakda.serving.loop import EngineFailed, EngineLoop, QueueFull, ShuttingDown
from tests.serving import jobs
from tests.serving.standin import StandIn, wait_until

ONE = SamplingParams(max_tokens=3, seed=0)


def nothing(index, item):
    pass


def test_answers_and_indices():
    engine = StandIn(max_sequences=2)
    wanted = [([97 + i], SamplingParams(max_tokens=2 + i, seed=i)) for i in range(5)]
    with EngineLoop(engine, 8) as loop:
        found = jobs.collect(loop, wanted)
    assert found == engine.generate(*map(list, zip(*wanted, strict=True)))


def test_all_of_a_submission_or_nothing():
    engine = StandIn()
    with EngineLoop(engine, 4) as loop:
        engine.gate.clear()
        loop.submit([([97], ONE)] * 3, nothing)
        with pytest.raises(QueueFull, match="3 requests run or wait and 2 more would pass .* 4"):
            loop.submit([([97], ONE)] * 2, nothing)
        loop.submit([([97], ONE)], nothing)
        assert loop.open == loop.waiting == 4
        engine.gate.set()
        wait_until(lambda: loop.open == 0)
        assert engine.submitted == 4


def test_a_refusal_is_about_one_request():
    box: queue.Queue = queue.Queue()
    with EngineLoop(StandIn(), 8) as loop:
        loop.submit([(list(b"refuse"), ONE), ([97], ONE)], lambda i, x: box.put((i, x)))
        index, item = box.get(timeout=10)
        assert index == 0 and isinstance(item, ConfigError)
        while index == 0 or item.finish_reason is None:
            index, item = box.get(timeout=10)
        assert loop.failure is None


def test_a_caller_that_raises_harms_nobody_else():
    def broken(index, item):
        raise RuntimeError("the event loop is closed")

    engine = StandIn(max_sequences=2)
    with EngineLoop(engine, 8) as loop:
        loop.submit([([97], SamplingParams(max_tokens=50, seed=0))], broken)
        jobs.collect(loop, [([98], ONE)])
        wait_until(lambda: loop.open == 0 and not engine.busy)
        assert engine.generated < 50 and loop.failure is None


def test_cancel():
    engine = StandIn(max_sequences=1)
    heard: list[Update] = []
    with EngineLoop(engine, 8) as loop:
        engine.gate.clear()
        tickets = loop.submit([([97], ONE)] * 3, lambda i, x: heard.append((i, x)))
        loop.cancel(tickets[1:])
        loop.cancel(tickets[1:])  # again is nothing
        assert loop.open == 1
        engine.gate.set()
        wait_until(lambda: loop.open == 0)
        loop.cancel(tickets)
        wait_until(lambda: not engine.busy and not loop._commands)
        assert {index for index, _ in heard} == {0} and engine.generated == 3


def test_failure_reaches_everyone():
    engine = StandIn(max_sequences=1)
    box: queue.Queue = queue.Queue()
    with EngineLoop(engine, 8) as loop:
        engine.gate.clear()
        loop.submit([([97], ONE)] * 3, lambda i, x: box.put((i, x)))
        engine.fault = ZeroDivisionError("x")
        engine.gate.set()
        told = [box.get(timeout=10) for _ in range(3)]
        assert [index for index, _ in told] == [0, 1, 2]
        assert all(isinstance(item, EngineFailed) for _, item in told)
        assert "ZeroDivisionError" in loop.failure and loop.open == 0
        with pytest.raises(EngineFailed):
            loop.submit([([97], ONE)], nothing)


def test_stop_ends_open_requests():
    engine = StandIn(max_sequences=1, step_seconds=0.01)
    box: queue.Queue = queue.Queue()
    loop = EngineLoop(engine, 8)
    loop.start()
    loop.submit([([97], SamplingParams(max_tokens=5000, seed=0))] * 2, lambda i, x: box.put(x))
    assert isinstance(box.get(timeout=10), Update)
    loop.drain()
    with pytest.raises(ShuttingDown):
        loop.submit([([97], ONE)], nothing)
    assert loop.open == 2
    loop.stop()
    items = [box.get(timeout=10)]
    while not box.empty():
        items.append(box.get())
    assert [type(item) for item in items if not isinstance(item, Update)] == [ShuttingDown] * 2
    assert not engine.busy and not loop._thread.is_alive()


@pytest.fixture(scope="module")
def one_rank(ranks):
    return ranks.run(1, jobs.through_the_loop, ())[0]


@pytest.mark.parametrize(
    ("layout", "pause"), [("parallel.tensor=2", 4.0), ("parallel.pipeline=2", 0.0)]
)
def test_ranks_follow(ranks, one_rank, layout, pause):
    """Two ranks answer as one does, are idle for longer than collectives may take, and end."""
    answers, again, refused, _ = one_rank
    first, other = ranks.run(2, jobs.through_the_loop, [layout], pause, patience=3.0)
    assert "max_context=96" in refused and refused == first[2]
    assert [a.tokens for a in answers] == [a.tokens for a in first[0]]
    assert [a.text for a in again] == [a.text for a in first[1]] == [a.text for a in answers[:2]]
    assert first[3] == other and other.running == other.waiting == 0
    assert other.free_sequences == other.max_sequences


def test_a_rank_that_stops(ranks):
    """The callers of rank 0 hear of it after the time limit of collectives, here 6 seconds."""
    (kind, message, seconds), _ = ranks.run(2, jobs.with_a_rank_that_stops)
    assert kind == "EngineFailed" and seconds < 20
    assert "another rank has died or does not answer" in message
