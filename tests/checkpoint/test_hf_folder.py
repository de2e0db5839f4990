"""Hugging Face folders: names, tokenizers, damage and interruptions."""

import json
import math
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import megakda
from megakda.checkpoint import hf_config, hf_import, hf_map, hf_tokenizer
from megakda.checkpoint.folders import find
from megakda.checkpoint.hf_export import export_hf
from megakda.checkpoint.hf_folder import FolderWriter, HFFolder
from megakda.checkpoint.hf_import import import_hf
from megakda.checkpoint.stored import StoredCheckpoint, is_finite
from megakda.config import compose
from megakda.config.compose import from_tree
from megakda.errors import CheckpointError
from tests.checkpoint.hf_jobs import TINY, edit, random_folder, tiktoken_instead

ROOT = Path(megakda.__file__).resolve().parents[1]


def published(folder):
    return {n: t for f in sorted(folder.glob("*.safetensors")) for n, t in load_file(f).items()}


def change(folder, name, tensor):
    """Puts another tensor, or none, in the place of one."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = folder / index["weight_map"][name]
    tensors = load_file(file)
    del tensors[name]
    if tensor is None:
        del index["weight_map"][name]
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        tensors[name] = tensor
    save_file(tensors, file)


def test_the_documented_table_is_up_to_date():
    page = (ROOT / "docs/checkpoints-hf-names.md").read_text()
    assert page == hf_map.markdown(), (
        "run python -m megakda.checkpoint.hf_map > docs/checkpoints-hf-names.md"
    )


DOCUMENTED = {
    "hybrid": ([], "direct"),
    "rotary": (["model.pattern=0:1", "model.mla.rope=true"], "direct"),
    "latent queries": (["model.mla.q_lora_rank=24"], "latent"),
}


@pytest.mark.parametrize("variant", DOCUMENTED)
def test_the_documented_shapes_are_those_of_the_blocks(variant):
    overrides, query = DOCUMENTED[variant]
    model = compose([*TINY, *overrides]).model
    sizes, seen = hf_map._sizes(model), set()
    for tensor in hf_map.tensors(model):
        at = "" if "layers" not in tensor.name else f"decoder.layers.{tensor.name.split('.')[2]}."
        mixer = {"mla", query} if variant == "rotary" or ".3." in at else {"kda"}
        others = {"kda", "mla", "direct", "latent"} - mixer
        (row,) = (
            row for row in hf_map.TABLE if at + row.ours == tensor.name and row.part not in others
        )
        seen.add(row)
        expected = hf_map._shape(row.published or row.shape, sizes)
        assert {block.shape for block in tensor.blocks} == {expected}, tensor.name
        assert sum(math.prod(b.size) for b in tensor.blocks) == math.prod(tensor.shape)
    known = {row for row in hf_map.TABLE if row.part not in {"direct", "latent"} - {query}}
    assert seen == known or variant == "rotary"


def test_rotated_rows_are_pairs_there_and_halves_here():
    rotation = hf_map.Rotation(period=10, rotated=6)
    rows = rotation.published_rows(0, 20)
    assert rows[:10].tolist() == [0, 1, 2, 3, 4, 6, 8, 5, 7, 9]
    assert rows[10:].tolist() == [row + 10 for row in rows[:10].tolist()]
    assert rotation.published_rows(13, 17).tolist() == rows[13:17].tolist()


def test_a_folder_comes_back_with_everything_that_it_said(folder, tmp_path):
    run = tmp_path / "run"
    done = import_hf(folder, run)
    assert done.nonfinite == []
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml"]
    manifest = StoredCheckpoint(find(str(run), "run")).manifest
    assert manifest["weights_only"] and manifest["step"] == 0
    assert manifest["tokenizer"]["spec"] == "byte"
    export_hf(run, tmp_path / "again")
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        first, second = (json.loads((f / name).read_text()) for f in (folder, tmp_path / "again"))
        assert first == second, name
    first, second = published(folder), published(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    card = (tmp_path / "again/README.md").read_text()
    assert "imported from folder" in card and "AutoModelForCausalLM" in card


def test_the_config_of_an_imported_run_is_one(folder, tmp_path):
    from omegaconf import OmegaConf

    from megakda.config.schema import Config

    import_hf(folder, tmp_path / "run")
    tree = OmegaConf.load(tmp_path / "run/config.yaml")
    config = from_tree(OmegaConf.merge(OmegaConf.structured(Config), tree))
    assert config.model == compose(TINY).model
    assert (config.precision, config.train.context, config.data.tokenizer) == ("fp32", 512, "byte")


# --- Damage ---


def truncate(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(file, file.stat().st_size - 1000)


def cut_header(folder):
    os.truncate(sorted(folder.glob("*.safetensors"))[1], 100)


def drop_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def drop_weights(folder):
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        file.unlink()
    (folder / "pytorch_model.bin").touch()


O_PROJ = "model.layers.1.self_attn.o_proj.weight"
DAMAGE = {
    "truncated shard": (truncate, ["model-00002-of-", "is truncated"]),
    "truncated header": (cut_header, ["model-00002-of-", "no whole safetensors file"]),
    "missing shard": (drop_shard, ["model-00002-of-", "No such file"]),
    "no weights": (drop_weights, ["neither model.safetensors.index.json", "pickled"]),
    "missing tensor": (lambda f: change(f, O_PROJ, None), [f"1 missing: {O_PROJ}"]),
    "another shape": (
        lambda f: change(f, O_PROJ, torch.zeros(64, 65)),
        [f"{O_PROJ} is [64, 65], not [64, 64]"],
    ),
    "another type": (
        lambda f: change(f, O_PROJ, torch.zeros(64, 64, dtype=torch.int8)),
        [f"{O_PROJ} is I8, not F32 or BF16 or F16"],
    ),
    "another model": (
        lambda f: edit(f, num_hidden_layers=3, linear_attn_config=LLF),
        ["not of this model: model.layers.", "missing: "],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json cannot be read"]),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), ["is not JSON"]),
}
LLF = {
    "kda_layers": [1, 2],
    "full_attn_layers": [3],
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_folders_are_refused_before_anything_is_written(folder, tmp_path, case):
    damage, expected = DAMAGE[case]
    damage(folder)
    with pytest.raises(CheckpointError) as error:
        import_hf(folder, tmp_path / "run")
    for text in expected:
        assert text in str(error.value)
    assert not (tmp_path / "run").exists()


def test_half_precision_needs_a_decision(tmp_path):
    random_folder(tmp_path / "hf", dtype=torch.float16)
    with pytest.raises(CheckpointError, match="is F16.*--dtype fp32"):
        import_hf(tmp_path / "hf", tmp_path / "run")
    import_hf(tmp_path / "hf", tmp_path / "run", dtype="fp32")
    stored = StoredCheckpoint(find(str(tmp_path / "run"), "run"))
    expected = published(tmp_path / "hf")["lm_head.weight"].float()
    assert torch.equal(stored.read("output_layer.weight"), expected)


def test_nan_and_infinity_are_named_both_ways(folder, tmp_path):
    router = "model.layers.2.block_sparse_moe.gate.weight"
    change(folder, O_PROJ, torch.full((64, 64), float("nan")))
    change(folder, router, torch.full((8, 64), float("inf")))
    done = import_hf(folder, tmp_path / "run")
    assert done.nonfinite == [
        "decoder.layers.1.self_attention.o_proj.weight",
        "decoder.layers.2.mlp.router.weight",
    ]
    done = export_hf(tmp_path / "run", tmp_path / "out")
    assert done.nonfinite == [O_PROJ, router]
    large = torch.full((10,), 3e38)
    assert is_finite(large), "its sum overflows, and it is finite"


# --- Outputs and interruptions ---


def test_outputs_that_exist(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="--out=.*run exists already"):
        import_hf(folder, run)
    assert [p.name for p in run.iterdir()] == ["notes.txt"]
    import_hf(folder, tmp_path / "imported")
    with pytest.raises(CheckpointError, match="exists already"):
        import_hf(folder, tmp_path / "imported")
    with pytest.raises(CheckpointError, match="--out=.*run exists already"):
        export_hf(tmp_path / "imported", run)


def test_an_interrupted_import_goes_on(folder, tmp_path, monkeypatch):
    change(folder, O_PROJ, torch.full((64, 64), float("nan")))
    run, write = tmp_path / "run", hf_import.CheckpointWriter.write_part
    written = []

    def interrupted(self, name, tensors):
        if len(written) == 3:
            for _ in tensors:  # in the middle of a part
                raise KeyboardInterrupt
        written.append(name)
        write(self, name, tensors)

    monkeypatch.setattr(hf_import.CheckpointWriter, "write_part", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_hf(folder, run)
    assert written == ["embedding", "layer_00000", "layer_00001"]
    assert not (run / "checkpoints/step_00000000").exists()
    with pytest.raises(CheckpointError, match="no run with one"):
        export_hf(run, tmp_path / "out")
    with pytest.raises(CheckpointError, match="something else"):
        import_hf(folder, run, dtype="bf16")

    written.clear()
    monkeypatch.setattr(hf_import.CheckpointWriter, "write_part", write)
    spied = []
    monkeypatch.setattr(
        hf_import.CheckpointWriter,
        "write_part",
        lambda self, name, tensors: (spied.append(name), write(self, name, tensors))[1],
    )
    done = import_hf(folder, run)
    assert spied == ["layer_00002", "layer_00003", "decoder", "output_layer"]
    # Also of the parts that were complete before
    assert done.nonfinite == ["decoder.layers.1.self_attention.o_proj.weight"]
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml"]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step_00000000"]
    export_hf(run, tmp_path / "out")
    first, second = published(folder), published(tmp_path / "out")
    assert all(torch.equal(t.nan_to_num(), second[n].nan_to_num()) for n, t in first.items())


def test_an_export_that_fails_leaves_nothing(folder, tmp_path, monkeypatch):
    import_hf(folder, tmp_path / "run")
    monkeypatch.setattr(
        FolderWriter, "close", lambda self: (_ for _ in ()).throw(OSError(28, "No space left"))
    )
    with pytest.raises(CheckpointError, match="cannot be written: No space left"):
        export_hf(tmp_path / "run", tmp_path / "out")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))
    with pytest.raises(CheckpointError, match="MiB are needed, 0 MiB are free"):
        export_hf(tmp_path / "run", tmp_path / "out")
    with pytest.raises(CheckpointError, match="MiB are needed, 0 MiB are free"):
        import_hf(folder, tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "other", "run"]
    assert not list((tmp_path / "other").rglob("*.distcp"))


def test_a_checkpoint_with_other_tensors_than_its_model(folder, tmp_path):
    import_hf(folder, tmp_path / "run")
    manifest = find(str(tmp_path / "run"), "run") / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["model"]["dense_ffn"] = 97
    manifest.write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match=r"linear_fc1.weight is \[192, 64\], not \[194, 64\]"):
        export_hf(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_without_its_run(folder, tmp_path):
    import_hf(folder, tmp_path / "run")
    moved = Path(shutil.move(find(str(tmp_path / "run"), "run"), tmp_path / "moved"))
    manifest = json.loads((moved / "manifest.json").read_text())
    del manifest["huggingface"]
    (moved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="give --context"):
        export_hf(moved, tmp_path / "out")
    export_hf(moved, tmp_path / "out", context=64)
    config = hf_config.load(tmp_path / "out")
    assert (config["model_max_length"], config["eos_token_id"]) == (64, 256)


def test_shards_are_no_larger_than_asked(folder, tmp_path):
    import_hf(folder, tmp_path / "run")
    export_hf(tmp_path / "run", tmp_path / "out", max_shard_bytes=100_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 5
    assert files[-1].name == f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    found = HFFolder(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(e.size for e in found.entries.values())
    largest = max(entry.size for entry in found.entries.values())
    assert all(sum(t.nbytes for t in load_file(f).values()) <= max(1e5, largest) for f in files)


# --- Tokenizers ---


def test_transformers_gives_the_byte_tokenizers_ids(tmp_path):
    from transformers import AutoTokenizer

    from megakda.data.tokenizer import ByteTokenizer, load_tokenizer

    hf_tokenizer.write_byte(tmp_path)
    ours, theirs = ByteTokenizer(), AutoTokenizer.from_pretrained(tmp_path)
    texts = [
        "",
        " a  b\n\n\tc\r\n",
        "na\u00efve \u4f60\u597d \U0001f469\u200d\U0001f4bb",
        "\x00\x7f",
    ]
    texts.append("".join(map(chr, range(1, 0x250))))
    for text in texts:
        assert theirs.encode(text) == ours.encode(text)
        assert theirs.decode(ours.encode(text)) == text
    assert len(theirs) == ours.vocab_size == 257
    assert theirs.eos_token_id == ours.eod
    assert theirs.decode([104, 105, 256], skip_special_tokens=True) == "hi"
    assert theirs.convert_tokens_to_ids(theirs.convert_ids_to_tokens(range(257))) == [*range(257)]
    # Read back, it is megakda's own again, also from a copy that transformers saved.
    assert hf_tokenizer.find_spec(tmp_path) == "byte"
    theirs.save_pretrained(tmp_path / "again")
    assert hf_tokenizer.find_spec(tmp_path / "again") == "byte"
    assert load_tokenizer(f"hf:{tmp_path}").encode(texts[2]) == ours.encode(texts[2])


def own_tokenizer(folder, words):
    """A Hugging Face tokenizer of some words, with special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def test_the_folders_own_tokenizer_goes_along(folder, tmp_path):
    own_tokenizer(folder, ["a", "b"])
    run = tmp_path / "run"
    import_hf(folder, run)
    spec = StoredCheckpoint(find(str(run), "run")).manifest["tokenizer"]["spec"]
    assert spec == f"hf:{run / 'tokenizer'}"
    export_hf(run, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    # Of weights that were trained on, the special ids are the tokenizer's.
    tokenizer = hf_tokenizer.checked(spec, None, "test")
    assert hf_tokenizer.special_ids(tokenizer) == {"bos": 0, "eos": 1, "pad": None}

    # One that is named must give the same ids.
    own_tokenizer(tmp_path / "other", ["b", "a"])
    with pytest.raises(CheckpointError, match="another tokenizer than hf:.*other"):
        export_hf(run, tmp_path / "out2", tokenizer=f"hf:{tmp_path / 'other'}")


def test_tokenizers_that_do_not_fit(folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="has no tokenizer.*--tokenizer"):
        import_hf(folder, tmp_path / "run")
    own_tokenizer(tmp_path / "large", [f"w{i}" for i in range(400)])
    with pytest.raises(CheckpointError, match="has 403 ids, and the model .* made for 320"):
        import_hf(folder, tmp_path / "run", tokenizer=f"hf:{tmp_path / 'large'}")
    assert not (tmp_path / "run").exists()
    import_hf(folder, tmp_path / "run", tokenizer="byte")


def test_a_tiktoken_folder(folder, tmp_path):
    tiktoken_instead(folder)
    import_hf(folder, tmp_path / "run")
    spec = StoredCheckpoint(find(str(tmp_path / "run"), "run")).manifest["tokenizer"]["spec"]
    assert re.fullmatch(r"tiktoken:.*/run/tokenizer/tiktoken.model", spec)
    tokenizer = hf_tokenizer.checked(spec, None, "test")
    assert hf_tokenizer.special_ids(tokenizer) == {"bos": 256, "eos": 257, "pad": None}
    export_hf(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out/tiktoken.model").read_bytes() == (
        folder / "tiktoken.model"
    ).read_bytes()
