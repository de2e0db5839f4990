"""Resuming is exact at the same layout, and right at any other."""

import pytest
import torch

from tests import jobs

RUN = ["schedule.warmup_steps=2", "train.guard.spike_sigmas=50", "train.guard.spike_window=2"]

SAME = {
    "one": (1, []),
    "one_bf16": (1, ["precision=bf16"]),
    "tp2": (2, ["parallel=tp2"]),
    "pp2_vpp2": (2, ["parallel=pp2_vpp2"]),
    "ep2_bf16_async": (2, ["parallel=ep2", "precision=bf16", "checkpoint.async_save=true"]),
    # What validation sees must not move the experts' biases, which would show here.
    "cp2_packed_validating": (
        2,
        [
            "parallel.context=2",
            "data.packing=best_fit",
            "train.eval_batches=2",
            "train.eval_every=3",
            "logging.telemetry_every=2",
            "model.moe.bias_update_rate=0.01",
        ],
    ),
    "dp2_plain_optimizer": (2, ["parallel.distributed_optimizer=false"]),
    "dp2_overlap": (
        2,
        ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
    ),
}


@pytest.mark.parametrize("layout", SAME)
def test_same_layout_continues_bit_for_bit(ranks, corpus, tmp_path, layout):
    world, overrides = SAME[layout]
    overrides = [*RUN, *overrides]

    def fit(steps, out):
        return ranks.run(world, jobs.fit, [*overrides, f"train.steps={steps}"], corpus, str(out))[0]

    whole = fit(6, tmp_path / "whole")
    fit(3, tmp_path / "parts")
    parts = fit(6, tmp_path / "parts")
    assert len(whole["loss"]) == 6
    assert parts["loss"] == whole["loss"]
    assert parts["weights"].keys() == whole["weights"].keys()
    for name, weight in whole["weights"].items():
        assert torch.equal(parts["weights"][name], weight), name


OTHER = {
    "tp2_to_pp2": ((2, ["parallel=tp2"]), (2, ["parallel=pp2"])),
    "ep2_to_tp2": ((2, ["parallel=ep2"]), (2, ["parallel=tp2"])),
    "dp2_to_one": ((2, []), (1, [])),
    "cp2_to_dp2": ((2, ["parallel.context=2"]), (2, [])),
    "one_to_cp2_heads": ((1, []), (2, ["parallel.context=2", "parallel.context_mode=heads"])),
    "one_to_pp2_vpp2": ((1, []), (2, ["parallel=pp2_vpp2"])),
}


@pytest.mark.parametrize("move", OTHER)
def test_another_layout_continues_the_same_run(ranks, corpus, tmp_path, move):
    (world, first), (other_world, second) = OTHER[move]

    def fit(world, overrides, steps, out):
        overrides = [*RUN, *overrides, f"train.steps={steps}"]
        return ranks.run(world, jobs.fit, overrides, corpus, str(out))[0]

    whole = fit(world, first, 6, tmp_path / "whole")
    fit(world, first, 3, tmp_path / "parts")
    parts = fit(other_world, second, 6, tmp_path / "parts")
    assert parts["loss"][:3] == whole["loss"][:3]
    assert parts["loss"][3:] == pytest.approx(whole["loss"][3:], rel=1e-5)
    for name, weight in whole["weights"].items():
        error = (parts["weights"][name] - weight).norm() / weight.norm().clamp_min(1e-12)
        assert error < 1e-4, f"{name}: {error:.2e}"


def test_another_data_order_is_noticed(ranks, corpus, tmp_path):
    def fit(*overrides):
        return ranks.run(1, jobs.fit, list(overrides), corpus, str(tmp_path))[0]["data_reordered"]

    assert not fit("train.steps=2")
    assert not fit("train.steps=3")
    assert fit("train.steps=4", "data.split=[50,25,25]")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_that_begins_with_the_weights_of_another(ranks, corpus, tmp_path, precision):
    """Everything else is its own: steps, context, layout, data."""

    def fit(world, name, *overrides):
        common = [*RUN, f"precision={precision}", "model.moe.bias_update_rate=0", *overrides]
        return ranks.run(world, jobs.fit, common, corpus, str(tmp_path / name))[0]

    first = fit(1, "first", "train.steps=3")
    # A learning rate of next to nothing leaves the weights as they were loaded.
    still = ["optim.lr=1e-30", "optim.weight_decay=0"]
    own = ["train.context=96", "parallel.context=2", "data.packing=documents"]
    own.append(f"train.weights={tmp_path / 'first'}")
    second = fit(2, "second", *own, *still, "train.steps=2")
    assert len(second["loss"]) == 2
    for name, weight in first["weights"].items():
        assert torch.equal(second["weights"][name], weight), name
    # Resuming it goes on from its own checkpoint, not from the weights it began with.
    third = fit(2, "second", *own, *still, "train.steps=3")
    assert third["loss"][:2] == second["loss"] and len(third["loss"]) == 3
    assert not third["data_reordered"]


def test_weights_that_are_not_there(ranks, corpus, tmp_path):
    overrides = ["train.steps=1", f"train.weights={tmp_path / 'nothing'}"]
    out = str(tmp_path / "run")
    kind, message = ranks.run(1, jobs.error_of, jobs.fit, overrides, corpus, out)[0]
    assert kind == "CheckpointError"
    assert f"train.weights={tmp_path / 'nothing'}: not a complete checkpoint" in message


def resume_points(corpus: str, folders: list[str]) -> str:
    """Where this rank resumes if `folders` are what each rank finds."""
    from megakda.trainer import resume_point

    with jobs.trainer([], corpus) as run:
        run.config.train.resume = folders[torch.distributed.get_rank()]
        return str(resume_point(run.config))


def test_all_ranks_resume_what_rank_0_finds(ranks, corpus, tmp_path):
    """Between two ranks' looks another run may have ended a save."""
    folders = [tmp_path / "step_00000001", tmp_path / "step_00000002"]
    for folder in folders:
        folder.mkdir()
        (folder / "manifest.json").write_text("{}")
    found = ranks.run(2, resume_points, str(corpus), [str(folder) for folder in folders])
    assert found == [str(folders[0])] * 2
