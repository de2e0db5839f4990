"""Muon against plain references, at every layout, through checkpoints, and in bytes."""

from __future__ import annotations

import pytest
import torch

from megakda.config import compose
from megakda.metrics.writers import read_metrics
from megakda.models.params import count_parameters
from megakda.optim.matrices import Block, Matrix
from megakda.optim.matrix_exchange import Held, choose_owners
from megakda.optim.newton_schulz import orthogonalize
from tests import jobs
from tests.optim import muon_jobs
from tests.optim.muon_jobs import MUON

TOLERANCE = 1e-5

# name: (ranks, overrides)
LAYOUTS = {
    "dp2": (2, []),
    "dp2_plain": (2, ["parallel.distributed_optimizer=false"]),
    "tp2": (2, ["parallel=tp2"]),
    "ep2": (2, ["parallel=ep2"]),
    "tp2_dp2": (4, ["parallel=tp2"]),
    "tp2_etp2_dp2": (4, ["parallel=tp2", "parallel.expert_tensor=2"]),
    "etp2": (2, ["parallel.expert_tensor=2"]),
    "pp2_no_experts": (2, ["parallel=pp2", "parallel.pipeline_layers=[1,3]"]),
    "pp2_vpp2_dp2": (4, ["parallel=pp2_vpp2", "train.micro_batch=1"]),
    "cp2": (2, ["parallel.context=2"]),
    "dp2_overlap": (
        2,
        ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
    ),
}


@pytest.mark.parametrize("shape", [(64, 64), (24, 96), (96, 24), (1, 8), (8, 1)])
def test_newton_schulz_is_torchs(shape):
    """Bit for bit in torch's bf16, and close to the float64 iteration in fp32."""
    from torch.optim._muon import _zeropower_via_newtonschulz as theirs

    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([theirs(m, (3.4445, -4.7750, 2.0315), 5, 1e-7) for m in x])
    assert torch.equal(orthogonalize(x.bfloat16(), 5), expected)
    exact = orthogonalize(x.double(), 5)
    assert (orthogonalize(x, 5) - exact).abs().max() < 1e-5
    values = torch.linalg.svdvals(exact)
    assert values.max() < 1.3
    if shape[0] != shape[1]:  # square ones have singular values that five steps cannot lift
        assert values.min() > 0.6


def test_newton_schulz_of_zeros_and_of_one_direction():
    zeros = torch.zeros(1, 4, 6)
    assert torch.equal(orthogonalize(zeros, 5), zeros)
    one = torch.outer(torch.ones(4), torch.arange(6.0))[None] * 1e-4
    value = torch.linalg.svdvals(orthogonalize(one, 5))[0]
    assert 0.6 < value[0] < 1.3 and value[1] < 1e-4


def test_twenty_steps_are_those_of_the_reference(ranks, corpus):
    errors = ranks.run(1, muon_jobs.against_reference, corpus, 20)[0]
    assert len(errors) > 40
    assert max(errors.values()) < 1e-6, max(errors, key=errors.get)


def test_update_is_torch_muons(ranks):
    assert ranks.run(1, muon_jobs.against_torch, 20)[0] < 1e-6


@pytest.mark.parametrize("overrides", [[], ["parallel=pp2_vpp2"], ["parallel=ep2"]])
def test_every_parameter_has_one_optimizer_and_a_line_in_the_table(ranks, corpus, overrides):
    world = 2 if overrides else 1
    heading, *rows = ranks.run(world, muon_jobs.assignment, overrides, corpus)[0]
    assert heading.split() == ["component", "optimizer", "tensors", "matrices", "parameters"]
    table = {row.split()[0]: row.split()[1:] for row in rows}
    count = count_parameters(compose([*jobs.SMALL, *overrides]).model)
    assert sum(int(row[-1].replace(",", "")) for row in table.values()) == count.total
    assert table["experts"][:3] == ["muon", "6", "72"]  # gate, up and down of 8 in 3 layers
    adamw = {name for name, row in table.items() if row[0] == "adamw"}
    assert adamw == {"embedding", "lm_head", "convolutions", "decays", "norms"}


@pytest.fixture(scope="module")
def one_rank(ranks, corpus):
    """The same run on one rank, by overrides; computed once each."""
    cache = {}

    def reference(*overrides: str):
        if overrides not in cache:
            cache[overrides] = ranks.run(1, muon_jobs.train, list(overrides), corpus, 10)[0]
        return cache[overrides]

    return reference


def check(found, expected):
    assert found[0]["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    weights = found[0]["weights"]
    assert weights.keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        assert (weights[name] - weight).abs().max() < TOLERANCE, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_steps_are_those_of_one_rank(ranks, corpus, one_rank, layout):
    world, overrides = LAYOUTS[layout]
    found = ranks.run(world, muon_jobs.train, overrides, corpus, 10)
    expected = one_rank()
    check(found, expected)
    # Each matrix is orthogonalised once in the whole world.
    owned = [name for rank in found for name in rank["owned"]]
    assert sorted(owned) == sorted(expected["owned"])
    assert len(set(owned)) == len(owned)


def test_groups_of_heads_are_matrices_at_any_layout(ranks, corpus, one_rank):
    # Six heads in groups of two: tensor-parallel ranks with three each cut the middle group.
    overrides = ["model.num_heads=6", "optim.muon.heads_per_matrix=2"]
    expected = one_rank(*overrides)
    groups = [name for name in expected["owned"] if "layers.0.self_attention.q_proj" in name]
    assert sorted(group.split("[")[1] for group in groups) == ["0:48]", "48:96]", "96:144]"]
    check(ranks.run(2, muon_jobs.train, [*overrides, "parallel=tp2"], corpus, 10), expected)


def test_momentum_is_sharded_and_work_is_spread(ranks, corpus):
    found = ranks.run(4, muon_jobs.train, ["parallel=tp2"], corpus, 1)
    one = ranks.run(1, muon_jobs.train, [], corpus, 1)[0]
    assert one["momentum"] == one["matrices"]
    for rank in found:
        assert rank["momentum"] < 0.6 * rank["matrices"]
    # Once in the world, but for the few matrices that tensor-parallel ranks replicate.
    assert one["momentum"] < sum(rank["momentum"] for rank in found) < 1.05 * one["momentum"]
    counts = [len(rank["owned"]) for rank in found]
    assert min(counts) > 0.5 * max(counts)


@pytest.mark.parametrize("layout", ["dp2", "dp4", "cp2", "ep2"])
def test_bytes_are_little_more_than_adamws(ranks, corpus, layout):
    world, overrides = {"dp4": (4, ["train.micro_batch=1"]), **LAYOUTS}[layout]
    total = {}
    for name in ("adamw", "muon"):
        moved = ranks.run(world, muon_jobs.optimizer_bytes, [*overrides, f"optim={name}"], corpus)
        # The gradients' reduce-scatter moves what the parameters' all-gather does: both are fp32.
        total[name] = sum(2 * rank["parameters"] + rank["matrices"] for rank in moved)
    assert total["adamw"] > 0
    assert total["adamw"] < total["muon"] <= 1.25 * total["adamw"]


def test_tensor_parallel_gather_is_counted_apart(ranks, corpus):
    moved = ranks.run(4, muon_jobs.optimizer_bytes, ["parallel=tp2", *MUON], corpus)
    one = ranks.run(1, muon_jobs.train, [], corpus, 1)[0]
    parameters = sum(rank["parameters"] for rank in moved)
    # At most one half of each matrix goes to the other rank and comes back, in fp32; the small
    # rest is of matrices that data-parallel shards cut, and of replicated ones.
    gather = 2 * 4 * one["matrices"] / 2
    assert sum(rank["matrices"] for rank in moved) <= gather + 0.25 * 2 * parameters


RUN = [*MUON, "schedule.warmup_steps=2", "optim.qk_clip=0.08", "logging.telemetry_every=2"]
SAME = {
    "one_bf16": (1, ["precision=bf16"]),
    "dp2_plain": (2, ["parallel.distributed_optimizer=false"]),
    "tp2_dp2": (4, ["parallel=tp2"]),
    "ep2_bf16_async": (2, ["parallel=ep2", "precision=bf16", "checkpoint.async_save=true"]),
}


@pytest.mark.parametrize("layout", SAME)
def test_resume_is_bit_exact(ranks, corpus, tmp_path, layout):
    world, overrides = SAME[layout]

    def fit(steps, out):
        arguments = [*RUN, *overrides, f"train.steps={steps}"]
        return ranks.run(world, jobs.fit, arguments, corpus, str(out))[0]

    whole = fit(4, tmp_path / "whole")
    fit(2, tmp_path / "parts")
    parts = fit(4, tmp_path / "parts")
    assert parts["loss"] == whole["loss"]
    for name, weight in whole["weights"].items():
        assert torch.equal(parts["weights"][name], weight), name
    rows = read_metrics(tmp_path / "parts" / "metrics.jsonl")
    assert rows[0]["qk_clip_share"] > 0  # or nothing would be shown of clipped weights
    assert all(list(row["max_logit"]) == ["4"] for row in rows)
    for row in rows[1::2]:
        assert set(row["update_rms"]) == set(row["weight_rms"]) >= {"experts", "norms"}


def test_another_optimizer_does_not_go_on(ranks, corpus, tmp_path):
    ranks.run(1, jobs.fit, [*RUN, "train.steps=1"], corpus, str(tmp_path))
    other = ["optim=adamw", "schedule.warmup_steps=0", "train.steps=2"]
    arguments = [jobs.fit, other, corpus, str(tmp_path)]
    name, message = ranks.run(1, jobs.error_of, *arguments)[0]
    assert name == "CheckpointError"
    assert "optim.name=muon" in message and "optim.name=adamw" in message
    assert "train.weights=" in message


OTHER = {
    "tp2_dp2_to_pp2": ((4, ["parallel=tp2"]), (2, ["parallel=pp2"])),
    "one_to_ep2": ((1, []), (2, ["parallel=ep2"])),
}


@pytest.mark.parametrize("move", OTHER)
def test_another_layout_continues_the_same_run(ranks, corpus, tmp_path, move):
    (world, first), (other, second) = OTHER[move]

    def fit(world, overrides, steps, out):
        arguments = [*RUN, *overrides, f"train.steps={steps}"]
        return ranks.run(world, jobs.fit, arguments, corpus, str(out))[0]

    whole = fit(1, [], 4, tmp_path / "whole")
    fit(world, first, 2, tmp_path / "parts")
    moved = fit(other, second, 4, tmp_path / "parts")
    assert moved["loss"] == pytest.approx(whole["loss"], rel=TOLERANCE)
    for name, weight in whole["weights"].items():
        assert (moved["weights"][name] - weight).abs().max() < TOLERANCE, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_padded_buckets_are_saved_as_they_are(ranks, corpus, tmp_path, optimizer):
    """megatron-core alone would save the parameters of later buckets from shifted data."""
    overrides = [f"optim={optimizer}", "parallel.overlap_grad_reduce=true"]

    def fit(steps, out):
        arguments = [*overrides, f"train.steps={steps}"]
        return ranks.run(2, muon_jobs.fit, arguments, corpus, str(out), 20_000)[0]

    whole = fit(3, tmp_path / "whole")
    fit(2, tmp_path / "parts")
    parts = fit(3, tmp_path / "parts")
    assert ranks.run(2, muon_jobs.padded_buckets, overrides, corpus, 20_000)[0] > 1
    assert parts["loss"] == whole["loss"]
    for name, weight in whole["weights"].items():
        assert torch.equal(parts["weights"][name], weight), name


def test_sizes_of_updates_and_weights(ranks, corpus):
    one = ranks.run(1, muon_jobs.telemetry, [], corpus)[0]
    assert set(one["update_rms"]) == set(one["weight_rms"])
    for group in ("linear_attention", "full_attention", "experts", "dense_ffn", "router"):
        assert 0.15 < one["update_rms"][group] < 0.25, group  # 0.2 of AdamW's size
    assert one["weight_rms"]["experts"] == pytest.approx(0.02, rel=0.05)
    for world, overrides in ((2, ["parallel=tp2"]), (4, ["parallel=pp2", "parallel.expert=2"])):
        found = ranks.run(world, muon_jobs.telemetry, overrides, corpus)[0]
        for name, groups in one.items():
            assert found[name] == pytest.approx(groups, rel=1e-5)


def test_a_skipped_step_leaves_no_trace(ranks, corpus):
    found = ranks.run(2, muon_jobs.skipped, corpus)
    assert all(found)


def test_owners_hold_a_part_and_share_the_work():
    def held(name: str, start: int, end: int) -> Held:
        return Held(Block(Matrix(name, 8, 8), 0, 0, 8, 8), start, end)

    everyone = [[held("a", 0, 40), held("b", 0, 64)], [held("a", 40, 64), held("c", 0, 64)]]
    owners = choose_owners(everyone, 5)
    assert owners[Matrix("b", 8, 8)] == 0 and owners[Matrix("c", 8, 8)] == 1
    assert owners[Matrix("a", 8, 8)] in (0, 1)
    replicas = [[held(name, 0, 64) for name in "abcd"]] * 2
    assert sorted(choose_owners(replicas, 5).values()) == [0, 0, 1, 1]
