"""Times, bytes and memory of one operator over a sequence that several CPU ranks hold.

Each number of ranks is a gloo world of fresh processes, one thread each: one world for times and
bytes, and one for memory, whose allocator gives large tensors back as soon as they are freed, so
that the peak is that of what lives.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from megakda.errors import CommunicationError, RuntimeMismatch
from megakda.layers.context_layout import LAYOUTS, ContextLayout, Documents
from megakda.runtime import install
from megakda.runtime.collectives import Collective, record_collectives

# megatron-core is imported by the operators, in the worlds' processes alone.

DEVICE = torch.device("cpu")

ALONE = "one rank"
MODES = {"kda": ("state", "heads", "two_level"), "mla": ("all_gather", "ring")}
SEVERAL_GROUPS = 4
"""Ranks from which two_level, with heads groups of 2, is something else than the other modes."""

SAMPLE_SECONDS = 1e-3

MEMORY = {"MALLOC_MMAP_THRESHOLD_": "131072"}
TIME = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}


@dataclass(frozen=True)
class Case:
    """One operator: its mode or way of exchange, on `ranks` ranks, over one row of `tokens`."""

    layer: str
    mode: str
    layout: str
    ranks: int
    tokens: int


@dataclass(frozen=True)
class Sizes:
    """Of the operators: heads and their size (KDA: keys and values, MLA: own keys and values),
    width of the latent and of the shared key part, taps of the convolution."""

    heads: int = 4
    head_dim: int = 64
    latent: int = 128
    shared: int = 32
    taps: int = 4


@dataclass(frozen=True)
class Row:
    """What was measured of a case.

    Attributes:
        forward_ms, backward_ms: the median over repetitions of the slowest rank's time.
        forward_bytes, backward_bytes: of one rank, the most of all; of each exchange those that are
            sent or received, whichever is more.
        peak_bytes: of memory that a rank's process had beyond that before, at most, in a forward
            and backward pass; the most of all ranks.
        ranks_ms: medians by rank, forward and backward.
    """

    case: Case
    forward_ms: float
    backward_ms: float
    forward_bytes: int
    backward_bytes: int
    peak_bytes: int
    ranks_ms: tuple[tuple[float, float], ...]


def cases(
    layers: Sequence[str], ranks: Sequence[int], tokens: dict[str, Sequence[int]]
) -> list[Case]:
    """Every mode, layout, number of ranks and length of `tokens[layer]` that go together."""
    found = []
    for layer in layers:
        for length in tokens[layer]:
            for n in ranks:
                modes = [
                    mode for mode in MODES[layer] if mode != "two_level" or n >= SEVERAL_GROUPS
                ]
                if n == 1:
                    found.append(Case(layer, ALONE, "contiguous", 1, length))
                    continue
                found += [Case(layer, mode, kind, n, length) for mode in modes for kind in LAYOUTS]
    return found


def measure(
    wanted: Sequence[Case],
    sizes: Sizes,
    repeats: int,
    note: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Measures cases, those of the same number of ranks in one world.

    Args:
        repeats: timed after one run that is not.
        note: told what is going on.

    Raises:
        ValueError: rows that a layout cannot cut, or heads that cannot be shared.
        CommunicationError: a rank failed or did not answer.
    """
    for case in wanted:
        ContextLayout(case.layout, case.ranks).segment_length(case.tokens)
        if sizes.heads % case.ranks and case.mode in ("heads", "two_level"):
            raise ValueError(
                f"{sizes.heads} heads cannot be shared by {case.ranks} ranks: raise --heads"
            )
    rows: dict[Case, Row] = {}
    for ranks in dict.fromkeys(case.ranks for case in wanted):
        mine = [case for case in wanted if case.ranks == ranks]
        note(f"{len(mine)} cases on {ranks} rank{'s' if ranks > 1 else ''}")
        times = _world(ranks, TIME, _time, mine, sizes, repeats)
        peaks = _world(ranks, MEMORY, _peak, mine, sizes)
        for n, case in enumerate(mine):
            rows[case] = _row(case, [found[n] for found in times], [found[n] for found in peaks])
    return [rows[case] for case in wanted]


def as_data(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Flat dictionaries, as JSON can hold them."""
    flat = []
    for row in rows:
        data = asdict(row)
        flat.append({**data.pop("case"), **data})
    return flat


def _row(case: Case, times: list[_Times], peaks: list[int]) -> Row:
    slowest = [[max(laps) for laps in zip(*ways, strict=True)] for ways in _by_way(times)]
    forward, backward = (1e3 * statistics.median(laps) for laps in slowest)
    return Row(
        case,
        forward,
        backward,
        max(found.forward_bytes for found in times),
        max(found.backward_bytes for found in times),
        max(peaks),
        tuple(
            (1e3 * statistics.median(x.forward), 1e3 * statistics.median(x.backward)) for x in times
        ),
    )


def _by_way(times: list[_Times]) -> list[list[list[float]]]:
    """Seconds [forward or backward][rank][repetition]."""
    return [[found.forward for found in times], [found.backward for found in times]]


# ------------------------------------------------------------------ on each rank


@dataclass(frozen=True)
class _Times:
    forward: list[float]  # seconds of each repetition
    backward: list[float]
    forward_bytes: int
    backward_bytes: int


class _Step:
    """An operator and its inputs on this rank; on each call one forward and backward pass."""

    def __init__(self, case: Case, sizes: Sizes):
        from megakda.layers.context_parallel import ContextParallel

        groups = _groups(case)
        self.context = ContextParallel(
            ContextLayout(case.layout, case.ranks),
            None if case.ranks == 1 else torch.distributed.group.WORLD,
            attention=case.mode if case.layer == "mla" and case.ranks > 1 else "all_gather",
            **groups,
        )
        self.documents = Documents.whole_rows(1, case.tokens)
        self.own = case.tokens // case.ranks
        self.sizes = sizes
        self.generator = torch.Generator().manual_seed(self.context.rank)
        self.run = self._kda() if case.layer == "kda" else self._mla()

    def __call__(self, lap: Callable[[], None] = lambda: None) -> None:
        for x in self.inputs:
            x.grad = None
        out = self.run()
        lap()
        out.backward(torch.ones_like(out))
        lap()

    def _new(self, *shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=self.generator)
        return x.requires_grad_()

    def _kda(self) -> Callable[[], torch.Tensor]:
        from megakda.layers.kda_context_parallel import kda_context_parallel

        heads, dim, taps = self.sizes.heads, self.sizes.head_dim, self.sizes.taps
        q, k, v, g = (self._new(1, self.own, heads, dim) for _ in range(4))
        beta = self._new(1, self.own, heads)
        weights = [self._new(heads * dim, taps) for _ in range(3)]
        a_log, dt_bias = self._new(heads), self._new(heads * dim)
        self.inputs = [q, k, v, g, beta, *weights, a_log, dt_bias]
        return lambda: kda_context_parallel(
            q,
            k,
            v,
            g,
            beta,
            context=self.context,
            documents=self.documents,
            conv_weights=weights,
            A_log=a_log,
            dt_bias=dt_bias,
            use_gate_in_kernel=True,
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
        )[0]

    def _mla(self) -> Callable[[], torch.Tensor]:
        from megakda.layers.mla_context_parallel import LatentHeads, latent_attention

        s = self.sizes
        q = self._new(self.own, s.heads, s.head_dim + s.shared)
        latent = self._new(self.own, s.latent + s.shared)
        weight = self._new(s.heads * 2 * s.head_dim, s.latent)
        self.inputs = [q, latent, weight]
        scale = (s.head_dim + s.shared) ** -0.5
        heads = LatentHeads(s.latent, s.head_dim, s.shared, s.head_dim, scale)
        return lambda: latent_attention(
            q, latent, weight, heads=heads, context=self.context, documents=self.documents
        )


def _groups(case: Case) -> dict[str, Any]:
    """Heads and state groups of this rank; all ranks make all groups."""
    if case.ranks == 1 or case.layer == "mla":
        return {}
    whole = torch.distributed.group.WORLD
    if case.mode != "two_level":
        return {"state_group" if case.mode == "state" else "heads_group": whole}
    rank, ranks = torch.distributed.get_rank(), case.ranks
    neighbours = [[n, n + 1] for n in range(0, ranks, 2)]
    across = [list(range(n, ranks, 2)) for n in range(2)]
    heads = [torch.distributed.new_group(members) for members in neighbours]
    states = [torch.distributed.new_group(members) for members in across]
    return {"heads_group": heads[rank // 2], "state_group": states[rank % 2]}


def _time(wanted: Sequence[Case], sizes: Sizes, repeats: int) -> list[_Times]:
    found = []
    for case in wanted:
        step = _Step(case, sizes)
        with record_collectives() as calls:
            marks: list[int] = []
            step(lambda calls=calls, marks=marks: marks.append(len(calls)))  # type: ignore[misc]
        laps = [_laps(step) for _ in range(repeats)]
        found.append(
            _Times(
                [forward for forward, _ in laps],
                [backward for _, backward in laps],
                _bytes(calls[: marks[0]]),
                _bytes(calls[marks[0] :]),
            )
        )
    return found


def _laps(step: _Step) -> tuple[float, float]:
    torch.distributed.barrier()
    stamps = [time.perf_counter()]
    step(lambda: stamps.append(time.perf_counter()))
    return stamps[1] - stamps[0], stamps[2] - stamps[1]


def _bytes(calls: Sequence[Collective]) -> int:
    """A ring's isend and irecv are two calls, each of which moves bytes one way."""
    ways: dict[str, int] = {"isend": 0, "irecv": 0}
    total = 0
    for call in calls:
        if call.operation in ways:
            ways[call.operation] += call.sent + call.received
        else:
            total += max(call.sent, call.received)
    return total + max(ways.values())


def _peak(wanted: Sequence[Case], sizes: Sizes) -> list[int]:
    found = []
    for case in wanted:
        warm = Case(case.layer, case.mode, case.layout, case.ranks, 16 * case.ranks)
        _Step(warm, sizes)()  # what is loaded and connected only once does not count
        step = _Step(case, sizes)
        gc.collect()
        torch.distributed.barrier()
        with _Memory() as memory:
            step()
        found.append(memory.peak)
    return found


class _Memory:
    """Anonymous memory of this process while the context lasts, sampled (Linux).

    Not the kernel's own peak: that counts pages of libraries too, which come and go.

    Attributes:
        peak: bytes at most, beyond those at the start.
    """

    def __enter__(self) -> _Memory:
        self._start = self._most = _anonymous_bytes()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def peak(self) -> int:
        return self._most - self._start

    def _watch(self) -> None:
        while not self._end.wait(SAMPLE_SECONDS):
            self._most = max(self._most, _anonymous_bytes())


def _anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
    raise RuntimeMismatch("/proc/self/status has no RssAnon: memory is measured on Linux alone")


# ------------------------------------------------------------------ worlds


def _world(ranks: int, variables: dict[str, str], job: Callable[..., Any], *args: Any) -> list[Any]:
    """`job(*args)` on each rank of a world of its own; the results in the order of ranks."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, _environment(variables):
        workers = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, ranks, f"{folder}/store", job, args), daemon=True
            )
            process.start()
            theirs.close()
            workers.append((process, ours))
        try:
            return _results([pipe for _, pipe in workers])
        finally:
            for process, _ in workers:
                process.kill()
                process.join()


def _results(pipes: list[Connection]) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        for pipe in wait([pipe for n, pipe in enumerate(pipes) if n not in results]):
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                error, results[rank] = pipes[rank].recv()
            except EOFError:
                error = "its process died"
            if error is not None:
                raise CommunicationError(f"rank {rank} of {len(pipes)} failed: {error}")
    return [results[rank] for rank in range(len(pipes))]


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """What processes started meanwhile inherit: no GPU, one thread, these variables alone."""
    before = dict(os.environ)
    try:
        for name in (*TIME, *MEMORY):
            os.environ.pop(name, None)
        os.environ.update(variables, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(
    pipe: Connection, rank: int, ranks: int, store: str, job: Callable[..., Any], args: Any
) -> None:
    try:
        torch.set_num_threads(1)
        install("cpu")
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(minutes=5),
        )
        found = job(*args)
        torch.distributed.barrier()
        pipe.send((None, found))
    except BaseException:
        pipe.send((traceback.format_exc(), None))
