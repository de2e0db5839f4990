"""A model as a server: from a folder and options to a socket that answers, and back."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import shlex
import socket
import time
from collections.abc import Callable
from pathlib import Path

import uvicorn

import megakda.runtime
from megakda.errors import ConfigError
from megakda.inference.chat import load_template, read_template
from megakda.runtime.distributed import StopSignals, named_failures, rank
from megakda.serving.app import Service, create_app
from megakda.serving.loop import EngineLoop, ShuttingDown, follow
from megakda.serving.options import Options
from megakda.serving.protocol import Limits

CLOSING_SECONDS = 5
"""For connections to take what has been written, after their requests have ended."""
_LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(options: Options) -> None:
    """Serves until a signal; collective over all ranks, of which rank 0 listens.

    Raises:
        MegakdaError: a problem that a person can solve; the message says how.
    """
    options.check()
    megakda.runtime.install(options.model.runtime.device)
    from megakda.inference.engine import Engine, EngineSettings

    settings = EngineSettings(
        max_sequences=options.max_sequences,
        max_context=options.max_context,
        cache_tokens=options.cache_tokens,
        prefill_chunk=options.prefill_chunk,
        prefix_slots=options.prefix_slots,
    )
    settings.check()
    source = read_template(options.chat_template) if options.chat_template else None
    with contextlib.ExitStack() as stack:
        if rank() == 0:  # before the model is read, which can take minutes
            listener = stack.enter_context(contextlib.closing(bind(options.host, options.port)))
        model = stack.enter_context(options.model.open())
        template = load_template(model.tokenizer, source)
        engine = Engine(model, settings)
        # Other ranks get the same signals from torchrun, and end when rank 0 says so.
        stack.enter_context(StopSignals())
        if rank() != 0:
            with named_failures():
                follow(engine)
            return
        most = options.max_sequences + options.max_queue
        loop = stack.enter_context(EngineLoop(engine, max_open=most))
        service = Service(
            name=options.name,
            loop=loop,
            tokenizer=model.tokenizer,
            limits=Limits(
                max_context=options.max_context,
                vocab_size=model.config.vocab_size,
                max_choices=min(options.max_choices, most),
                max_requests=most,
            ),
            template=template,
            max_body=options.max_body,
            request_seconds=options.request_timeout,
            api_key=options.api_key,
        )

        def greet() -> None:
            print(greeting(options, service, model.source, listener), flush=True)

        config = uvicorn.Config(
            create_app(service),
            lifespan="off",
            log_level="info" if options.access_log else "warning",
            access_log=options.access_log,
            timeout_graceful_shutdown=CLOSING_SECONDS,
        )
        Server(config, loop, options.drain_seconds, greet).run(sockets=[listener])


class Server(uvicorn.Server):
    """Lets running requests end before it stops, but not for ever."""

    def __init__(
        self,
        config: uvicorn.Config,
        loop: EngineLoop,
        drain_seconds: float,
        greet: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._loop, self._drain_seconds, self._greet = loop, drain_seconds, greet

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._greet()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Closes the door, waits for requests (a second Ctrl-C ends that), fails the rest."""
        for server in self.servers:
            server.close()
        self._loop.drain()
        end = time.monotonic() + self._drain_seconds
        if self._loop.open:
            print(
                f"stopping; {self._loop.open} requests have {self._drain_seconds:g} s", flush=True
            )
        while self._loop.open and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.05)
        self._loop.fail_open(ShuttingDown("the server is shutting down"))
        await super().shutdown(sockets)


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which nobody else uses.

    Raises:
        ConfigError: it is in use, not this machine's, or not allowed.
    """
    where = f"--host {host} --port {port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(
            f"{where}: no such address ({error}): use 127.0.0.1 for this machine alone, or 0.0.0.0"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        remedy = {
            errno.EADDRINUSE: "another program listens there: end it, or choose another --port",
            errno.EACCES: "ports below 1024 belong to the system: choose another --port",
            errno.EADDRNOTAVAIL: "this machine does not have that address: choose another --host",
        }.get(error.errno or 0, str(error))
        raise ConfigError(f"{where}: {remedy}") from error
    return listener


def greeting(options: Options, service: Service, source: Path, listener: socket.socket) -> str:
    """What a person wants to know when the server is up."""
    host, port = options.host, listener.getsockname()[1]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    url = f"http://[{shown}]:{port}/v1" if ":" in shown else f"http://{shown}:{port}/v1"
    body = f'{{"model": "{service.name}", "prompt": "def ", "max_tokens": 64}}'
    key = '-H "Authorization: Bearer $MEGAKDA_API_KEY" ' if options.api_key else ""
    lines = [
        f"serving {source} as {service.name!r} at {url}",
        f"{options.max_sequences} sequences at once, {options.max_queue} may wait, "
        f"{options.max_context:,} tokens of context, "
        + ("chat template found" if service.template else "no chat template: completions only"),
        "try:",
        f"  curl {url}/completions {key}-H 'Content-Type: application/json' -d {shlex.quote(body)}",
    ]
    if host not in _LOCAL and options.api_key is None:
        lines.append(
            f"warning: --host {host} without an API key lets everyone in who reaches this port: "
            "set --api-key or MEGAKDA_API_KEY"
        )
    return "\n".join(lines)
