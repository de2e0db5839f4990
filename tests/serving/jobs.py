"""Jobs for the rank pool: the engine loop on rank 0, the others following."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from typing import Any

from megakda.inference.request import Completion, SamplingParams
from tests.inference.models import random_model, random_prompts

SETTINGS = {"max_sequences": 3, "max_context": 96, "page_size": 8, "prefix_slots": 2}


def requests() -> list[tuple[list[int], SamplingParams]]:
    """Ragged prompts, two of them the same, each with a seed."""
    prompts = random_prompts([5, 30, 12, 30, 1], seed=3)
    prompts[3] = prompts[1]
    return [
        (prompt, SamplingParams(max_tokens=6 + i, temperature=0.9, seed=i, ignore_eos=True))
        for i, prompt in enumerate(prompts)
    ]


def through_the_loop(overrides: Sequence[str], pause: float = 0.0, patience: float = 60.0) -> Any:
    """Answers through `EngineLoop` on rank 0; what the engine has done on every rank.

    There is a pause before, a request that is refused by the engine, and one that is
    cancelled while it runs. The other ranks wait no longer than `patience` seconds for a round.
    """
    import torch

    from megakda.inference.engine import Engine, EngineSettings
    from megakda.serving import loop as loop_module
    from megakda.serving.loop import EngineLoop, follow

    loop_module.CHANNEL_MINUTES = patience / 60
    with random_model(overrides) as model:
        engine = Engine(model, EngineSettings(**SETTINGS))
        if torch.distributed.get_rank() != 0:
            follow(engine)
            return engine.stats()
        with EngineLoop(engine, max_open=10, heartbeat_seconds=0.2) as loop:
            time.sleep(pause)
            answers = collect(loop, requests())
            box: queue.Queue = queue.Queue()
            loop.submit([([1] * 95, SamplingParams(max_tokens=2))], lambda i, x: box.put(x))
            refused = str(box.get(timeout=60))
            long = SamplingParams(max_tokens=80, ignore_eos=True, seed=0)
            tickets = loop.submit([([7], long)], lambda i, x: box.put(x))
            box.get(timeout=60)
            loop.cancel(tickets)
            again = collect(loop, requests()[:2])
        return answers, again, refused, engine.stats()


def collect(loop: Any, wanted: list[tuple[list[int], SamplingParams]]) -> list[Completion]:
    """Waits for all answers."""
    box: queue.Queue = queue.Queue()
    loop.submit(wanted, lambda index, item: box.put((index, item)))
    answers = [Completion(prompt) for prompt, _ in wanted]
    while any(answer.finish_reason is None for answer in answers):
        index, item = box.get(timeout=60)
        answers[index].add(item)
    return answers


def with_a_rank_that_stops() -> Any:
    """Rank 1 stops answering in its third step; what rank 0's caller is told, and when."""
    import torch

    from megakda.inference.engine import Engine, EngineSettings
    from megakda.serving.loop import EngineLoop, follow

    with random_model(["parallel.tensor=2", "runtime.timeout_minutes=0.1"]) as model:
        engine = Engine(model, EngineSettings(**SETTINGS))
        if torch.distributed.get_rank() != 0:
            steps = iter([engine.step, engine.step, lambda: 1 / 0])
            engine.step = lambda: next(steps)()  # type: ignore[method-assign]
            try:
                follow(engine)
            except ZeroDivisionError:
                return None
        began = time.monotonic()
        box: queue.Queue = queue.Queue()
        with EngineLoop(engine, max_open=10, heartbeat_seconds=0.02) as loop:
            loop.submit(requests()[:1], lambda index, item: box.put(item))
            item = box.get(timeout=60)
            while not isinstance(item, Exception):
                item = box.get(timeout=60)
            return type(item).__name__, loop.failure, time.monotonic() - began
