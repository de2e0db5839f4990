"""The command lines of conversion, and the 48B model at its true shapes."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import megakda
from megakda.checkpoint.hf_import import dry_run
from tests.checkpoint.hf_jobs import random_folder

ROOT = Path(megakda.__file__).resolve().parents[1]
CONFIG_48B = ROOT / "tests/checkpoint/kimi_linear_48b_config.json"


def main_of(tool):
    spec = importlib.util.spec_from_file_location(f"{tool}_tool", ROOT / "tools" / f"{tool}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


import_main, export_main = main_of("import_hf"), main_of("export_hf")


def published_48b():
    """(name, dtype, shape) of every tensor of the 48B model, spelled out from its settings."""
    c = json.loads(CONFIG_48B.read_text())
    linear = c["linear_attn_config"]
    hidden, heads, kda = c["hidden_size"], c["num_attention_heads"], linear["head_dim"]
    both = heads * kda
    mla_heads = {
        "q_proj": heads * (c["qk_nope_head_dim"] + c["qk_rope_head_dim"]),
        "kv_b_proj": heads * (c["qk_nope_head_dim"] + c["v_head_dim"]),
        "o_proj": heads * c["v_head_dim"],
    }
    yield "model.embed_tokens.weight", "BF16", (c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield f"{at}input_layernorm.weight", "BF16", (hidden,)
        yield f"{at}post_attention_layernorm.weight", "BF16", (hidden,)
        attn = f"{at}self_attn."
        if layer + 1 in linear["kda_layers"]:
            for name in "qkv":
                yield f"{attn}{name}_proj.weight", "BF16", (both, hidden)
                yield f"{attn}{name}_conv1d.weight", "BF16", (both, 1, 4)
            yield f"{attn}A_log", "F32", (1, 1, heads, 1)
            yield f"{attn}dt_bias", "F32", (both,)
            yield f"{attn}b_proj.weight", "BF16", (heads, hidden)
            for gate in "fg":
                yield f"{attn}{gate}_a_proj.weight", "BF16", (kda, hidden)
                yield f"{attn}{gate}_b_proj.weight", "BF16", (both, kda)
            yield f"{attn}o_norm.weight", "BF16", (kda,)
            yield f"{attn}o_proj.weight", "BF16", (hidden, both)
        else:
            latent = c["kv_lora_rank"]
            yield f"{attn}q_proj.weight", "BF16", (mla_heads["q_proj"], hidden)
            down = (latent + c["qk_rope_head_dim"], hidden)
            yield f"{attn}kv_a_proj_with_mqa.weight", "BF16", down
            yield f"{attn}kv_a_layernorm.weight", "BF16", (latent,)
            yield f"{attn}kv_b_proj.weight", "BF16", (mla_heads["kv_b_proj"], latent)
            yield f"{attn}o_proj.weight", "BF16", (hidden, mla_heads["o_proj"])
        if layer < c["first_k_dense_replace"]:
            feeds = [(f"{at}mlp.", ("gate_proj", "up_proj", "down_proj"), c["intermediate_size"])]
        else:
            moe, width = f"{at}block_sparse_moe.", c["moe_intermediate_size"]
            yield f"{moe}gate.weight", "BF16", (c["num_experts"], hidden)
            yield f"{moe}gate.e_score_correction_bias", "F32", (c["num_experts"],)
            feeds = [
                (f"{moe}experts.{e}.", ("w1", "w3", "w2"), width) for e in range(c["num_experts"])
            ]
            feeds.append((f"{moe}shared_experts.", ("gate_proj", "up_proj", "down_proj"), width))
        for prefix, (gate, up, back), width in feeds:
            yield f"{prefix}{gate}.weight", "BF16", (width, hidden)
            yield f"{prefix}{up}.weight", "BF16", (width, hidden)
            yield f"{prefix}{back}.weight", "BF16", (hidden, width)
    yield "model.norm.weight", "BF16", (hidden,)
    yield "lm_head.weight", "BF16", (c["vocab_size"], hidden)


def write_sparse(folder, tensors, shards):
    """Shards of zeros that take no room on the disk, with their index."""
    folder.mkdir()
    weight_map, share = {}, -(-len(tensors) // shards)
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, offset = {}, 0
        for name, dtype, shape in tensors[number * share : (number + 1) * share]:
            end = offset + math.prod(shape) * {"BF16": 2, "F32": 4}[dtype]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
            weight_map[name], offset = file, end
        text = json.dumps(header).encode()
        with open(folder / file, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + offset)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def folder_48b(tmp_path_factory):
    folder = tmp_path_factory.mktemp("48b") / "hf"
    write_sparse(folder, list(published_48b()), shards=20)
    shutil.copy(CONFIG_48B, folder / "config.json")
    return folder


def test_the_48b_model_passes_a_dry_run_and_fits_in_16_gb(folder_48b, capsys):
    sizes = [math.prod(shape) for _, _, shape in published_48b()]
    assert sum(sizes) == 49_122_681_728  # with the buffers of routing biases
    # Routers become fp32.
    routers = sum(math.prod(s) for name, _, s in published_48b() if name.endswith(".gate.weight"))
    stored = sum(math.prod(s) * (2 if d == "BF16" else 4) for _, d, s in published_48b())
    found = dry_run(folder_48b)
    assert found.published == len(sizes) and found.precision == "bf16"
    assert found.bytes == stored + 2 * routers
    assert found.parts == 1 + 27 + 2  # embedding, layers, final norm, output layer
    assert found.memory < 2**30
    assert import_main(["--hf", str(folder_48b), "--dry-run"]) == 0
    assert "20,493 published tensors are 550 of megakda's in 30 parts" in capsys.readouterr().out


def test_a_dry_run_of_the_48b_model_finds_what_is_wrong(folder_48b, tmp_path, capsys):
    folder = tmp_path / "hf"
    tensors = [entry for entry in published_48b() if ".experts.255.w3" not in entry[0]]
    tensors[5] = (tensors[5][0] + "s", *tensors[5][1:])
    tensors[9] = (*tensors[9][:2], (1, *tensors[9][2]))
    write_sparse(folder, tensors, shards=3)
    shutil.copy(CONFIG_48B, folder / "config.json")
    assert import_main(["--hf", str(folder), "--dry-run"]) == 4
    error = capsys.readouterr().err
    for text in ("27 missing: ", "experts.255.w3.weight", "1 not of this model", "1 of another"):
        assert text in error


def test_there_and_back_on_the_command_line(tmp_path, capsys):
    folder, run, out = tmp_path / "hf", tmp_path / "run", tmp_path / "out"
    random_folder(folder)
    assert import_main(["--hf", str(folder), "--out", str(run), "--dtype", "bf16"]) == 0
    printed = capsys.readouterr()
    assert "in bf16" in printed.out and "import: 100%" in printed.err
    export = ["--checkpoint", str(run), "--out", str(out), "--max-shard-size", "1MB", "--quiet"]
    assert export_main(export) == 0
    printed = capsys.readouterr()
    assert "MiB/s" in printed.out and printed.err == ""
    first, second = (
        {n: t for file in f.glob("*.safetensors") for n, t in load_file(file).items()}
        for f in (folder, out)
    )
    assert first.keys() == second.keys()
    for name, tensor in second.items():
        assert torch.equal(tensor, first[name].to(tensor.dtype)), name
        assert torch.equal(tensor.bfloat16(), first[name].bfloat16()), name


def test_errors_on_the_command_line(tmp_path, capsys):
    folder, run = tmp_path / "hf", tmp_path / "run"
    random_folder(folder)
    assert import_main(["--hf", str(tmp_path / "nothing"), "--out", str(run)]) == 4
    assert "name a Hugging Face folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        import_main(["--hf", str(folder)])
    assert "--out is needed" in capsys.readouterr().err
    assert export_main(["--checkpoint", str(run), "--out", str(tmp_path / "out")]) == 4
    assert "not a complete checkpoint" in capsys.readouterr().err
    assert import_main(["--hf", str(folder), "--out", str(run), "--quiet"]) == 0
    export = ["--checkpoint", str(run), "--out", str(tmp_path / "out")]
    assert export_main([*export, "--max-shard-size", "huge"]) == 2
    assert "--max-shard-size=huge" in capsys.readouterr().err
    assert export_main([*export, "--tokenizer", "spm:x"]) == 3
    assert not (tmp_path / "out").exists()
