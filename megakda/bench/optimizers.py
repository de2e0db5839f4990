"""AdamW against Muon on real text: a sweep of learning rates for both, and steps to a loss.

Both have the same model, data, schedule, weight decay and seeds; each is judged at its own best
learning rate of the sweep. The question is how many steps Muon takes to the validation loss at
which AdamW ends.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megakda.metrics.writers import METRICS_FILE, read_metrics

DEVICE = torch.device("cpu")
OPTIMIZERS = ("adamw", "muon")
_COLORS = {"adamw": "#D55E00", "muon": "#0072B2"}  # Okabe and Ito's
_NAMES = {"adamw": "AdamW", "muon": "Muon"}


@dataclass(frozen=True)
class Settings:
    """What all runs have in common, and the grid."""

    steps: int = 300
    context: int = 128
    batch: int = 16
    warmup: int = 20
    decay: int = 100
    eval_every: int = 10
    eval_batches: int = 8
    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
    seeds: tuple[int, ...] = (1, 2, 3)  # the sweep has the first, the best of each have all

    def overrides(self) -> list[str]:
        return [
            "model=tiny",
            "data=stdlib",
            f"train.steps={self.steps}",
            f"train.context={self.context}",
            f"train.global_batch={self.batch}",
            f"train.micro_batch={self.batch}",
            f"train.eval_every={self.eval_every}",
            f"train.eval_batches={self.eval_batches}",
            f"schedule.warmup_steps={self.warmup}",
            f"schedule.decay_steps={self.decay}",
            "logging.telemetry_every=0",
            "runtime.device=cpu",
            "runtime.threads=1",
        ]


@dataclass(frozen=True)
class Run:
    """One training run."""

    optimizer: str
    lr: float
    seed: int
    steps: tuple[int, ...]  # that validated
    losses: tuple[float, ...]  # nats per byte, at these steps

    @property
    def final(self) -> float:
        return self.losses[-1]

    def reaches(self, loss: float) -> int | None:
        """The first validated step at or below `loss`."""
        return next(
            (step for step, found in zip(self.steps, self.losses, strict=True) if found <= loss),
            None,
        )


def sweep(settings: Settings, out: Path) -> list[Run]:
    """Trains the whole grid, then the best rate of each optimizer with the other seeds.

    Finished runs below `out` are read and not trained again.
    """
    first, *others = settings.seeds
    runs = [train(settings, name, lr, first, out) for name in OPTIMIZERS for lr in settings.rates]
    for name in OPTIMIZERS:
        lr = best_rate(runs, name)
        runs += [train(settings, name, lr, seed, out) for seed in others]
    return runs


def train(settings: Settings, optimizer: str, lr: float, seed: int, out: Path) -> Run:
    """One run in a process of its own."""
    folder = out / f"{optimizer}_lr{lr:g}_seed{seed}"
    done = folder / "done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "megakda.train", *settings.overrides()]
        command += [f"optim={optimizer}", f"optim.lr={lr}", f"train.seed={seed}"]
        command += [f"train.out={folder}", "checkpoint.keep_last=1"]
        root = Path(__file__).resolve().parents[2]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": str(root)}, check=True)
        done.touch()
    rows = [row for row in read_metrics(folder / METRICS_FILE) if "valid_loss" in row]
    steps = tuple(int(row["step"]) for row in rows)
    return Run(optimizer, lr, seed, steps, tuple(float(row["valid_loss"]) for row in rows))


def best_rate(runs: Sequence[Run], optimizer: str) -> float:
    """The learning rate whose first seed ends lowest."""
    seed = runs[0].seed
    ours = [run for run in runs if run.optimizer == optimizer and run.seed == seed]
    return min(ours, key=lambda run: run.final).lr


def best_runs(runs: Sequence[Run], optimizer: str) -> list[Run]:
    """All seeds at the best learning rate."""
    lr = best_rate(runs, optimizer)
    return [run for run in runs if run.optimizer == optimizer and run.lr == lr]


def report(runs: Sequence[Run], settings: Settings, environment: dict[str, Any]) -> list[str]:
    """The findings as Markdown."""
    lines = [
        "# AdamW and Muon on `tiny`",
        "",
        f"`{environment['command']}`, {environment['date'][:10]}; {settings.steps} steps of "
        f"{settings.batch} sequences of {settings.context} bytes of the Python standard library, "
        f"{settings.warmup} steps of warmup and {settings.decay} of linear decay, weight decay "
        "0.1. Validation loss in nats per byte at the last step:",
        "",
        "| learning rate | " + " | ".join(_NAMES[name] for name in OPTIMIZERS) + " |",
        "|---|---|---|",
    ]
    by_rate = {(run.optimizer, run.lr): run for run in reversed(runs)}
    for lr in settings.rates:
        cells = []
        for name in OPTIMIZERS:
            text = f"{by_rate[name, lr].final:.4f}"
            cells.append(f"**{text}**" if lr == best_rate(runs, name) else text)
        lines.append(f"| {lr:g} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "At the best learning rate of each (bold), by seed, which also chooses what is trained and "
        f"validated on. Steps are the first validated one (every {settings.eval_every}th is) at or "
        "below the loss at which AdamW ends:",
        "",
        "| seed | AdamW ends at | Muon ends at | Muon is there after | of AdamW's steps |",
        "|---|---|---|---|---|",
    ]
    for adamw, muon in zip(best_runs(runs, "adamw"), best_runs(runs, "muon"), strict=True):
        reached = muon.reaches(adamw.final)
        share = f"{reached} steps | {reached / settings.steps:.0%}" if reached else "never | -"
        lines.append(f"| {adamw.seed} | {adamw.final:.4f} | {muon.final:.4f} | {share} |")
    edges = [
        _NAMES[name]
        for name in OPTIMIZERS
        if best_rate(runs, name) in (settings.rates[0], settings.rates[-1])
    ]
    if edges:
        lines += ["", f"The best rate of {' and '.join(edges)} lies at the edge of the grid."]
    return lines


def write(runs: Sequence[Run], settings: Settings, environment: dict[str, Any], base: Path) -> None:
    """`base`.json, .md and .png."""
    base.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "environment": environment,
        "settings": asdict(settings),
        "overrides": settings.overrides(),
        "runs": [asdict(run) for run in runs],
    }
    base.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    lines = report(runs, settings, environment)
    picture = f"![losses]({base.with_suffix('.png').name})"
    base.with_suffix(".md").write_text("\n".join([*lines, "", picture, ""]))
    draw(runs, settings, base.with_suffix(".png"))


def draw(runs: Sequence[Run], settings: Settings, out: Path) -> None:
    """Final loss over learning rate, and the best runs' losses over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name in OPTIMIZERS:
        color = _COLORS[name]
        grid = sorted(
            (run for run in runs if run.optimizer == name and run.seed == settings.seeds[0]),
            key=lambda run: run.lr,
        )
        left.plot([r.lr for r in grid], [r.final for r in grid], "o-", color=color)
        best = best_runs(runs, name)
        for number, run in enumerate(best):
            label = f"{_NAMES[name]}, lr {run.lr:g}" if number == 0 else None
            right.plot(run.steps, run.losses, color=color, alpha=0.8, lw=1.2, label=label)
    left.set(xscale="log", xlabel="learning rate", ylabel="final validation loss (nats per byte)")
    left.set_title("sweep, one seed", loc="left", fontsize=10)
    late = [
        loss
        for name in OPTIMIZERS
        for run in best_runs(runs, name)
        for loss in run.losses[len(run.losses) // 6 :]
    ]
    right.set(xlabel="step", ylabel="validation loss (nats per byte)")
    right.set_ylim(min(late) - 0.05, max(late) + 0.05)
    right.set_title(f"best rate of each, {len(settings.seeds)} seeds", loc="left", fontsize=10)
    right.legend(frameon=False)
    for axis in (left, right):
        axis.grid(color="#E6E6E6", lw=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)
    plt.close(figure)
