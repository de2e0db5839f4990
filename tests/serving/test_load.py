"""A real model under load, asked by OpenAI's client library."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace

import openai
import psutil
import pytest

from megakda.inference.request import SamplingParams
from tests.inference.models import random_model
from tests.serving.standin import StandIn, idle, left_behind, serving, wait_until

CLIENTS = 64
WAVES = 3
ANSWER = SamplingParams(max_tokens=10, temperature=0.8, ignore_eos=True)


def prompt_of(client: int) -> str:
    return f"def function_{client}(x):" if client % 3 else f"{client}"


def seed_of(client: int, wave: int) -> int:
    return 1000 * wave + client


async def ask(client: openai.AsyncOpenAI, number: int, wave: int, tokens: int = 10) -> str:
    """One stream; its text."""
    stream = await client.completions.create(
        model="tiny",
        prompt=prompt_of(number),
        seed=seed_of(number, wave),
        max_tokens=tokens,
        temperature=0.8,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    return "".join([piece.choices[0].text async for piece in stream])


async def leave(client: openai.AsyncOpenAI, number: int) -> None:
    """A stream that is left after its first piece, or a request that is given up."""
    fields = {"model": "tiny", "prompt": prompt_of(number), "max_tokens": 400, "n": 2}
    fields["extra_body"] = {"ignore_eos": True}
    if number % 2:
        stream = await client.completions.create(**fields, stream=True)
        async for _ in stream:
            break
        await stream.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            await client.completions.create(**fields, timeout=0.3)


def clients(server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def engines():
    """The engine to be served, and one of the same model to compare with."""
    from megakda.inference.engine import Engine, EngineSettings

    settings = EngineSettings(max_sequences=16, max_context=512, page_size=8, prefix_slots=2)
    with random_model() as model:
        yield Engine(model, settings), Engine(model, settings)


def test_waves_of_clients(engines):
    """64 streams at once, again and again, among clients that leave: each gets what it would have
    got offline, and nothing is left of them.

    Sums round differently in a batch of other requests. Once in some ten thousand draws that tips
    the choice between two tokens; asked again, each alone, such a request has to be the same.
    """
    engine, offline = engines
    wanted = {
        wave: offline.generate(
            [list(prompt_of(i).encode()) for i in range(CLIENTS)],
            [replace(ANSWER, seed=seed_of(i, wave)) for i in range(CLIENTS)],
        )
        for wave in range(WAVES)
    }
    assert len({answer.text for answers in wanted.values() for answer in answers}) > CLIENTS

    async def all_waves() -> None:
        async with clients(server) as client:
            for wave in range(WAVES):
                asked = [ask(client, i, wave) for i in range(CLIENTS)]
                leaving = [leave(client, i) for i in range(6)] if wave else []
                texts, _ = await asyncio.gather(asyncio.gather(*asked), asyncio.gather(*leaving))
                await asyncio.to_thread(wait_until, lambda: idle(server))
                other = [i for i in range(CLIENTS) if texts[i] != wanted[wave][i].text]
                assert len(other) <= 2, other
                for i in other:
                    params = replace(ANSWER, seed=seed_of(i, wave))
                    (alone,) = offline.generate([list(prompt_of(i).encode())], [params])
                    assert await ask(client, i, wave) == alone.text

    with serving(engine, max_queue=CLIENTS + 12, max_context=512) as server:
        asyncio.run(all_waves())
        assert server.loop.failure is None
    engine.clear_prefixes()
    assert engine.stats().cache_tokens_used == 0


def test_nothing_grows():
    """Hundreds of requests, a third of which are left: no object and no memory stays behind."""

    async def wave(count: int) -> None:
        async with clients(server) as client:
            for _ in range(count):
                asked = [ask(client, i, 0, tokens=20) for i in range(CLIENTS)]
                await asyncio.gather(*asked, *(leave(client, 1) for _ in range(CLIENTS // 2)))

    process = psutil.Process(os.getpid())
    with serving(StandIn(16, 512), max_queue=3 * CLIENTS, max_context=512) as server:
        asyncio.run(wave(2))
        wait_until(lambda: idle(server) and not left_behind())
        before = process.memory_info().rss
        asyncio.run(wave(2))
        wait_until(lambda: idle(server) and not left_behind())
        assert process.memory_info().rss - before < 16 * 2**20
        assert server.loop._next_ticket == 4 * 2 * CLIENTS
