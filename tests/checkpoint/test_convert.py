"""Checkpoints from checkpoints, through the functions and through the tool."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch

import megakda
from megakda.checkpoint import convert, inspection
from megakda.checkpoint.folders import MANIFEST, complete, find, latest
from megakda.checkpoint.stored import CheckpointWriter, StoredCheckpoint
from megakda.errors import CheckpointError, ConfigError
from tests import jobs
from tests.checkpoint.test_stored import numbers, written

TOOL = Path(megakda.__file__).resolve().parents[1] / "tools" / "convert_checkpoint.py"
ALONE = ["train.save_every=1", "train.global_batch=2"]


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("convert_checkpoint_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def run(ranks, corpus, tmp_path_factory):
    """A run on two ranks with two checkpoints, after two steps and after three."""
    out = tmp_path_factory.mktemp("run")
    ranks.run(2, jobs.fit, [*ALONE, "parallel=tp2_ep2", "train.steps=3"], corpus, str(out))
    (out / "config.yaml").write_text("model:\n  precision: no\nprecision: fp32\n")
    return out


@pytest.fixture(scope="module")
def both(run):
    first, second = complete(run / "checkpoints")
    return StoredCheckpoint(first), StoredCheckpoint(second)


def opened(out):
    return StoredCheckpoint(find(str(out), "out"))


def same_bits(one, other):
    assert list(one.tensors) == list(other.tensors)
    for name in one.tensors:
        a, b = one.read(name), other.read(name)
        assert a.dtype == b.dtype and torch.equal(a, b), name


def test_reshard_bounds_files_and_a_run_goes_on_bit_for_bit(ranks, corpus, run, both, tmp_path):
    limit = 40_000
    out = tmp_path / "out"
    result = convert.reshard(str(run), out, limit)
    assert result.path == latest(out / "checkpoints") == out / "checkpoints" / "step_00000003"
    assert (out / "config.yaml").read_text() == (run / "config.yaml").read_text()
    resharded = opened(out)
    same_bits(both[1], resharded)
    assert resharded.manifest["converted"]["command"] == "reshard"
    files = {}
    for tensor in resharded.tensors.values():
        for chunk in tensor.chunks:
            assert chunk.shape[1:] == tensor.shape[1:]
            size = tensor.nbytes // tensor.rows * chunk.shape[0]
            files.setdefault(chunk.file, []).append((size, chunk.shape[0]))
    for chunks in files.values():  # a single row may be larger
        assert sum(size for size, _ in chunks) <= limit or [rows for _, rows in chunks] == [1]
    assert len(files) > 20

    def resumed(path, name):
        overrides = [*ALONE, "parallel=pp2", "train.steps=4", f"train.resume={path}"]
        return ranks.run(2, jobs.fit, overrides, corpus, str(tmp_path / name))[0]

    expected, found = resumed(run, "original"), resumed(out, "resharded")
    assert found["loss"] == expected["loss"] and len(found["loss"]) == 1
    for name, weight in expected["weights"].items():
        assert torch.equal(found["weights"][name], weight), name


def test_strip_loads_as_weights_of_another_run(ranks, corpus, run, both, tmp_path):
    result = convert.strip(str(both[0].path), tmp_path / "out")
    stripped = opened(tmp_path / "out")
    assert stripped.manifest["weights_only"] and stripped.manifest["step"] == 2
    assert list(stripped.tensors) == both[0].model_names() and not stripped.trainer
    assert result.nbytes == sum(t.nbytes for t in stripped.tensors.values())
    for name in stripped.tensors:
        assert torch.equal(stripped.read(name), both[0].read(name)), name
    still = ["optim.lr=1e-30", "optim.weight_decay=0"]
    overrides = [*ALONE, *still, "train.steps=1", f"train.weights={tmp_path / 'out'}"]
    weights = ranks.run(1, jobs.fit, overrides, corpus, str(tmp_path / "begun"))[0]["weights"]
    for name, weight in weights.items():
        assert torch.equal(weight, both[0].read(name)), name


def test_cast_gives_what_a_run_of_that_precision_holds(ranks, corpus, run, both, tmp_path):
    ranks.run(1, jobs.fit, ["precision=bf16", "train.steps=1"], corpus, str(tmp_path / "bf16_run"))
    bf16_run = opened(tmp_path / "bf16_run")
    convert.cast(str(run), tmp_path / "bf16", "bf16")
    cast = opened(tmp_path / "bf16")
    assert cast.manifest["precision"] == "bf16" and cast.manifest["weights_only"]
    config = "model:\n  precision: no\nprecision: bf16\n"
    assert (tmp_path / "bf16" / "config.yaml").read_text() == config
    assert {n: cast.tensors[n].dtype for n in cast.tensors} == {
        n: bf16_run.tensors[n].dtype for n in bf16_run.model_names()
    }
    for name, tensor in cast.tensors.items():
        assert torch.equal(cast.read(name), both[1].read(name).to(tensor.dtype)), name

    convert.cast(str(tmp_path / "bf16"), tmp_path / "fp32", "fp32")
    back = opened(tmp_path / "fp32")
    assert back.manifest["precision"] == "fp32"
    for name in back.tensors:
        assert back.tensors[name].dtype == torch.float32
        assert torch.equal(back.read(name), cast.read(name).float()), name
    with pytest.raises(ConfigError, match="--dtype=fp16 must be one of fp32, bf16"):
        convert.cast(str(run), tmp_path / "fp16", "fp16")


@pytest.mark.parametrize("weights", [None, [1, 3]])
def test_average(both, tmp_path, weights):
    convert.average([str(c.path) for c in both], tmp_path / "out", weights, chunk_bytes=30_000)
    mean = opened(tmp_path / "out")
    assert mean.manifest["step"] == 3 and mean.manifest["weights_only"]
    shares = [0.5, 0.5] if weights is None else [0.25, 0.75]
    assert mean.manifest["converted"]["weights"] == shares
    assert list(mean.tensors) == both[0].model_names()
    assert any(name.endswith("expert_bias") for name in mean.tensors)
    for name in mean.tensors:
        a, b = (checkpoint.read(name).double() for checkpoint in both)
        assert not torch.equal(a, b) or "norm" in name or "bias" in name, name
        assert torch.equal(mean.read(name), (a * shares[0] + b * shares[1]).float()), name


def test_what_has_no_average(tmp_path):
    def made(name, tensor, tokenizer="t", **model):
        manifest = {"model": model, "tokenizer": {"spec": tokenizer, "fingerprint": tokenizer}}
        return str(written(tmp_path / name, [{"x": tensor}], **manifest).path)

    one = made("one", numbers(4), num_heads=4)
    for other, message in (
        (made("heads", numbers(4), num_heads=2), "num_heads is 4 there and 2 here"),
        (made("tokens", numbers(4), "other", num_heads=4), "tokenizer"),
        (made("shapes", numbers(5), num_heads=4), r"x has the shape \(4,\) .* and \(5,\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert.average([other, one], tmp_path / "out")
    for weights in ([1], [1, -1], [0, 0], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(ConfigError, match="give one to each"):
            convert.average([one, one], tmp_path / "out", weights)
    with pytest.raises(ConfigError, match="at least two"):
        convert.average([one], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_conversion_goes_on(monkeypatch, run, both, tmp_path):
    out = tmp_path / "out"
    written_parts = []
    write_part = CheckpointWriter.write_part

    def interrupted(self, name, tensors):
        if len(written_parts) == 3:
            raise KeyboardInterrupt
        written_parts.append(name)
        write_part(self, name, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "write_part", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert.strip(str(run), out, 100_000)
    assert (out / "config.yaml").is_file()
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        find(str(out), "train.weights")
    with pytest.raises(CheckpointError, match="interrupted"):
        convert.strip(str(run), out, 200_000)
    with pytest.raises(CheckpointError, match="exists"):  # of another step
        convert.strip(str(both[0].path), out, 100_000)

    result = convert.strip(str(run), out, 100_000)
    assert (
        result.kept == 3
        and not result.not_finite
        and "3 files of an interrupted conversion were kept" in str(result)
    )
    for name in both[1].model_names():
        assert torch.equal(opened(out).read(name), both[1].read(name)), name
    with pytest.raises(CheckpointError, match="exists: choose another --out"):
        convert.strip(str(run), out, 100_000)
    assert not list(out.rglob("*.json.tmp")) and not list(out.rglob(".*partial"))


def test_other_peoples_files_are_left_alone(run, tmp_path):
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        convert.strip(str(run), tmp_path / "out")
    with pytest.raises(CheckpointError, match="exists"):
        convert.strip(str(run), tmp_path / "out" / "notes")
    assert (tmp_path / "out" / "notes").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert convert.strip(str(run), tmp_path / "empty").tensors


def test_too_little_space_is_noticed_before_writing(monkeypatch, run, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 2**20}))
    with pytest.raises(CheckpointError, match="1 MiB are free"):
        convert.strip(str(run), tmp_path / "out")
    assert not list(tmp_path.rglob("*.distcp"))


def test_numbers_that_are_none_are_reported(tmp_path, monkeypatch):
    tensor = numbers(50, 3)
    tensor[3, 1], tensor[40] = float("nan"), float("inf")
    model = {"x": tensor, "y": numbers(3), "optimizer.state.exp_avg.x": tensor}
    source = written(tmp_path / "in", [model])
    with monkeypatch.context() as patched:  # interrupted after all parts: they are not read again
        patched.setattr(CheckpointWriter, "finish", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert.cast(str(source.path), tmp_path / "out", "bf16", chunk_bytes=60)
    result = convert.cast(str(source.path), tmp_path / "out", "bf16", chunk_bytes=60)
    assert result.kept > 1 and not list(result.path.glob("not_finite*"))
    assert result.not_finite == ["x"] and "warning: x holds numbers" in str(result)

    found = inspection.inspect(str(source.path), optimizer=True)
    x, y, state = found.tensors
    assert (x.nan, x.inf, x.elements, x.dtype) == (1, 3, 150, "float32")
    assert x.rms != x.rms and x.largest != x.largest
    assert y.rms == pytest.approx(float(numbers(3).square().mean().sqrt()))
    assert y.largest == float(numbers(3).abs().max()) and state.nan == 1
    assert "3 tensors, 303 numbers, 1,212 bytes; 2 tensors hold 2 NaN and 6 infinite" in str(found)
    assert [t.name for t in inspection.inspect(str(source.path)).tensors] == ["x", "y"]
    assert not inspection.compare(str(source.path), str(source.path)).differs


def test_inspect_through_the_tool(main, capsys, run, both, tmp_path):
    first, second = (str(checkpoint.path) for checkpoint in both)
    assert main(["inspect", first, "--filter", r"layers\.1\..*(A_log|router)"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "step 2, fp32, with optimizer, saved at tensor 2 x expert 2" in lines[0]
    assert [line.split()[0] for line in lines[3:-2]] == [
        "decoder.layers.1.self_attention.A_log",
        "decoder.layers.1.mlp.router.weight",
        "decoder.layers.1.mlp.router.expert_bias",
    ]
    rms = float(both[0].read("decoder.layers.1.mlp.router.weight").square().mean().sqrt())
    assert f"8 x 64  float32  {rms:.4g}" in re.sub("  +", "  ", lines[4])

    arguments = ["inspect", first, "--other", second, "--filter", "output_layer"]
    assert main(arguments) == 0
    assert main([*arguments, "--fail-on-difference"]) == 1
    a, b = (checkpoint.read("output_layer.weight").double() for checkpoint in both)
    row = f"{(a - b).abs().max():.4g}  {(a - b).norm() / a.norm():.4g}"
    assert row in re.sub("  +", "  ", capsys.readouterr().out)
    assert main(["inspect", str(run), "--other", second, "--fail-on-difference"]) == 0
    assert "0 of" in capsys.readouterr().out

    others = written(tmp_path / "others", [{"x": numbers(2), "y": numbers(3)}])
    these = written(tmp_path / "these", [{"y": numbers(3).bfloat16().float(), "z": numbers(2)}])
    cast = convert.cast(str(these.path), tmp_path / "cast", "bf16").path
    assert main(["inspect", str(others.path), "--other", str(these.path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"x +2 +only in a", shown) and re.search(r"z +2 +only in b", shown)
    assert main(["inspect", str(these.path), "--other", str(cast), "--filter", "y"]) == 0
    assert re.search(r"y +3 +0 +0 +float32 in a, bfloat16 in b", capsys.readouterr().out)


def test_the_tool_converts_and_refuses(main, capsys, run, both, tmp_path):
    out = str(tmp_path / "out")
    first, second = (str(checkpoint.path) for checkpoint in both)
    assert main(["average", first, second, "--weights", "2", "2", "--out", out]) == 0
    assert main(["reshard", first, "--out", f"{out}2", "--max-chunk-size", "30KiB"]) == 0
    assert main(["strip", out, "--out", f"{out}3"]) == 0
    assert main(["cast", out, "--out", f"{out}4", "--dtype", "bf16"]) == 0
    assert f"{out}4/checkpoints/step_00000003: " in capsys.readouterr().out
    for arguments, code, message in (
        (["strip", out, "--out", out], 4, "exists"),
        (["strip", f"{out}5", "--out", f"{out}6"], 4, "not a complete checkpoint"),
        (["cast", out, "--out", f"{out}6", "--dtype", "fp8"], 2, "--dtype=fp8"),
        (
            ["reshard", out, "--out", f"{out}6", "--max-chunk-size", "1 parsec"],
            2,
            "--max-chunk-size=1 parsec is no size",
        ),
        (["inspect", out, "--filter", "("], 2, "--filter=(: no regular expression"),
    ):
        assert main(arguments) == code
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error
    assert not Path(f"{out}6").exists()


def test_what_is_no_tensor_is_not_dropped_silently(run, both, tmp_path, monkeypatch):
    init = StoredCheckpoint.__init__

    def with_objects(objects):
        def made(self, path):
            init(self, path)
            self.objects = objects

        return made

    monkeypatch.setattr(StoredCheckpoint, "__init__", with_objects(["rng_state/shard_0_1"]))
    with pytest.raises(CheckpointError, match="rng_state/shard_0_1, which is no tensor"):
        convert.reshard(str(run), tmp_path / "out")
    empty = "decoder.layers.0.mlp.linear_fc1._extra_state/shard_0_1"
    monkeypatch.setattr(StoredCheckpoint, "__init__", with_objects([empty]))
    assert convert.reshard(str(run), tmp_path / "out").tensors


def test_manifest_of_a_conversion_is_json(both, tmp_path):
    result = convert.strip(str(both[0].path), tmp_path / "out")
    facts = json.loads((result.path / MANIFEST).read_text())
    assert facts["format"] == 1 and facts["megakda"] == megakda.__version__
    assert facts["converted"] == {"command": "strip", "sources": [str(both[0].path)]}
    assert facts["model"] == both[0].manifest["model"]


def test_an_interruption_is_no_traceback(main, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(convert, "strip", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["strip", "run", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err.startswith("interrupted; ")
