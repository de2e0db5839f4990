"""What chunk_kda moves through memory: each array as its shape says, the sums within bounds."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from megakda.kernels.kda.gate import kda_gate  # noqa: E402
from megakda.kernels.verify import bytes as count  # noqa: E402
from megakda.kernels.verify.traffic import record_traffic  # noqa: E402

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "benchmarks/results/kernels_bytes.json"

ROW = 2 * count.WIDTH  # of a token, in bf16
TRIANGLE = 2 * (16 + 32 + 48 + 64) // 4  # of a row of 64, whole blocks of 16 up to the diagonal
TOTAL = 4 * count.WIDTH / 64  # fp32, a row per chunk
STATE = 2 * count.WIDTH * count.WIDTH / 64  # bf16, one per chunk
SMALL = {"A_log", "dt_bias", "chunks", "ranges", "first_ranges"}

INPUTS = {"q": ROW, "k": ROW, "g": ROW, "beta": 2}
INTRA = {"k_in": ROW, "k_out": ROW, "inverse": TRIANGLE, "total": TOTAL}
READ_BY_Q = {"q_in": ROW, "scores": TRIANGLE}
SUMS = {"dA_log_parts": 4 / 64, "dt_bias_parts": TOTAL}

FORWARD = [
    ("kda_intra_kernel", INPUTS, INTRA | READ_BY_Q),
    ("kda_state_kernel", INTRA | READ_BY_Q | {"v": ROW}, {"o": ROW}),
]
BACKWARD = [
    ("kda_intra_kernel", INPUTS, INTRA | READ_BY_Q),
    ("kda_state_kernel", INTRA | {"v": ROW}, {"states": STATE, "residuals": ROW}),
    ("kda_state_grad_kernel", INTRA | READ_BY_Q | {"do": ROW}, {"dstates": STATE, "dv": ROW}),
    (
        "kda_grad_kernel",
        INPUTS | {"do": ROW, "residuals": ROW, "dv": ROW, "states": STATE, "dstates": STATE},
        {"dq": ROW, "dk": ROW, "dg": ROW, "dbeta": 2} | SUMS,
    ),
]


@pytest.fixture(scope="module")
def steps(triton_interpreter: bool) -> dict[str, count.Step]:
    assert triton_interpreter
    return count.record_cases()


def arrays(step: count.Step, launches: list[count.Launch]) -> list[tuple[str, dict, dict]]:
    """Bytes per token of every array with a row per token or chunk."""
    return [
        (
            launch.kernel,
            *(
                {name: step.per_token(n) for name, n in part.items() if name not in SMALL}
                for part in (launch.read, launch.written)
            ),
        )
        for launch in launches
    ]


def test_bytes_within_bounds(steps: dict[str, count.Step]) -> None:
    step = steps[count.MAIN]
    assert [step.per_token(x) for x in step.least] == [1282, 3590]
    assert step.unique(step.forward) <= 3500
    assert step.unique(step.both) <= 12000


def test_every_array_as_its_shape_says(steps: dict[str, count.Step]) -> None:
    step = steps[count.MAIN]
    assert arrays(step, step.forward) == FORWARD
    *kernels, rates, biases = step.backward
    assert arrays(step, kernels) == BACKWARD
    # The sums over chunks that follow.
    parts = {name: size * step.tokens for name, size in SUMS.items()}
    assert rates == count.Launch(
        "torch.sum",
        read={"input 0": parts["dA_log_parts"]},
        written={"output 0": 4},
        accessed=parts["dA_log_parts"] + 4,
    )
    assert (biases.read, biases.written) == (
        {"input 0": parts["dt_bias_parts"]},
        {"output 0": 4 * count.WIDTH},
    )


def test_both_gates_move_the_same(steps: dict[str, count.Step]) -> None:
    assert steps["bounded gate"] == steps["softplus gate"]


def test_gate_in_fp32_costs_its_own_bytes_alone(steps: dict[str, count.Step]) -> None:
    half, full = steps[count.MAIN], steps["raw gate in fp32"]
    for x, y in zip(half.both, full.both, strict=True):
        for part, other in ((x.read, y.read), (x.written, y.written)):
            assert other == part | {n: 2 * part[n] for n in ("g", "dg") if n in part}
    # g is read in pass 1, twice, and for the gradients, and dg written.
    assert full.unique(full.both) - half.unique(half.both) == 4 * ROW


def test_ranges_cost_a_walk_more_and_their_states(steps: dict[str, count.Step]) -> None:
    step = steps[count.SPLIT]
    state = step.per_token(4 * count.WIDTH**2 * step.tokens // (8 * 64))  # of one of 8 chunks
    maps = ("kda_state_kernel", INTRA | {"v": ROW}, {"final_state": 2 * state})
    assert arrays(step, step.forward)[:3] == [
        FORWARD[0],
        maps,
        ("kda_fold_kernel", {"maps": 2 * state}, {"folded": state}),
    ]
    folds = [launch for launch in step.backward if launch.kernel == "kda_fold_kernel"]
    assert [launch.unique // step.tokens for launch in folds] == [3 * state, 3 * state]
    *_, last = step.forward
    assert last.read.keys() - {"ranges"} == {*INTRA, *READ_BY_Q, "v", "initial_state"}


def test_figures_on_record_are_those_of_the_kernels(steps: dict[str, count.Step]) -> None:
    recorded = count.read(RECORDED)
    # Repetitions depend on block sizes, which may be tuned; what has to be moved does not.
    moved = [
        {name: [(x.kernel, x.read, x.written) for x in step.both] for name, step in some.items()}
        for some in (recorded, steps)
    ]
    assert moved[0] == moved[1], "run python tools/kernel_bytes.py"
    text = RECORDED.with_suffix(".md").read_text()
    assert text == count.markdown(recorded), "run python tools/kernel_bytes.py"


def test_writing_and_reading(steps: dict[str, count.Step], tmp_path: Path) -> None:
    path = tmp_path / "results" / "bytes.json"
    count.write(path, steps)
    assert count.read(path) == steps
    assert path.with_suffix(".md").read_text().count("| kda_grad_kernel |") == 3


def test_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(count, "CASES", {count.MAIN: {"tokens": 1}})
    path = tmp_path / "bytes.json"
    monkeypatch.setattr(sys, "argv", ["kernel_bytes.py", "--output", str(path)])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(ROOT / "tools/kernel_bytes.py"), run_name="__main__")
    assert done.value.code == 0
    [(name, step)] = count.read(path).items()
    assert (name, step.tokens) == (count.MAIN, 1)
    assert "| softplus gate | " in capsys.readouterr().out


def test_sums_are_those_of_recorded_traffic() -> None:
    raw, A_log, dt_bias = torch.randn(3, 70, 2, 16), torch.randn(2), torch.randn(32)
    with record_traffic() as traffic, count.record_launches() as launches:
        kda_gate(raw, A_log, dt_bias, backend="triton")
    [kernel], [launch] = traffic, launches
    assert (launch.kernel, launch.programs) == (kernel.kernel, kernel.programs)
    assert sum(launch.read.values()) == kernel.unique_loaded == 4 * (raw.numel() + 2 + 32)
    assert sum(launch.written.values()) == kernel.unique_stored == 4 * raw.numel()
    assert launch.accessed == kernel.loaded + kernel.stored


def test_operators_count_unless_they_move_nothing() -> None:
    x = torch.ones(4, 8)
    with count.record_launches() as launches:
        y = x.t().reshape(2, 16).new_empty(3)
        z = x[:1].expand(100, 8) + 1
    assert y.shape == (3,)
    assert launches[-1] == count.Launch(
        "torch.add", read={"input 0": 128}, written={"output 0": 3200}, accessed=3328
    )
    assert [launch.kernel for launch in launches[:-1]] == ["torch.clone"]
    assert z.sum() == 1600
