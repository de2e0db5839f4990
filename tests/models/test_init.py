"""Initial weights: the same numbers at every layout, from the distributions that layers ask for."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from megakda.config import compose, validate
from megakda.models import init
from tests import jobs

STD = 0.03
SMALL_BLOCK = 100
"""Elements per block where a test wants every large parameter to have many: a tensor-parallel
share then begins and ends inside blocks."""

LAYOUTS = {
    "tp2": (2, ["parallel=tp2"]),
    "pp2": (2, ["parallel=pp2"]),
    "pp2_vpp2": (2, ["parallel=pp2_vpp2"]),
    "ep2": (2, ["parallel=ep2"]),
    "etp2": (2, ["parallel=tp2", "parallel.expert_tensor=2"]),
}


def initial_weights(
    overrides: list[str], seed: int = 1, block: int = SMALL_BLOCK
) -> dict[str, torch.Tensor]:
    """The model's global parameters on rank 0, as `initialize` leaves them."""
    from megakda.models.kimi_linear import build_chunks
    from megakda.runtime.distributed import process_groups, world_size

    config = compose([*jobs.SMALL, *overrides])
    validate(config, world_size())
    with (
        pytest.MonkeyPatch.context() as patch,
        process_groups(config.parallel, config.runtime, torch.device("cpu")),
    ):
        patch.setattr(init, "BLOCK_ELEMENTS", block)
        chunks = build_chunks(config.model, config.parallel, config.precision, config.train.context)
        with torch.no_grad():
            for chunk in chunks:
                for param in chunk.parameters():
                    param.fill_(1e6)  # what was not drawn shows
        init.initialize(chunks, seed, STD)
        return jobs.gather_global(chunks, lambda piece: piece.data)


@pytest.fixture(scope="module")
def one_rank(ranks):
    """Cut into small blocks, as at every other layout here."""
    return ranks.run(1, initial_weights, [])[0]


@pytest.fixture(scope="module")
def whole(ranks):
    """With blocks of the usual size, one per parameter: what a real run starts from."""
    return ranks.run(1, initial_weights, [], block=init.BLOCK_ELEMENTS)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_from_the_same_numbers(ranks, one_rank, layout):
    world, overrides = LAYOUTS[layout]
    found = ranks.run(world, initial_weights, overrides)[0]
    assert found.keys() == one_rank.keys()
    different = [name for name in found if not torch.equal(found[name], one_rank[name])]
    assert not different


def test_blocks_are_drawn_from_generators_of_their_own(one_rank, whole):
    name = "embedding.word_embeddings.weight"  # [320, 64], one row in a block of 100 elements
    rows = one_rank[name]
    assert not any(torch.equal(one, other) for one, other in combinations(rows[:32], 2))
    assert torch.equal(rows[0], whole[name][0])  # block 0 begins where the tensor does
    assert not torch.equal(rows[1], whole[name][1])


def test_the_seed_matters(ranks, whole):
    other = ranks.run(1, initial_weights, [], seed=2, block=init.BLOCK_ELEMENTS)[0]
    same = {name for name in whole if torch.equal(whole[name], other[name])}
    assert same == {name for name in whole if "norm" in name}


def test_parameters_of_one_shape_differ(whole):
    drawn = {name: tensor for name, tensor in whole.items() if "norm" not in name}
    assert len(drawn) > 50
    for (name, one), (other_name, other) in combinations(drawn.items(), 2):
        assert one.shape != other.shape or not torch.equal(one, other), (name, other_name)


def test_distributions(whole):
    """Each kind of parameter from its own; bounds of at least six standard errors."""
    seen = set()
    for name, tensor in whole.items():
        kind, count = name.rsplit(".", 2)[-2:], tensor.numel()
        if "norm" in name:
            seen.add("norm")
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        elif kind[1] == "A_log":
            seen.add("A_log")
            assert tensor.min() >= 0 and tensor.max() <= math.log(16), name
        elif kind[1] == "dt_bias":
            seen.add("dt_bias")
            dt = torch.nn.functional.softplus(tensor.double())
            assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 1e-1 * 1.001, name
            # Uniform in log space
            error = 6 * math.log(100) / math.sqrt(12 * count)
            assert float(dt.log().mean()) == pytest.approx(math.log(1e-2), abs=error), name
        elif "conv1d" in name:
            seen.add("conv")
            assert tensor.abs().max() <= 0.5, name  # 4 taps
            error = 6 * 0.5 / math.sqrt(3 * count)
            assert float(tensor.mean()) == pytest.approx(0, abs=error), name
            assert float(tensor.std()) == pytest.approx(0.5 / math.sqrt(3), rel=0.2), name
        else:
            seen.add("matrix")
            assert tensor.dim() >= 2, name
            error = 6 / math.sqrt(count)
            assert float(tensor.mean()) == pytest.approx(0, abs=error * STD), name
            assert float(tensor.std()) == pytest.approx(STD, rel=error), name
    assert seen == {"norm", "A_log", "dt_bias", "conv", "matrix"}
    rates = torch.cat([t for name, t in whole.items() if name.endswith("A_log")]).exp()
    assert float(rates.mean()) == pytest.approx(8.5, abs=6 * 15 / math.sqrt(12 * rates.numel()))


def test_the_definition_of_the_weights_never_changes():
    """The same seed has to mean the same model in every version."""
    assert init.BLOCK_ELEMENTS == 2**20
    seed = init._block_seed(1234, "decoder.final_layernorm.weight", 3)
    assert seed == 4614991166899650026
