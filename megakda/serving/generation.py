"""One HTTP request's way through the engine, for asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from megakda.errors import ConfigError, MegakdaError
from megakda.inference.request import Completion, SamplingParams, Update
from megakda.serving.answers import Answer
from megakda.serving.loop import EngineFailed, EngineLoop, Item, QueueFull, ShuttingDown
from megakda.serving.metrics import Metrics
from megakda.serving.protocol import ApiError

LAST_WORDS_SECONDS = 1.0
"""How long a client that reads too slowly is given to take the end of its stream."""


class ClientGone(Exception):
    """The client closed the connection; nobody waits for an answer."""


def as_api_error(error: MegakdaError) -> ApiError:
    """What the engine or its loop raises, for a client."""
    text = str(error)
    if isinstance(error, QueueFull):
        return ApiError(
            429, text, code="queue_full", type="rate_limit_error", headers={"Retry-After": "1"}
        )
    if isinstance(error, ShuttingDown):
        return ApiError(
            503, text, code="shutting_down", type="server_error", headers={"Retry-After": "5"}
        )
    if isinstance(error, EngineFailed):
        return ApiError(500, text, code="engine_failed", type="server_error")
    if isinstance(error, ConfigError):
        return ApiError(400, text, code="invalid_value")
    return ApiError(500, text, type="server_error")


class Generation:
    """The engine's requests behind one HTTP request.

    Raises:
        ApiError: there is no room in the queue, or the server cannot take requests.
    """

    def __init__(
        self,
        loop: EngineLoop,
        requests: Sequence[tuple[list[int], SamplingParams]],
        metrics: Metrics,
    ) -> None:
        self._loop, self._metrics = loop, metrics
        self._news: asyncio.Queue[tuple[int, Item]] = asyncio.Queue()
        self._unfinished = len(requests)
        here = asyncio.get_running_loop()

        def deliver(index: int, item: Item) -> None:  # in the engine's thread
            here.call_soon_threadsafe(self._news.put_nowait, (index, item))

        self._began = time.monotonic()
        try:
            self._tickets = loop.submit(requests, deliver)
        except MegakdaError as error:
            raise as_api_error(error) from error

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """(choice, update) as they come, until all choices have ended.

        Raises:
            ApiError: one of them ended with an error.
        """
        first: dict[int, float] = {}
        tokens: dict[int, int] = {}
        while self._unfinished:
            index, item = await self._news.get()
            if isinstance(item, MegakdaError):
                raise as_api_error(item)
            if item.tokens:
                now = time.monotonic()
                if index not in first:
                    first[index] = now
                    self._metrics.first_token.observe(now - self._began)
                tokens[index] = tokens.get(index, 0) + len(item.tokens)
            if item.finish_reason is not None:
                self._unfinished -= 1
                if tokens.get(index, 0) > 1:
                    spent = time.monotonic() - first[index]
                    self._metrics.per_token.observe(spent / (tokens[index] - 1))
            yield index, item

    def close(self) -> None:
        """Gives the slots back, whatever is still running."""
        self._loop.cancel(self._tickets)


async def while_connected(
    receive: Receive, work: Coroutine[Any, Any, None], seconds: float
) -> None:
    """Awaits `work`, but no longer than the client stays and not longer than `seconds`.

    The request's body has been read before. `work` is cancelled where it is not awaited to its end.

    Raises:
        ClientGone: the client closed the connection.
        TimeoutError: the time is over.
    """

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone if gone.done() else TimeoutError
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class GeneratedResponse(Response):
    """Generates while it answers, so that there is one place which gives the slots back.

    It is submitted with the response, and the status is sent with the first update: an error
    before that has a status of its own, one after that is an event in the stream.
    """

    def __init__(
        self,
        answer: Answer,
        loop: EngineLoop,
        requests: Sequence[tuple[list[int], SamplingParams]],
        metrics: Metrics,
        seconds: float,
    ) -> None:
        super().__init__()
        self._answer, self._metrics, self._seconds = answer, metrics, seconds
        self._loop, self._requests = loop, requests
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = Generation(self._loop, self._requests, self._metrics)
        try:
            work = self._stream if self._answer.stream else self._whole
            await while_connected(receive, work(generation, scope, receive, send), self._seconds)
        except ClientGone:
            if self._started:
                self._metrics.cut_streams.labels("client_gone").inc()
        except TimeoutError:
            error = ApiError(
                504,
                f"the answer took longer than {self._seconds:g} seconds, the limit of this server "
                "(--request-timeout): ask for fewer tokens",
                code="request_timeout",
                type="server_error",
            )
            await self._fail(error, send)
        except ApiError as error:
            await self._fail(error, send)
        finally:
            generation.close()

    async def _whole(
        self, generation: Generation, scope: Scope, receive: Receive, send: Send
    ) -> None:
        completions = [Completion(prompt) for prompt, _ in self._requests]
        async for index, update in generation.updates():
            completions[index].add(update)
        await JSONResponse(self._answer.whole(completions))(scope, receive, send)

    async def _stream(
        self, generation: Generation, scope: Scope, receive: Receive, send: Send
    ) -> None:
        async for index, update in generation.updates():
            choice = self._answer.choice(index, update)
            if choice is not None:
                await self._send_event(send, self._answer.chunk(choice))
        if self._answer.request.include_usage:
            await self._send_event(send, self._answer.usage_chunk())
        await send(_body(b"data: [DONE]\n\n", more=False))

    async def _send_event(self, send: Send, event: dict[str, Any]) -> None:
        if not self._started:
            headers = [
                (b"content-type", b"text/event-stream; charset=utf-8"),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),  # nginx would hold events back
            ]
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        text = json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        await send(_body(f"data: {text}\n\n".encode(), more=True))
        await asyncio.sleep(0)  # uvicorn's send lets nobody else run, nor sees that a client left

    async def _fail(self, error: ApiError, send: Send) -> None:
        if not self._started:
            raise error
        self._metrics.cut_streams.labels(error.error["code"] or "error").inc()
        last = f"data: {json.dumps(error.body)}\n\n".encode()
        # uvicorn closes the connection of a client that does not read even this.
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(send(_body(last, more=False)), LAST_WORDS_SECONDS)


def _body(data: bytes, more: bool) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}
