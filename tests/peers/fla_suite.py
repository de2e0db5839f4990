"""A pytest plugin: flash-linear-attention's own tests of KDA, unmodified, on megakda's operators.

    make test-peers FLA=path/to/a/checkout

The tests are read from the checkout and the library from the installed fla-core; in its modules,
`chunk_kda`, `fused_recurrent_kda` and `fused_kda_gate` are replaced before a test imports them.
Where there is no GPU, the tests run on the CPU.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import pytest

DIFFERENT = {
    "test_chunk_invalid_chunk_size": "chunks of 16 tokens are allowed here",
    "test_gate[B1-T2-H2-D12-a_logTrue-biasFalse-lowerbound-5.0]": "the fp32 formula that is taken "
    "for the truth there is off by 2e-4 in the gradient of A_log",
}
"""Tests that may fail, and why: by function, or by full name."""

WITHOUT_EFFECT = ("disable_recompute", "cu_seqlens_cpu")
"""Arguments of fla's operators that are about memory or speed, never about results."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("megakda")
    group.addoption(
        "--kda-backend",
        choices=("torch", "triton", "reference"),
        help="backend of megakda's operators; triton is interpreted where there is no GPU "
        "(default: triton on a GPU, else torch)",
    )
    group.addoption(
        "--kda-limit",
        type=int,
        default=0,
        help="skip tests with more than this many numbers in the states of all tokens, which "
        "fla's reference keeps: 300000000 take 6.3 GiB (default: 0, no limit)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Before the checkout's conftest.py, which asks fla for its device."""
    backend = early_config.known_args_namespace.kda_backend
    import torch

    if torch.cuda.is_available():
        replace(backend)
        return
    if backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
        from megakda.kernels.verify import interpreter

        interpreter.install()
    # fla takes a machine without a GPU for one with.
    utils = importlib.import_module("fla.utils")
    utils.device, utils.device_torch_lib = "cpu", torch.cpu
    replace(backend)


def replace(backend: str | None) -> None:
    """Puts megakda's operators in the place of fla's."""
    from megakda.kernels.kda import chunk_kda, fused_recurrent_kda, kda_gate

    def gate(
        g: Any, A_log: Any, dt_bias: Any = None, lower_bound: float | None = None, **kwargs: Any
    ) -> Any:
        return kda_gate(g, A_log, dt_bias, lower_bound, backend=backend, **kwargs)

    replacements: dict[str, Callable[..., Any]] = {
        "chunk_kda": adapted(chunk_kda, backend),
        "fused_recurrent_kda": adapted(fused_recurrent_kda, backend),
        "fused_kda_gate": gate,
    }
    package = importlib.import_module("fla.ops.kda")
    found = set()
    for module in ("", ".chunk", ".fused_recurrent", ".gate"):
        target = importlib.import_module(package.__name__ + module)
        for name, function in replacements.items():
            if callable(getattr(target, name, None)):
                setattr(target, name, function)
                found.add(name)
    if missing := replacements.keys() - found:
        raise RuntimeError(
            f"this release of fla has no {', '.join(sorted(missing))} in fla.ops.kda"
        )


def adapted(operator: Callable[..., Any], backend: str | None) -> Callable[..., Any]:
    """`operator` with what fla's has besides."""
    # fla's has no backward pass, and its tests call it on tensors that require a gradient.
    forward_only = operator.__name__ == "fused_recurrent_kda" and backend == "triton"

    @wraps(operator)
    def call(*args: Any, **kwargs: Any) -> Any:
        for name in WITHOUT_EFFECT:
            kwargs.pop(name, None)
        if "transpose_state_layout" in kwargs:
            if "state_v_first" in kwargs:
                raise ValueError("state_v_first: given twice, as transpose_state_layout too")
            warnings.warn("transpose_state_layout is now state_v_first", DeprecationWarning, 2)
            kwargs["state_v_first"] = kwargs.pop("transpose_state_layout")
        if not forward_only:
            return operator(*args, **kwargs, backend=backend)
        import torch

        with torch.no_grad():
            return operator(*args, **kwargs, backend=backend)

    return call


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    limit = config.getoption("--kda-limit")
    for item in items:
        for name in (item.name, getattr(item, "originalname", None)):
            if name in DIFFERENT:
                item.add_marker(pytest.mark.xfail(reason=DIFFERENT[name]))
        size = numbers_in_states(item)
        if limit and size > limit:
            item.add_marker(pytest.mark.skip(reason=f"{size} numbers in states: see --kda-limit"))


def numbers_in_states(item: pytest.Item) -> int:
    """B*T*HV*K*V of a test, as far as its parameters say."""
    callspec = getattr(item, "callspec", None)
    params = {} if callspec is None else callspec.params
    batch, heads, size = params.get("B", 1), params.get("H", 1), params.get("D", 1)
    tokens = params["cu_seqlens"][-1] if "cu_seqlens" in params else params.get("T", 1)
    return batch * tokens * params.get("HV", heads) * size * size
