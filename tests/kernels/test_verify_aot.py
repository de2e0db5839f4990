"""Kernels are compiled for GPUs that are not there, and their figures are guarded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import megakda
from megakda.kernels.verify import aot, budget, gpu, report
from megakda.kernels.verify.budget import Case, Kernel

ROOT = Path(megakda.__file__).resolve().parents[1]
NARROW = ("narrow", "sm_90")


def kernel_report(output: Path, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "tools/kernel_report.py", "--cases", "tests.kernels.aot_cases"]
    return subprocess.run(
        [*command, "--jobs", "1", "--output", str(output), *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A report on the example cases, and what was printed."""
    output = tmp_path_factory.mktemp("report") / "kernels.json"
    done = kernel_report(output)
    assert done.returncode == 1, done.stderr  # one of the cases is over budget
    return output, done.stderr


def test_report_has_the_figures_of_every_architecture(written):
    [(version, content)] = json.loads(written[0].read_text()).items()
    assert content["versions"]["triton"] == version
    narrow = {x["architecture"]: x for x in content["launches"] if x["case"] == "narrow"}
    assert narrow.keys() == {"sm_80", "sm_90", "sm_100"}
    for figures in narrow.values():
        assert figures["kernel"] == "product" and figures["error"] is None
        assert figures["constexprs"] == {"N": 64, "PRECISION": "tf32"}
        assert figures["launches"] == 2
        assert 32 <= figures["registers"] < 200 and figures["spill_loads"] == 0
        assert figures["shared"] >= 2 * 64 * 64 * 2 and figures["blocks_per_sm"] >= 2
    assert narrow["sm_80"]["instructions"]["HMMA"] == narrow["sm_80"]["instructions"]["mma.sync"]
    assert narrow["sm_90"]["instructions"]["HGMMA"] == narrow["sm_90"]["instructions"]["wgmma"]
    assert narrow["sm_100"]["instructions"]["UTCHMMA"] > 0
    table = written[0].with_suffix(".md").read_text()
    assert f"## triton {version}" in table and "### sm_90" in table
    assert "| narrow | product | N 64, PRECISION tf32 | 4, 3 |" in table


def test_report_names_what_is_over_budget(written):
    errors = written[1]
    assert "spilling, product, sm_90: spills" in errors
    assert "spilling, product, sm_90: no instruction for tensor cores" in errors
    assert "warps on a multiprocessor, fewer than 64" in errors
    assert "spilling, another, sm_90: not launched" in errors
    assert "failing, sm_80: ValueError: q: no" in errors
    assert "narrow" not in errors


def test_check_compares_with_the_report(written):
    output = written[0].with_name("changed.json")
    content = json.loads(written[0].read_text())
    [(version, recorded)] = content.items()
    unchanged = report.Report(recorded["versions"], recorded["launches"], [])
    assert report.compare(written[0], unchanged) == []
    [figures] = (x for x in recorded["launches"] if (x["case"], x["architecture"]) == NARROW)
    registers = figures["registers"]
    figures["registers"] -= 2
    output.write_text(json.dumps(content))
    before = output.read_text()
    done = kernel_report(output, "--check", "--only", NARROW[0], "--architectures", NARROW[1])
    problem = f"narrow, product, sm_90: registers {registers - 2} -> {registers}"
    assert (done.returncode, done.stderr) == (1, f"error: {problem}\n")
    assert output.read_text() == before


def test_check_needs_figures_of_this_triton(written):
    [problem] = report.compare(written[0], report.Report({"triton": "0.1"}, [], []))
    assert "no figures of triton 0.1" in problem


def test_unknown_cases():
    with pytest.raises(ValueError, match="no case wide; there are narrow, spilling, failing"):
        report.find_cases("tests.kernels.aot_cases", ["wide"])


def test_interpreted_processes_cannot_compile():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), aot.compiling("sm_90"):
        pass


LOG = """
ptxas info    : Function properties for product
    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 16 bytes cumulative stack size
"""


def test_assembler_log():
    expected = {"registers": 168, "spill_stores": 12, "spill_loads": 20, "stack": 16}
    assert gpu.parse_assembler_log(LOG) == expected
    with pytest.raises(ValueError, match="no registers, spill_stores"):
        gpu.parse_assembler_log("")


@pytest.mark.parametrize(
    ("architecture", "registers", "warps", "shared", "blocks"),
    [
        ("sm_90", 255, 4, 0, 2),  # 8 warps of 64 registers * 128 in each quarter
        ("sm_90", 168, 8, 0, 1),  # 12 warps fit, one block of 8
        ("sm_90", 32, 1, 0, 32),
        ("sm_90", 32, 4, 100 << 10, 2),
        ("sm_80", 32, 4, 100 << 10, 1),
        ("sm_90", 32, 4, 227 << 10, 1),
        ("sm_90", 32, 4, 228 << 10, 0),
        ("sm_90", 40, 8, 0, 6),
    ],
)
def test_occupancy(architecture, registers, warps, shared, blocks):
    assert gpu.blocks_per_sm(gpu.GPUS[architecture], registers, warps, shared) == blocks


def test_tensor_memory_limits_blocks():
    assert gpu.blocks_per_sm(gpu.GPUS["sm_100"], 32, 4, 0, 256) == 2


@dataclass
class Example:
    kernel: str = "product"
    registers: int = 100
    spill_stores: int = 0
    spill_loads: int = 0
    error: str | None = None
    warps_per_sm: int = 16
    matrix_instructions: int = 4


CASE = Case("case", lambda: None, (Kernel("product", dot=True, may_spill=("sm_80",)),))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"spill_loads": 8}, "case, product, sm_90: spills 0 bytes and loads 8, at 100 registers"),
        ({"matrix_instructions": 0}, "case, product, sm_90: no instruction for tensor cores"),
        ({"warps_per_sm": 4}, "4 warps on a multiprocessor, fewer than 8"),
        ({"error": "too large"}, "case, product, sm_90: too large"),
    ],
)
def test_budget(change, problem):
    problems = budget.over_budget(CASE, "sm_90", [replace(Example(), **change)])
    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


def test_spills_may_be_allowed_on_an_architecture():
    spilling = Example(spill_stores=4, spill_loads=4)
    assert budget.over_budget(CASE, "sm_80", [spilling]) == []
    assert len(budget.over_budget(CASE, "sm_100", [spilling])) == 1


def test_budget_knows_all_kernels():
    problems = budget.over_budget(CASE, "sm_90", [Example(kernel="product_2")])
    assert problems == [
        "case, product_2, sm_90: not among the case's kernels; give it a budget",
        "case, product, sm_90: not launched",
    ]


def record(**figures: object) -> dict[str, object]:
    names = (*budget.NOT_MORE, *budget.NOT_LESS, "num_warps", "num_stages")
    return {
        **dict.fromkeys(names, 4),
        "case": "case",
        "architecture": "sm_90",
        "kernel": "product",
        "constexprs": {"N": 64},
        **figures,
    }


@pytest.mark.parametrize(
    ("now", "problems"),
    [
        ([record()], []),
        ([record(registers=3, shared=2, blocks_per_sm=5)], []),
        ([record(registers=5)], ["case, product, sm_90: registers 4 -> 5"]),
        ([record(blocks_per_sm=3)], ["case, product, sm_90: blocks_per_sm 4 -> 3"]),
        ([record(num_warps=8)], ["case, product, sm_90: num_warps 4 recorded, now 8"]),
        ([], ["case, product, sm_90: 1 specialisations recorded, now 0"]),
        ([record()] * 2, ["case, product, sm_90: 1 specialisations recorded, now 2"]),
        (
            [record(constexprs={"N": 32})],
            ["case, product, sm_90: constexprs {'N': 64} recorded, now {'N': 32}"],
        ),
    ],
)
def test_regressions(now, problems):
    assert budget.regressions([record()], now) == problems
