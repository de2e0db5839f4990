"""Jobs for the rank pool: the tool at a layout."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import megakda

ROOT = Path(megakda.__file__).resolve().parents[1]


def tool():
    """tools/evaluate.py as a module."""
    spec = importlib.util.spec_from_file_location("evaluate_tool", ROOT / "tools" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluate(command: Sequence[str]) -> tuple[int, str]:
    """Exit status and output of a command line."""
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if command[0] == "lm-eval":  # its report on the machine takes longer than the tasks
            nothing = mock.patch("lm_eval.evaluator.add_env_info", lambda results: None)
            stack.enter_context(nothing)
        status = tool().main(list(command))
    return status, out.getvalue()
