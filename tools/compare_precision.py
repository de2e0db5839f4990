#!/usr/bin/env python3
"""Trains `tiny` in fp32 and in bf16 on the same data and draws both losses into docs/figures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megakda.metrics.plot import plot_runs  # noqa: E402
from megakda.metrics.writers import read_metrics  # noqa: E402

SETTINGS = (
    "model=tiny",
    "train.steps=200",
    "train.context=128",
    "train.global_batch=16",
    "train.micro_batch=16",
    "train.eval_every=50",
    "optim.lr=4e-3",
    "schedule.warmup_steps=20",
    "schedule.decay_steps=60",
)


def main() -> int:
    runs = []
    for precision in ("fp32", "bf16"):
        out = Path(f"runs/precision_{precision}")
        shutil.rmtree(out, ignore_errors=True)
        command = [sys.executable, "-m", "megakda.train", *SETTINGS, f"precision={precision}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([*command, f"train.out={out}"], env=environment, check=True)
        runs.append(out)
    print(plot_runs(runs, ROOT / "docs/figures/precision.png", labels=["fp32", "bf16"]))
    fp32, bf16 = ([row["loss"] for row in read_metrics(run / "metrics.jsonl")] for run in runs)
    gaps = [abs(b - a) for a, b in zip(fp32, bf16, strict=True)]
    print(f"largest gap {max(gaps):.4f}, mean gap of the last 50 steps {sum(gaps[-50:]) / 50:.4f}")
    for name, run in zip(("fp32", "bf16"), runs, strict=True):
        rows = read_metrics(run / "metrics.jsonl")
        valid = [row["valid_loss"] for row in rows if "valid_loss" in row]
        print(f"{name}: validation loss {valid[-1]:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
