"""The generator behind an HTTP interface: OpenAI's completions and chat completions.

    HTTP -> protocol (checks) -> loop (a thread, all ranks) -> answers (OpenAI's objects) -> HTTP

`require_packages` comes before the modules that need FastAPI and its company; `loop` needs torch
alone.
"""

from __future__ import annotations

import importlib

from megakda.errors import RuntimeMismatch

PACKAGES = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "jinja2")


def require_packages() -> None:
    """Raises RuntimeMismatch where a package of the extra `serve` is missing."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise RuntimeMismatch(
                f"serving needs the package {name} ({error}): pip install 'megakda[serve]'"
            ) from error
