"""The benchmark of generation: what it measures, writes and draws."""

from __future__ import annotations

import json

import pytest
import torch

from megakda.bench.conversion import Conversion
from megakda.bench.inference import Plan, measure
from megakda.bench.inference_report import HEAD, table, write
from megakda.bench.peer import Case, Comparison, Measured
from megakda.errors import ConfigError
from tests.jobs import SMALL

PLAN = Plan(SMALL, contexts=[64, 2048], prefill_contexts=[64], chunk=48, repeats=1)
WHERE = {
    "command": "python tools/bench_inference.py",
    "date": "2026-01-01",
    "commit": "0" * 40,
    "changed_files": 0,
    "hardware": {"name": "a machine"},
    "versions": {"python": "3", "torch": "2"},
}


def test_points_files_and_picture(tmp_path):
    variants = ["Kimi Linear", "full MLA"]
    points = measure(PLAN, variants, torch.device("cpu"), lambda text: None)
    assert [(p.variant, p.context) for p in points] == [
        (variant, context) for variant in variants for context in (64, 2048)
    ]
    for point in points:
        assert (point.prefill_s is not None) == (point.context == 64)
        assert (point.linear_ms is not None) == (point.variant == "Kimi Linear")
        mixers = (point.linear_ms or 0) + (point.full_ms or 0)
        assert mixers > 0 and point.decode_ms > 0
    kimi, mla = points[:2], points[2:]
    growth = [p[1].cache_bytes - p[0].cache_bytes for p in (kimi, mla)]
    assert growth[1] == 4 * growth[0]  # one of four layers keeps latents

    converted = [Conversion("fp32", 300.0, 1.0, 2.0, 4.0)]
    peer = Comparison("runs/x", 1, "5.0", [Measured(Case(2, 8, 10), 2.0, 5.0, 2)], converted)
    paths = write(tmp_path / "inference_cpu", points, PLAN, peer, WHERE)
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    data = json.loads(paths[0].read_text())
    assert data["points"][0]["context"] == 64 and data["transformers"]["rows"][0]["same"] == 2
    text = paths[1].read_text()
    assert "| Kimi Linear | 64 |" in text and "| kimi_linear_48b | 41.4 |" in text
    assert "| 2 | 8 | 10 | 10 | 4 | 2.50 | 2 of 2 |" in text
    assert "| fp32 | 300 | 1.00 | 2.00 | 4.00 |" in text
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    assert all(len(row) == len(HEAD) for row in table(points))


@pytest.mark.parametrize(
    ("plan", "variants", "message"),
    [
        (Plan(SMALL, [], []), ["Kimi Linear"], "contexts="),
        (Plan(SMALL, [1], [], batch=0), ["Kimi Linear"], "batch=0"),
        (PLAN, ["Mamba"], "Mamba"),
        (Plan([*SMALL, "model.ffn=x"], [1], []), ["Kimi Linear"], "model.ffn=x"),
    ],
)
def test_plans_that_cannot_work(plan, variants, message):
    with pytest.raises(ConfigError, match=message):
        measure(plan, variants, torch.device("cpu"), lambda text: None)
