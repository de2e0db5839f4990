"""An engine with the generator's interface and made-up tokens, and servers around engines."""

from __future__ import annotations

import gc
import hashlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any

import uvicorn

from megakda.data.tokenizer import ByteTokenizer
from megakda.errors import ConfigError
from megakda.inference.engine import EngineStats
from megakda.inference.request import Completion, SamplingParams, TokenLogprob, Update
from megakda.inference.text import TextStream
from megakda.serving.answers import Answer
from megakda.serving.app import Service, create_app
from megakda.serving.generation import GeneratedResponse, Generation
from megakda.serving.loop import EngineLoop
from megakda.serving.protocol import Limits
from megakda.serving.server import bind

LETTERS = b"abcdefghijklmnopqrstuvwxyz \xc3\xa9"
KEY = "a-key"


@dataclass
class _Sequence:
    request: int
    prompt: list[int]
    params: SamplingParams
    text: TextStream
    tokens: list[int] = field(default_factory=list)


class StandIn:
    """Token i of an answer is a hash of the prompt, the seed and i.

    `step_seconds` is how long a step takes, `gate` holds steps up while it is clear, and a step
    raises `fault` where it is set.
    """

    def __init__(self, max_sequences: int = 4, max_context: int = 128, step_seconds: float = 0.0):
        self.tokenizer = ByteTokenizer()
        self.max_sequences, self.max_context = max_sequences, max_context
        self.step_seconds = step_seconds
        self.fault: BaseException | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.waiting: list[_Sequence] = []
        self.running: list[_Sequence] = []
        self.cancelled: list[int] = []
        self.submitted = self.steps = self.generated = 0

    def submit(self, prompt: list[int], params: SamplingParams) -> int:
        params.check()
        if prompt == list(b"refuse"):
            raise ConfigError("this prompt can never be answered")
        request, self.submitted = self.submitted, self.submitted + 1
        text = TextStream(self.tokenizer, params.stop)
        self.waiting.append(_Sequence(request, prompt, params, text))
        return request

    def cancel(self, request: int) -> None:
        for sequences in (self.waiting, self.running):
            for sequence in sequences:
                if sequence.request == request:
                    sequences.remove(sequence)
                    self.cancelled.append(request)
                    return

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running or self.cancelled)

    def step(self) -> list[Update]:
        self.gate.wait()
        time.sleep(self.step_seconds)
        if self.fault is not None:
            raise self.fault
        updates = [Update(request, finish_reason="cancelled") for request in self.cancelled]
        self.cancelled.clear()
        while self.waiting and len(self.running) < self.max_sequences:
            self.running.append(self.waiting.pop(0))
        self.steps += 1
        for sequence in list(self.running):
            update = self._next(sequence)
            updates.append(update)
            if update.finish_reason is not None:
                self.running.remove(sequence)
        return updates

    def _next(self, sequence: _Sequence) -> Update:
        params, first = sequence.params, not sequence.tokens
        prompt = None
        if first and params.prompt_logprobs is not None:
            scores = [TokenLogprob(t, -t / 10, 1, ((t, -t / 10),)) for t in sequence.prompt[1:]]
            prompt = (None, *scores)
        if params.max_tokens == 0:
            return Update(sequence.request, prompt_logprobs=prompt, finish_reason="length")
        key = f"{sequence.prompt}{params.seed}{len(sequence.tokens)}".encode()
        token = LETTERS[hashlib.sha256(key).digest()[0] % len(LETTERS)]
        sequence.tokens.append(token)
        self.generated += 1
        text, reason = sequence.text.push(token), None
        if sequence.text.stopped or token in params.stop_token_ids:
            reason = "stop"
        elif len(sequence.tokens) >= params.max_tokens:
            reason = "length"
        if reason is not None:
            text += sequence.text.finish()
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.logprobs is not None:
            rivals = tuple((97 + i, -0.5 - i) for i in range(params.logprobs))
            logprobs = (TokenLogprob(token, float("-inf"), 3, rivals),)
        return Update(
            request=sequence.request,
            tokens=(token,),
            text=text,
            logprobs=logprobs,
            prompt_logprobs=prompt,
            finish_reason=reason,
        )

    def stats(self) -> EngineStats:
        numbers = dict.fromkeys((f.name for f in fields(EngineStats)), 0)
        numbers |= {
            "waiting": len(self.waiting),
            "running": len(self.running),
            "free_sequences": self.max_sequences - len(self.running),
            "max_sequences": self.max_sequences,
            "generated_tokens": self.generated,
            "steps": self.steps,
        }
        return EngineStats(**numbers)

    def generate(self, prompts: list[list[int]], params: list[SamplingParams]) -> list[Completion]:
        """Whole answers, by an engine of its own."""
        engine = StandIn(self.max_sequences, self.max_context)
        answers = {
            engine.submit(prompt, one): Completion(prompt)
            for prompt, one in zip(prompts, params, strict=True)
        }
        while engine.busy:
            for update in engine.step():
                answers[update.request].add(update)
        return list(answers.values())


@contextmanager
def serving(engine: Any, max_queue: int = 64, heartbeat: float = 5.0, **settings: Any) -> Iterator:
    """A server in a thread. Yields `url`, `loop`, `engine`, `service`."""
    most = engine.stats().max_sequences + max_queue
    limits = Limits(max_context=settings.pop("max_context", 128), vocab_size=320, max_requests=most)
    limits = replace(limits, **settings.pop("limits", {}))
    with EngineLoop(engine, most, heartbeat) as loop:
        service = Service("tiny", loop, ByteTokenizer(), limits, **settings)
        listener = bind("127.0.0.1", 0)
        config = uvicorn.Config(create_app(service), lifespan="off", log_level="critical")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            wait_until(lambda: server.started)
            port = listener.getsockname()[1]
            yield SimpleNamespace(
                url=f"http://127.0.0.1:{port}",
                port=port,
                loop=loop,
                engine=engine,
                service=service,
            )
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive(), "a request hangs"


def wait_until(condition: Any, seconds: float = 10.0) -> None:
    """Waits for what another thread will do."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def idle(server: Any) -> bool:
    """Whether nothing is left of any request."""
    stats, loop = server.loop.stats, server.loop
    tables = (loop._open, loop._commands, loop._rounds.requests, loop._rounds.tickets)
    return (
        stats.running == stats.waiting == 0
        and stats.free_sequences == stats.max_sequences
        and not any(tables)
    )


def left_behind() -> list[object]:
    """Requests that something still holds."""
    gc.collect()
    kinds = (Generation, GeneratedResponse, Answer)
    # Of its type, because asking some objects of other packages for their class imports things.
    return [x for x in gc.get_objects() if issubclass(type(x), kinds)]
