"""What a measurement ran on: hardware, versions, commit, load."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "fla-core", "flash-linear-attention", "flash-kda", "transformers")
VARIABLES = ("OMP_NUM_THREADS", "FLA_FLASH_KDA", "FLA_TILELANG", "CUDA_VISIBLE_DEVICES")
ROOT = Path(__file__).resolve().parents[4]


def describe(device: torch.device, command: list[str]) -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat a measurement."""
    return {
        "command": " ".join(command),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len((_git("status", "--porcelain") or "").splitlines()),
        "hardware": _gpu(device) if device.type == "cuda" else _cpu(),
        "versions": {"python": sys.version.split()[0], **_versions(), "cuda": torch.version.cuda},
        "variables": _variables(),
        "load_average": os.getloadavg(),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None  # an installed package has no history
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _variables() -> dict[str, str]:
    names = (*VARIABLES, *(name for name in os.environ if name.startswith("MALLOC_")))
    return {name: os.environ[name] for name in names if name in os.environ}


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
    }


def _cpu() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    memory = [line.split()[1] for line in _lines("/proc/meminfo") if line.startswith("MemTotal")]
    return {
        "name": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": int(memory[0]) << 10 if memory else None,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []  # not Linux
