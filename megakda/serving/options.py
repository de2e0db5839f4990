"""What a server is told at its start; needs no package of the extra `serve`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from megakda.config.sizes import parse_size as parse_size
from megakda.errors import ConfigError
from megakda.inference.choice import ModelChoice


@dataclass(frozen=True)
class Options:
    """What tools/serve.py takes.

    Attributes:
        model: which one, and at which layout.
        model_name: as clients call it; None: the folder's name.
        max_sequences, max_context, cache_tokens, prefill_chunk, prefix_slots: of `EngineSettings`.
        max_queue: requests that may wait beside those that run.
        max_choices: answers to one prompt.
        max_body: bytes.
        request_timeout: seconds until an answer has to be complete, waiting included.
        drain_seconds: for running requests after a signal to stop.
        chat_template: file; None: the tokenizer's own.
    """

    model: ModelChoice
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    model_name: str | None = None
    max_sequences: int = 16
    max_context: int = 4096
    cache_tokens: int | None = None
    prefill_chunk: int = 512
    prefix_slots: int = 8
    max_queue: int = 64
    max_choices: int = 16
    max_body: int = 1_000_000
    request_timeout: float = 600.0
    drain_seconds: float = 20.0
    chat_template: Path | None = None
    access_log: bool = False

    @property
    def name(self) -> str:
        """Of the model, for clients."""
        return self.model_name or self.model.path.resolve().name

    def check(self) -> None:
        """Raises ConfigError for a value that cannot work."""
        least = {"max_queue": 0, "max_choices": 1, "max_body": 1, "drain_seconds": 0}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ConfigError(f"{_flag(name)} {getattr(self, name)} must be at least {lowest}")
        if not self.request_timeout > 0:
            raise ConfigError(f"--request-timeout {self.request_timeout:g} must be above 0")
        if not 0 <= self.port < 65536:
            raise ConfigError(f"--port {self.port} must be in 0..65535 (0: any free one)")
        if self.api_key is not None and not re.fullmatch("[!-~]+", self.api_key):
            raise ConfigError(
                "the API key must consist of visible ASCII characters, at least one: set another "
                "--api-key or MEGAKDA_API_KEY"
            )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
