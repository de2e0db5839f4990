"""Exported models give transformers' logits, and come back bit by bit."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from megakda.checkpoint import hf_config
from megakda.checkpoint.folders import find
from megakda.checkpoint.hf_export import export_hf
from megakda.checkpoint.hf_import import import_hf
from megakda.checkpoint.stored import StoredCheckpoint
from megakda.config import compose
from megakda.data.tokenizer import load_tokenizer
from tests.checkpoint import hf_jobs

TEXTS = [
    "def fibonacci(n):\n    a, b = 0, 1\n    while a < n:\n        yield a\n        a, b = b, a",
    "Ragged batches have rows of other lengths.",
    "na\u00efve \u4f60\u597d",
]

SHAPES = {
    "hybrid": [],
    "two_groups": [
        "model.num_layers=5",
        "model.num_heads=2",
        "model.moe.num_groups=2",
        "model.moe.top_k=3",
    ],
    "dense": ["model.num_layers=6", "model.num_heads=8", "model.ffn=dense"],
    "deep": [
        "model.num_layers=9",
        "model.num_heads=8",
        "model.moe.num_shared_experts=2",
        "model.moe.first_dense_layers=2",
        "model.moe.num_groups=4",
        "model.moe.top_groups=2",
    ],
    "one_expert_and_a_list": [
        "model.pattern=[full,linear,linear,full]",
        "model.moe.top_k=1",
        "model.moe.first_dense_layers=0",
        "model.linear.conv_kernel=3",
    ],
    "mla_without_positions": ["model.pattern=0:1"],
    "mla_with_rotary_positions": [
        "model.pattern=0:1",
        "model.mla.rope=true",
        "model.mla.rope_base=5000",
        "model.moe.num_groups=2",
        "model.moe.top_groups=1",
    ],
    "kda_alone": ["model.pattern=1:0"],
    "latent_queries": ["model.mla.q_lora_rank=24"],
    "latent_queries_with_rotary_positions": [
        "model.pattern=0:1",
        "model.mla.rope=true",
        "model.mla.q_lora_rank=24",
    ],
}


def batch():
    """Right-padded ids [3, s] and their mask."""
    rows = [load_tokenizer("byte").encode(text) for text in TEXTS]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return ids, mask


def contents(checkpoint):
    """Every weight and buffer of a checkpoint."""
    stored = StoredCheckpoint(find(str(checkpoint), "checkpoint"))
    return {name: stored.read(name) for name in stored.model_names()}


def published(folder):
    """Every tensor of a Hugging Face folder, read by safetensors itself."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.fixture
def transformers():
    """transformers, without its progress bars."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_gives_the_same_logits_and_its_copy_the_same_bits(
    ranks, tmp_path, transformers, shape
):
    ids, mask = batch()
    run, folder = tmp_path / "run", tmp_path / "exported"
    ours = ranks.run(1, hf_jobs.save, SHAPES[shape], str(run), ids)[0]
    export_hf(run, folder, max_shard_bytes=200_000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, output_loading_info=True, dtype="auto"
    )
    assert not any(info.values()), info
    with torch.no_grad():
        theirs = model.eval()(ids, attention_mask=mask).logits
    assert ours.abs().max() > 0.2
    # transformers 5.23 computes softplus as log(1 + exp(x)), which is most of the difference.
    error = (ours - theirs)[mask.bool()].abs().max()
    assert error < 1e-5, f"{error:.1e}"

    settings = compose([*hf_jobs.TINY, *SHAPES[shape]]).model
    assert hf_config.read(folder) == settings
    weights = contents(run)
    import_hf(folder, tmp_path / "imported")
    assert_same(contents(tmp_path / "imported"), weights)

    model.save_pretrained(tmp_path / "again")
    assert hf_config.read(tmp_path / "again") == settings
    import_hf(tmp_path / "again", tmp_path / "imported_again", tokenizer="byte")
    assert_same(contents(tmp_path / "imported_again"), weights)


@pytest.fixture(scope="module")
def saved(ranks, tmp_path_factory):
    """Run folders with a checkpoint of one rank, by shape."""

    @functools.cache
    def make(shape="hybrid"):
        run = tmp_path_factory.mktemp(shape)
        ranks.run(1, hf_jobs.save, SHAPES[shape], str(run))
        return run

    return make


LAYOUTS = {
    "tp2": ("hybrid", "parallel.tensor=2"),
    "tp2_rotary": ("mla_with_rotary_positions", "parallel.tensor=2"),
    "pp2": ("hybrid", "parallel.pipeline=2"),
    "ep2": ("hybrid", "parallel.expert=2"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_exports_the_same_folder_and_loads_it(ranks, tmp_path, saved, layout):
    shape, setting = LAYOUTS[layout]
    overrides = [*SHAPES[shape], setting]
    one, many = saved(shape), tmp_path / "many"
    ranks.run(2, hf_jobs.save, overrides, str(many))
    export_hf(one, tmp_path / "hf_one")
    export_hf(many, tmp_path / "hf_many")
    assert_same(published(tmp_path / "hf_one"), published(tmp_path / "hf_many"))
    import_hf(tmp_path / "hf_many", tmp_path / "imported")
    assert_same(contents(tmp_path / "imported"), contents(many))

    # Loaded without conversion, each rank has what it reads from a checkpoint, and what is imported
    # is a checkpoint for megatron-core, too.
    checkpoints = [str(one), str(tmp_path / "imported")]
    differs = ranks.run(2, hf_jobs.load_differs, overrides, checkpoints, str(tmp_path / "hf_one"))
    assert differs == [[], []]


def test_bf16_keeps_what_must_be_fp32(tmp_path, saved):
    run = saved()
    export_hf(run, tmp_path / "hf", dtype="bf16")
    weights = contents(run)
    for name, tensor in published(tmp_path / "hf").items():
        kept = name.endswith(("A_log", "dt_bias", "e_score_correction_bias"))
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
    assert hf_config.load(tmp_path / "hf")["dtype"] == "bfloat16"
    assert hf_config.precision(tmp_path / "hf") == "bf16"

    # Back in megakda the router is fp32 again, with bf16's numbers.
    import_hf(tmp_path / "hf", tmp_path / "imported")
    wide = ("A_log", "dt_bias", "expert_bias", "router.weight")
    for name, tensor in contents(tmp_path / "imported").items():
        expected = weights[name]
        if not name.endswith(wide[:3]):
            expected = expected.bfloat16()
        if name.endswith("router.weight"):
            expected = expected.float()
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    manifest = json.loads(
        (tmp_path / "imported/checkpoints/step_00000000/manifest.json").read_text()
    )
    assert manifest["precision"] == "bf16" and manifest["weights_only"]

    # A bf16 model's own checkpoint goes out and comes back as it is.
    import_hf(tmp_path / "hf", tmp_path / "as_fp32", dtype="fp32")
    assert {t.dtype for t in contents(tmp_path / "as_fp32").values()} == {torch.float32}
    export_hf(tmp_path / "imported", tmp_path / "hf_again")
    import_hf(tmp_path / "hf_again", tmp_path / "imported_again")
    assert_same(contents(tmp_path / "imported_again"), contents(tmp_path / "imported"))


def test_a_folder_of_one_file_and_no_index(tmp_path, saved):
    run, folder = saved(), tmp_path / "hf"
    export_hf(run, folder)
    (folder / "model.safetensors.index.json").unlink()
    shutil.move(folder / "model-00001-of-00001.safetensors", folder / "model.safetensors")
    import_hf(folder, tmp_path / "imported")
    assert_same(contents(tmp_path / "imported"), contents(run))
