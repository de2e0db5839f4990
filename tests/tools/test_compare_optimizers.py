"""How the comparison of optimizers judges runs."""

from __future__ import annotations

import json

from megakda.bench.optimizers import Run, Settings, best_rate, report, write

SETTINGS = Settings(steps=30, rates=(1e-3, 2e-3, 4e-3), seeds=(1, 2))
STEPS = (10, 20, 30)


def run(optimizer: str, lr: float, seed: int, *losses: float) -> Run:
    return Run(optimizer, lr, seed, STEPS, losses)


RUNS = [
    run("adamw", 1e-3, 1, 3.0, 2.5, 2.4),
    run("adamw", 2e-3, 1, 3.0, 2.4, 2.0),
    run("adamw", 4e-3, 1, 3.0, 2.6, 2.2),
    run("muon", 1e-3, 1, 2.8, 2.3, 2.1),
    run("muon", 2e-3, 1, 2.7, 2.2, 1.9),
    run("muon", 4e-3, 1, 2.6, 1.95, 1.8),
    run("adamw", 2e-3, 2, 3.0, 2.4, 2.1),
    run("muon", 4e-3, 2, 2.6, 2.3, 2.06),
]
ENVIRONMENT = {"command": "a command", "date": "2026-01-02T03:04:05"}


def test_best_rate_is_of_the_first_seed():
    assert best_rate(RUNS, "adamw") == 2e-3
    assert best_rate(RUNS, "muon") == 4e-3


def test_steps_to_the_loss_where_adamw_ends():
    assert run("muon", 1e-3, 1, 2.0, 1.9, 2.1).reaches(1.95) == 20
    assert run("muon", 1e-3, 1, 2.0, 1.9, 2.1).reaches(1.0) is None
    text = "\n".join(report(RUNS, SETTINGS, ENVIRONMENT))
    assert "| 1 | 2.0000 | 1.8000 | 20 steps | 67% |" in text
    assert "| 2 | 2.1000 | 2.0600 | 30 steps | 100% |" in text
    worse = [*RUNS[:-1], run("muon", 4e-3, 2, 2.6, 2.3, 2.2)]
    assert "| 2 | 2.1000 | 2.2000 | never | - |" in "\n".join(report(worse, SETTINGS, ENVIRONMENT))
    assert "| 0.002 | **2.0000** | 1.9000 |" in text
    assert "The best rate of Muon lies at the edge of the grid." in text


def test_files(tmp_path):
    write(RUNS, SETTINGS, ENVIRONMENT, tmp_path / "found")
    facts = json.loads((tmp_path / "found.json").read_text())
    assert len(facts["runs"]) == len(RUNS) and facts["settings"]["steps"] == 30
    assert (tmp_path / "found.png").stat().st_size > 10_000
    assert "found.png" in (tmp_path / "found.md").read_text()
