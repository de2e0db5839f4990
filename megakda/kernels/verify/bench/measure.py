"""Times and peak memory of one call."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

FLUSH_BYTES = 256 << 20
"""Written before each repetition on a GPU: more than any level-2 cache holds."""

LEAST_REPEATS = 3

Lap = Callable[[], None]
Step = Callable[[Lap], None]  # calls lap() after each part that is timed by itself


class Clock:
    """Seconds between laps of a step, on a CPU or on the current GPU."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def time(self, step: Step) -> list[float]:
        """Runs the step once: seconds of each lap.

        On a GPU the cache is emptied first. That also keeps it busy while the first launches are
        being prepared, so that a lap begins when the work does.
        """
        if not self.cuda:
            stamps = [time.perf_counter()]
            step(lambda: stamps.append(time.perf_counter()))
            return [b - a for a, b in zip(stamps, stamps[1:], strict=False)]
        events: list[torch.cuda.Event] = []

        def lap() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        self._flush.zero_()
        lap()
        step(lap)
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e-3 for a, b in zip(events, events[1:], strict=False)]


def interleave(
    clock: Clock, steps: dict[str, Step], repeats: int, seconds: float
) -> dict[str, list[list[float]]]:
    """Laps of every step, taken in turns so that a noisy minute hits all alike.

    Args:
        clock: which times.
        steps: by name.
        repeats: of each step.
        seconds: a step that has had this long stops early, after `LEAST_REPEATS`.
    """
    laps: dict[str, list[list[float]]] = {name: [] for name in steps}
    for step in steps.values():  # compiles, tunes and allocates
        clock.time(step)
    for _ in range(repeats):
        for name, step in steps.items():
            spent = sum(map(sum, laps[name]))
            if spent < seconds or len(laps[name]) < LEAST_REPEATS:
                laps[name].append(clock.time(step))
    return laps


def summary(seconds: Iterable[float]) -> dict[str, float]:
    """Median, least, quartiles and 90th percentile in milliseconds."""
    values = sorted(1e3 * x for x in seconds)

    def quantile(fraction: float) -> float:
        place = fraction * (len(values) - 1)
        low = int(place)
        high = min(low + 1, len(values) - 1)
        return values[low] + (place - low) * (values[high] - values[low])

    return {
        "median_ms": statistics.median(values),
        "min_ms": values[0],
        "q1_ms": quantile(0.25),
        "q3_ms": quantile(0.75),
        "p90_ms": quantile(0.9),
        "repeats": len(values),
    }


def cuda_peak(function: Callable[[], Any]) -> int:
    """Bytes that were allocated on the GPU at most, beyond those before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def cpu_peak(function: Callable[[], Any]) -> int:
    """Bytes that this process had in memory at most, beyond those before (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _status("VmRSS")
    function()
    return _status("VmHWM") - before


def cpu_peak_elsewhere(task: dict[str, Any]) -> dict[str, int]:
    """Peaks of a side in a process of its own, where no earlier work has left memory to reuse.

    Args:
        task: what `bench.peak` reads.

    Returns:
        Bytes by mode.

    Raises:
        RuntimeError: the process failed.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    # Large tensors go back to the system when they are freed, so the peak is that of live memory.
    environment["MALLOC_MMAP_THRESHOLD_"] = "131072"
    root = str(Path(__file__).resolve().parents[4])
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "megakda.kernels.verify.bench.peak", json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the memory of {task} was not measured: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written per second by copying a gibibyte on a GPU, best of 20."""
    source = torch.empty(1 << 30, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    clock = Clock(device)

    def step(lap: Lap) -> None:
        target.copy_(source)
        lap()

    return 2 * source.numel() / min(clock.time(step)[0] for _ in range(20))


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {name}")
