"""Counts the bytes of memory that a step of KDA moves: by kernel, by array, per token and head.

A step is interpreted at production width and few tokens, and everything that it launches counts:
its kernels, and operators of PyTorch that touch a tensor. What a kernel moves is counted once per
byte, which is the least that it can move; repetitions, which caches may serve, stand beside it.
From these bytes and a bandwidth follows a time by arithmetic. Nothing is measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megakda.kernels.kda.op import chunk_kda
from megakda.kernels.verify import interpreter
from megakda.kernels.verify.rounding import Array
from megakda.kernels.verify.storage import Argument, Arguments

WIDTH = 128
"""K and V."""

RANGE_ARRAYS = frozenset(
    {"maps", "before", "folded"}
    | {"initial_state", "final_state", "dinitial_state", "dfinal_state"}
)
"""Arrays with one state or map per range of a split sequence."""

CASES: dict[str, dict[str, Any]] = {
    "softplus gate": {"tokens": 256},
    "bounded gate": {"tokens": 256, "lower_bound": -5.0},
    "raw gate in fp32": {"tokens": 256, "gate_dtype": torch.float32},
    "in ranges": {"tokens": 1536},
}
"""What is recorded: arguments of `record_chunk_kda`."""

MAIN, SPLIT = "softplus gate", "in ranges"
PEER = "flash-linear-attention"
PEER_BYTES, PEER_LAUNCHES = (9850.0, 33100.0), (9, 12)
"""Of its `chunk_kda` at K = V = 128, chunks of 64 and bf16: taken over, not recorded here."""

TOKENS, HEADS = 8192, 64
BANDWIDTH = 4.3e12
"""Bytes per second that an H200 reaches. Times are for TOKENS and HEADS."""

_FREE = frozenset(
    {"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"}
    | {"set_", "_unsafe_view"}
)
"""Operators, besides views, that move nothing."""


@dataclass
class Launch:
    """What one launch moved.

    Attributes:
        kernel: the kernel's name, or "torch." and the name of an operator.
        programs: how many the kernel had; 0 for an operator.
        read: by argument, bytes that were loaded before the launch had stored to them.
        written: by argument, bytes that were stored to.
        accessed: bytes of all loads and stores, repetitions included.

    Operators count with all of their tensor arguments and results.
    """

    kernel: str
    programs: int = 0
    read: dict[str, int] = field(default_factory=dict)
    written: dict[str, int] = field(default_factory=dict)
    accessed: int = 0

    @property
    def unique(self) -> int:
        """The least that the launch can move."""
        return sum(self.read.values()) + sum(self.written.values())

    @property
    def repeated(self) -> int:
        return self.accessed - self.unique


@dataclass
class Step:
    """The launches of one step.

    Attributes:
        tokens, heads: of the inputs.
        forward, backward: the launches of each pass, in order.
        least: bytes of the arrays with a row per token alone: what the forward pass, and forward
            and backward pass together, cannot do without.
    """

    tokens: int
    heads: int
    forward: list[Launch]
    backward: list[Launch]
    least: tuple[int, int]

    @property
    def both(self) -> list[Launch]:
        return self.forward + self.backward

    def per_token(self, moved: int) -> float:
        """Bytes per token and head."""
        return moved / (self.tokens * self.heads)

    def unique(self, launches: list[Launch]) -> float:
        """Bytes per token and head that these launches must move."""
        return self.per_token(sum(launch.unique for launch in launches))


def record_chunk_kda(
    tokens: int,
    heads: int = 1,
    lower_bound: float | None = None,
    gate_dtype: torch.dtype = torch.bfloat16,
) -> Step:
    """Forward and backward pass of `chunk_kda` as a layer calls it, interpreted.

    K = V = 128; q, k, v and the logit of beta in bf16; norms, gate and sigmoid in the kernels.

    Args:
        tokens: of one sequence. With 24 chunks or more, and few heads, it is split into ranges.
        heads: of q, k, v alike.
        lower_bound: of the bounded gate; None for the softplus gate.
        gate_dtype: of the gate's raw input.

    Raises:
        RuntimeError: `interpreter.install` was not called.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype).requires_grad_()

    inputs = [random(1, tokens, heads, WIDTH) for _ in range(3)]  # q, k, v
    inputs += [random(1, tokens, heads, WIDTH, dtype=gate_dtype), random(1, tokens, heads)]
    A_log = random(heads, dtype=torch.float32)
    dt_bias = random(heads * WIDTH, dtype=torch.float32)
    with record_launches() as forward:
        o, _ = chunk_kda(
            *inputs,
            A_log=A_log,
            dt_bias=dt_bias,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
            safe_gate=lower_bound is not None,
            lower_bound=lower_bound,
            backend="triton",
        )
    do = torch.randn(o.shape, generator=generator).to(o.dtype)
    with record_launches() as backward:
        torch.autograd.grad(o, [*inputs, A_log, dt_bias], do)
    # Inputs are read in both passes and have gradients; o is written, its gradient read.
    read, written = sum(x.nbytes for x in inputs), o.nbytes
    return Step(tokens, heads, forward, backward, (read + written, 3 * read + 2 * written))


@contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Yields a list to which every kernel and operator in the block is added, in order.

    Raises:
        RuntimeError: `interpreter.install` was not called.
    """
    recorder = _Recorder()
    with interpreter.observed_by(recorder), _Operators(recorder):
        yield recorder.launches


class _Recorder(interpreter.Observer):
    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.running = False

    def launch_begins(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.running = True
        self.launches.append(Launch(kernel))
        self.arguments = Arguments(arguments)

    def program_begins(self, program: tuple[int, int, int]) -> None:
        self.launches[-1].programs += 1

    def load(self, addresses: Array, size: int, tensor: torch.Tensor | None) -> None:
        argument, units = self._access(addresses, size, tensor)
        own = argument.storage.marks("written", False)[units]
        _marks(argument, "read")[units[~own]] = True

    def store(self, addresses: Array, size: int, tensor: torch.Tensor | None) -> None:
        argument, units = self._access(addresses, size, tensor)
        argument.storage.marks("written", False)[units] = True
        _marks(argument, "written")[units] = True

    def launch_ends(self) -> None:
        self.running = False
        launch = self.launches[-1]
        for argument in self.arguments:
            unit = argument.storage.unit
            for kind, counted in (("read", launch.read), ("written", launch.written)):
                if moved := unit * int(_marks(argument, kind).sum()):
                    counted[argument.name] = moved

    def _access(
        self, addresses: Array, size: int, tensor: torch.Tensor | None
    ) -> tuple[Argument, Array]:
        launch = self.launches[-1]
        launch.accessed += addresses.size * size
        argument = self.arguments.find(tensor, addresses)
        if argument is None:
            raise ValueError(f"{launch.kernel}: addresses of no tensor argument")
        return argument, argument.storage.units(addresses, size)


def _marks(argument: Argument, kind: str) -> Array:
    return argument.storage.marks(f"{kind} as {argument.name}", False)


class _Operators(TorchDispatchMode):
    """Counts operators of PyTorch, but for those that the interpreter runs within a launch."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (self.recorder.running or func.is_view or name in _FREE):
            launch = Launch(f"torch.{name}")
            launch.read = _sizes("input", (args, kwargs))
            launch.written = _sizes("output", result)
            launch.accessed = launch.unique
            self.recorder.launches.append(launch)
        return result


def _sizes(name: str, values: Any) -> dict[str, int]:
    """Bytes of all tensors in `values`; of an expanded one no more than its storage has."""
    tensors = [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]
    return {
        f"{name} {i}": min(x.nbytes, x.untyped_storage().nbytes()) for i, x in enumerate(tensors)
    }


# ------------------------------------------------------------------ report


def record_cases() -> dict[str, Step]:
    """All of CASES.

    Raises:
        RuntimeError: `interpreter.install` was not called.
    """
    return {name: record_chunk_kda(**arguments) for name, arguments in CASES.items()}


def write(path: Path, steps: dict[str, Step]) -> None:
    """Puts the steps into the JSON file, and tables of them into a Markdown file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: asdict(step) for name, step in steps.items()}
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(steps))


def read(path: Path) -> dict[str, Step]:
    """The steps that `write` put into the JSON file."""
    steps = {}
    for name, content in json.loads(path.read_text()).items():
        for part in ("forward", "backward"):
            content[part] = [Launch(**launch) for launch in content[part]]
        steps[name] = Step(**content | {"least": tuple(content["least"])})
    return steps


def markdown(steps: dict[str, Step]) -> str:
    """The summary, and every launch of all cases but the bounded gate, which repeats the first."""
    lines = [
        "# Bytes that KDA moves",
        "",
        "Written by `tools/kernel_bytes.py`, without a GPU: every load and store of `chunk_kda`,",
        f"run in the interpreter with K = V = {WIDTH}. q, k, v and beta are bf16, and so is the",
        "raw gate unless it is said to be fp32; norms, gate and sigmoid are taken in the kernels.",
        "Bytes are per token and head; 1 KB is 1000 bytes. Each byte counts once per launch.",
        "",
        *summary(steps),
        "",
        f"Times are arithmetic, not measurements: the bytes of {TOKENS} tokens and {HEADS} heads",
        f"over {BANDWIDTH / 1e12:g} TB/s. Launches are those of the forward pass, and of the",
        "backward pass with the two sums of PyTorch over chunks, for the gradients of A_log and",
        f"dt_bias. The figures of {PEER} are taken over, not recorded here.",
    ]
    for name, step in steps.items():
        if step.unique(step.both) == steps[MAIN].unique(steps[MAIN].both) and name != MAIN:
            continue
        lines += ["", f"## {name}: {step.tokens} tokens, {step.heads} head", "", *table(step)]
        if name == SPLIT:
            lines += ["", *_on_ranges(step)]
    lines += [
        "",
        "Repeated are bytes that a launch had touched before; caches may serve them. Arrays of",
        "less than 0.05 bytes are left out of the lists, but not of the sums. What does not grow",
        "with the tokens, such as dt_bias, weighs more here than in a longer sequence. Memory is",
        "read by 32 bytes at a time: of beta, whose neighbours belong to other heads, as much may",
        "be read for 2 bytes where no cache holds the rest.",
    ]
    return "\n".join(lines) + "\n"


def summary(steps: dict[str, Step]) -> list[str]:
    """KB per token and head, launches, and time by arithmetic, as lines of a Markdown table."""
    rows: list[tuple[str, tuple[float, float], tuple[int, int] | None, bool]] = []
    main = steps[MAIN]
    least = (main.per_token(main.least[0]), main.per_token(main.least[1]))
    rows.append(("least: inputs, outputs and gradients, once each", least, None, True))
    for name, step in steps.items():
        moved = step.unique(step.forward), step.unique(step.both)
        launches = len(step.forward), len(step.backward)
        rows.append((name, moved, launches, name != SPLIT))  # so many heads are not split
    rows.append((PEER, PEER_BYTES, PEER_LAUNCHES, True))
    lines = [
        "| | forward, KB | forward and backward, KB | launches | forward, ms | both, ms |",
        "|---|---|---|---|---|---|",
    ]
    for name, moved, counts, timed in rows:
        kilobytes = " | ".join(f"{x / 1000:.2f}" for x in moved)
        shown = f"{counts[0]} + {counts[1]}" if counts else ""
        times = [f"{x * TOKENS * HEADS / BANDWIDTH * 1e3:.2f}" if timed else "" for x in moved]
        lines.append(f"| {name} | {kilobytes} | {shown} | {' | '.join(times)} |")
    return lines


def table(step: Step) -> list[str]:
    """Every launch with the bytes of its arrays, as lines of a Markdown table."""
    lines = [
        "| pass | launch | moved | repeated | reads | writes |",
        "|---|---|---|---|---|---|",
    ]
    for name, launches in (("forward", step.forward), ("backward", step.backward)):
        for x in launches:
            arrays = " | ".join(
                ", ".join(
                    f"{array} {step.per_token(moved):.4g}"
                    for array, moved in counted.items()
                    if step.per_token(moved) >= 0.05
                )
                for counted in (x.read, x.written)
            )
            moved, repeated = step.per_token(x.unique), step.per_token(x.repeated)
            lines.append(f"| {name} | {x.kernel} | {moved:.0f} | {repeated:.0f} | {arrays} |")
        total = step.unique(launches)
        lines.append(f"| {name} | sum | {total:.0f} | | | |")
    return lines


def _on_ranges(step: Step) -> list[str]:
    forward, both = (
        step.per_token(
            sum(
                moved
                for x in launches
                for array, moved in (*x.read.items(), *x.written.items())
                if array in RANGE_ARRAYS
            )
        )
        for launches in (step.forward, step.both)
    )
    return [
        f"Of these, {forward:.0f} bytes forward and {both:.0f} forward and backward are states and",
        "maps, one for each range. Ranges are 8 chunks here, the least; with ranges of 32 chunks",
        "they are a quarter.",
    ]
