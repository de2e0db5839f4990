"""Runs the engine in a thread of its own, for callers in other threads, over all ranks.

An engine call is collective under tensor and pipeline parallelism, so all ranks play the same
rounds: rank 0 collects what callers want, tells the others over a gloo group of its own, and every
rank then makes the same calls. Between requests rank 0 sends an empty round now and then; without
it the others' wait would run into the time limit of collectives.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from megakda.errors import MegakdaError
from megakda.inference.request import SamplingParams, Update
from megakda.runtime.distributed import named_failures

if TYPE_CHECKING:
    from megakda.inference.engine import Engine, EngineStats

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 5.0
CHANNEL_MINUTES = 30.0
"""How long a rank waits for rank 0's next round: far longer than a round can take."""


class QueueFull(MegakdaError):
    """As many requests wait as may."""


class ShuttingDown(MegakdaError):
    """The server ends and takes no more requests, or has no more time for this one."""


class EngineFailed(MegakdaError, RuntimeError):
    """The engine raised something unexpected; it cannot be used any more."""


Item = Update | MegakdaError
Deliver = Callable[[int, Item], None]
"""Takes the index of the request in its `submit` call and what is new about it."""


@dataclasses.dataclass(frozen=True)
class _Submit:
    ticket: int
    prompt: list[int]
    params: SamplingParams


@dataclasses.dataclass(frozen=True)
class _Cancel:
    ticket: int


_Commands = list[_Submit | _Cancel]


class _Channel:
    """Rank 0's commands to the other ranks. Making one is collective."""

    def __init__(self) -> None:
        distributed = torch.distributed
        ready = distributed.is_available() and distributed.is_initialized()
        self.ranks = distributed.get_world_size() if ready else 1
        # gloo on every device: a rank that waits here must neither spin nor occupy its GPU.
        self._group = (
            distributed.new_group(backend="gloo", timeout=timedelta(minutes=CHANNEL_MINUTES))
            if self.ranks > 1
            else None
        )

    def tell(self, commands: _Commands | None) -> None:
        """On rank 0. None: the last round has been played."""
        if self._group is not None:
            torch.distributed.broadcast_object_list([commands], src=0, group=self._group)

    def hear(self) -> _Commands | None:
        """On the others."""
        assert self._group is not None, "only rank 0 has no other rank to follow"
        box: list[_Commands | None] = [None]
        torch.distributed.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


class _Rounds:
    """The calls that every rank makes, round by round."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.requests: dict[int, int] = {}  # from ticket to the engine's id
        self.tickets: dict[int, int] = {}  # and back
        self.stats: EngineStats = engine.stats()

    def play(self, commands: _Commands) -> list[tuple[int, Item]]:
        """One round: commands, one step if there is work, and what came of it, by ticket."""
        news: list[tuple[int, Item]] = []
        for command in commands:
            if isinstance(command, _Cancel):
                request = self.requests.pop(command.ticket, None)
                if request is not None:  # else it ended in the round before
                    del self.tickets[request]
                    self.engine.cancel(request)
                continue
            try:
                request = self.engine.submit(command.prompt, command.params)
            except MegakdaError as error:  # of this request alone, and the same on all ranks
                news.append((command.ticket, error))
            else:
                self.requests[command.ticket] = request
                self.tickets[request] = command.ticket
        for update in self.engine.step() if self.engine.busy else ():
            ticket = self.tickets.get(update.request)
            if ticket is None:  # the last words of a request that was cancelled
                continue
            news.append((ticket, update))
            if update.finish_reason is not None:
                del self.tickets[update.request], self.requests[ticket]
        self.stats = self.engine.stats()
        return news


def follow(engine: Engine) -> None:
    """Plays rank 0's rounds on another rank, until its `EngineLoop` stops."""
    channel = _Channel()
    rounds = _Rounds(engine)
    while (commands := channel.hear()) is not None:
        rounds.play(commands)


class EngineLoop:
    """The engine of rank 0, for callers in any thread. The other ranks run `follow`.

    Making one is collective. `start` begins, `stop` ends; a context manager does both.

    Attributes:
        max_open: requests that may run or wait at the same time.
        failure: what ended the loop, if the engine raised something unexpected. Every open request
            was told so, and every later one is refused.
        stats: the engine's, after its latest round.
    """

    def __init__(
        self, engine: Engine, max_open: int, heartbeat_seconds: float = HEARTBEAT_SECONDS
    ) -> None:
        self.max_open = max_open
        self.failure: str | None = None
        self._heartbeat = heartbeat_seconds
        self._channel = _Channel()
        self._rounds = _Rounds(engine)
        self._changed = threading.Condition()
        self._commands: _Commands = []
        self._open: dict[int, tuple[int, Deliver]] = {}  # by ticket
        self._next_ticket = 0
        self._draining = False
        self._stopping = False
        self._round_began: float | None = None
        # The current GPU belongs to a thread.
        self._gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> EngineLoop:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    @property
    def stats(self) -> EngineStats:
        return self._rounds.stats

    @property
    def open(self) -> int:
        """Requests that run or wait."""
        return len(self._open)

    @property
    def waiting(self) -> int:
        """Requests without a slot, those included that the engine has not seen yet."""
        return max(0, self.open - self.stats.running)

    @property
    def seconds_in_round(self) -> float:
        """How long the present round has taken so far; 0 between rounds."""
        began = self._round_began
        return 0.0 if began is None else time.monotonic() - began

    def start(self) -> None:
        """Begins to play rounds."""
        self._thread.start()

    def submit(
        self, requests: Sequence[tuple[list[int], SamplingParams]], deliver: Deliver
    ) -> list[int]:
        """Hands in several requests, all of them or none.

        `deliver` is called in the engine's thread, for each request until an update with a
        finish_reason or an error; it must not block.

        Returns:
            a ticket for each, for `cancel`.

        Raises:
            QueueFull: fewer than these are free.
            ShuttingDown: after `drain`, `fail_open` or `stop`.
            EngineFailed: see `failure`.
        """
        with self._changed:
            if self.failure is not None:
                raise EngineFailed(self.failure)  # a new one: each keeps its callers' frames
            if self._draining:
                raise ShuttingDown("the server is shutting down and takes no new requests")
            if len(self._open) + len(requests) > self.max_open:
                raise QueueFull(
                    f"{len(self._open)} requests run or wait and {len(requests)} more would pass "
                    f"the limit of {self.max_open}: try again later"
                )
            tickets = []
            for index, (prompt, params) in enumerate(requests):
                ticket = self._next_ticket
                self._next_ticket += 1
                self._open[ticket] = (index, deliver)
                self._commands.append(_Submit(ticket, prompt, params))
                tickets.append(ticket)
            self._changed.notify()
        return tickets

    def cancel(self, tickets: Iterable[int]) -> None:
        """Ends those that are still open, without another word to their `deliver`."""
        with self._changed:
            for ticket in tickets:
                if self._open.pop(ticket, None) is not None:
                    self._commands.append(_Cancel(ticket))
            self._changed.notify()

    def drain(self) -> None:
        """Takes no more requests; those that are open go on."""
        with self._changed:
            self._draining = True

    def fail_open(self, error: MegakdaError) -> None:
        """Takes no more requests and ends the open ones with `error`."""
        with self._changed:
            self._draining = True
            failed = list(self._open.items())
            self._open.clear()
            self._commands += [_Cancel(ticket) for ticket, _ in failed]
            self._changed.notify()
        for _, (index, deliver) in failed:
            _deliver(deliver, index, error)

    def stop(self, timeout: float = 10.0) -> None:
        """Ends open requests with ShuttingDown, and the loop on every rank."""
        self.fail_open(ShuttingDown("the server is shutting down"))
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            if self._gpu is not None:
                torch.cuda.set_device(self._gpu)
            while True:
                with self._changed:
                    if not (self._commands or self._stopping or self._rounds.engine.busy):
                        self._changed.wait(self._heartbeat)
                    commands, self._commands = self._commands, []
                    stopping = self._stopping
                self._round_began = time.monotonic()
                with named_failures():
                    self._channel.tell(commands)
                    news = self._rounds.play(commands)
                self._round_began = None
                for ticket, item in news:
                    self._tell_caller(ticket, item)
                if stopping and not commands:  # what was cancelled has been cancelled
                    self._channel.tell(None)
                    return
        except BaseException as error:
            log.critical("the engine failed", exc_info=error)
            # Only words that were meant for users go to clients.
            what = f": {error}" if isinstance(error, MegakdaError) else ""
            failure = (
                f"the engine failed ({type(error).__name__}{what}); the server's log says more, "
                "and it has to be started again"
            )
            with self._changed:
                self.failure = failure
                self._round_began = None
            self.fail_open(EngineFailed(failure))

    def _tell_caller(self, ticket: int, item: Item) -> None:
        ended = isinstance(item, MegakdaError) or item.finish_reason is not None
        with self._changed:
            entry = self._open.pop(ticket, None) if ended else self._open.get(ticket)
        if entry is not None:  # else it was cancelled while the round ran
            index, deliver = entry
            if not _deliver(deliver, index, item):
                self.cancel([ticket])


def _deliver(deliver: Deliver, index: int, item: Item) -> bool:
    try:
        deliver(index, item)
    except Exception:  # a caller's fault must not end the others' requests
        log.exception("an update could not be delivered")
        return False
    return True
