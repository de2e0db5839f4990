"""Checkpoints as files: what ranks save is read whole, what is written loads at any layout."""

import json
import os
import shutil
import warnings
import zipfile
from itertools import product

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megakda.checkpoint.folders import (
    CONTENT,
    MANIFEST,
    architecture_differences,
    check_architecture,
    complete,
    find,
    read_manifest,
)
from megakda.checkpoint.manager import check_resumable
from megakda.checkpoint.stored import CheckpointWriter, StoredCheckpoint
from megakda.errors import CheckpointError
from megakda.models.sharding import METADATA
from tests import jobs


def whole(tensor):
    """A tensor as the one block of itself."""
    return tensor, tuple(tensor.shape), (0,) * tensor.dim()


def written(path, parts, **manifest):
    """A checkpoint of named tensors, one part for each dict in `parts`."""
    writer = CheckpointWriter(path)
    for number, tensors in enumerate(parts):
        writer.write_part(f"p{number}", [(name, *whole(t)) for name, t in tensors.items()])
    writer.finish({"step": 1, **manifest}, {"steps_done": 1})
    return StoredCheckpoint(path)


def numbers(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# What ranks save


@pytest.fixture(scope="module")
def saved(ranks, corpus, tmp_path_factory):
    """A run of two steps on 2 x 2 ranks, and its weights."""
    out = tmp_path_factory.mktemp("saved")
    overrides = ["parallel=tp2_pp2", "train.steps=2"]
    return out, ranks.run(4, jobs.fit, overrides, corpus, str(out))[0]["weights"]


def test_what_ranks_saved_is_read_tensor_by_tensor(saved):
    out, weights = saved
    checkpoint = StoredCheckpoint(find(str(out), "checkpoint"))
    assert checkpoint.manifest["parallel"]["pipeline"] == 2
    assert checkpoint.trainer["steps_done"] == 2
    assert not checkpoint.objects
    biases = {name for name in checkpoint.model_names() if name.endswith("expert_bias")}
    assert len(biases) == 3
    assert set(checkpoint.model_names()) == weights.keys() | biases
    assert max(len(checkpoint.tensors[name].chunks) for name in weights) > 1
    for name, weight in weights.items():
        assert torch.equal(checkpoint.read(name), weight), name
        for start, stop in ((0, 1), (1, len(weight) // 2 + 1), (len(weight) - 1, None)):
            assert torch.equal(checkpoint.read(name, start, stop), weight[start:stop]), name
        main = checkpoint.read(f"optimizer.state.param.{name}")
        assert torch.equal(main, weight), name


def test_content_names_agree():
    assert METADATA.items() <= CONTENT.items()


# What torch writes, and reads


def test_torch_reads_what_is_written(tmp_path):
    tensors = {"a": numbers(5, 3), "b": numbers(4, dtype=torch.bfloat16), "c": torch.tensor(2.0)}
    written(tmp_path / "it", [{"a": tensors["a"]}, {"b": tensors["b"], "c": tensors["c"]}])
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(found, checkpoint_id=tmp_path / "it", no_dist=True)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)


def test_what_torch_writes_is_read_also_if_it_is_not_in_rows(tmp_path):
    tensors = {
        "transposed": numbers(6, 4).t(),
        "half": numbers(3, 5, dtype=torch.bfloat16),
        "single": numbers(4, 1).t().expand(1, 4),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
    }
    dcp.save(dict(tensors), checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / MANIFEST).write_text(json.dumps({"format": 1}))
    checkpoint = StoredCheckpoint(tmp_path)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor), name
    assert torch.equal(checkpoint.read("transposed", 1, 3), tensors["transposed"][1:3])
    with pytest.raises(CheckpointError, match="holds no tensor nothing"):
        checkpoint.read("nothing")
    with pytest.raises(ValueError, match="rows 2:9 of half, which has 3"):
        checkpoint.read("half", 2, 9)


KINDS = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"]


def test_every_dtype_comes_back_without_a_warning(tmp_path):
    tensors = {kind: numbers(3, dtype=getattr(torch, kind)) for kind in KINDS}
    tensors["bool"] = torch.tensor([True, False])
    checkpoint = written(tmp_path / "it", [tensors])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, tensor in tensors.items():
            assert torch.equal(checkpoint.read(name), tensor), name


def test_blocks_of_every_axis(tmp_path):
    tensor = numbers(7, 6, 2)
    writer = CheckpointWriter(tmp_path / "it")
    cuts = [slice(0, 3), slice(3, 6)]
    rows = [slice(0, 4), slice(4, 7)]
    for number, (a, b) in enumerate(product(rows, cuts)):
        block = tensor[a, b]  # a view: not contiguous, with a larger storage
        writer.write_part(f"{number}", [("x", block, (7, 6, 2), (a.start, b.start, 0))])
    writer.finish({}, {})
    checkpoint = StoredCheckpoint(tmp_path / "it")
    assert max(chunk.length for chunk in checkpoint.tensors["x"].chunks) < 2000
    for start, stop in ((0, 7), (3, 5), (5, 7), (2, 2)):
        assert torch.equal(checkpoint.read("x", start, stop), tensor[start:stop])


# Damage


def _flip(folder):
    """Changes a bit of the numbers in p0."""
    file = folder / "p0.distcp"
    with zipfile.ZipFile(file) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith("data/0"))
    data = bytearray(file.read_bytes())
    data[info.header_offset + info.file_size // 2] ^= 1  # the header is shorter than half of them
    file.write_bytes(data)


DAMAGE = {
    "no tensors": (lambda f: os.remove(f / "p1.distcp"), r"p1\.distcp cannot be read: No such"),
    "truncated": (lambda f: os.truncate(f / "p1.distcp", 900), r"p1\.distcp is damaged: .* 900"),
    "no index": (lambda f: os.remove(f / ".metadata"), r"\.metadata cannot be read"),
    "bad index": (lambda f: (f / ".metadata").write_bytes(b"no"), r"\.metadata cannot be read"),
    "no common.pt": (lambda f: os.remove(f / "common.pt"), r"common\.pt cannot be read"),
    "bad common.pt": (lambda f: os.truncate(f / "common.pt", 99), r"common\.pt cannot be read"),
    "no manifest": (lambda f: os.remove(f / MANIFEST), r"manifest\.json cannot be read"),
    "bad manifest": (lambda f: (f / MANIFEST).write_text("{"), r"manifest\.json cannot be read"),
    "strange manifest": (
        lambda f: (f / MANIFEST).write_text("[1]"),
        r"manifest\.json holds no JSON",
    ),
    "other format": (
        lambda f: (f / MANIFEST).write_text('{"format": 9}'),
        r"checkpoint format 9; this version reads 1",
    ),
    "other bytes": (
        lambda f: (f / "p1.distcp").write_bytes(bytes((f / "p1.distcp").stat().st_size)),
        r"p1\.distcp is damaged: b cannot be read",
    ),
    "flipped bit": (_flip, r"p0\.distcp is damaged: a cannot be read.*checksum"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(tmp_path, case):
    damage, message = DAMAGE[case]
    folder = tmp_path / "it"
    written(folder, [{"a": numbers(512, 2)}, {"b": numbers(30)}])
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        checkpoint = StoredCheckpoint(folder)
        assert checkpoint.trainer
        # In two steps: the checksum is of both together.
        for name in checkpoint.tensors:
            checkpoint.read(name, 0, 5)
            checkpoint.read(name, 5)


# Writing


def test_an_interrupted_writer_is_continued(tmp_path):
    target = tmp_path / "root" / "step_00000001"

    def fails():
        yield "b", *whole(numbers(3))
        raise KeyboardInterrupt

    writer = CheckpointWriter(target, {"of": "x"})
    with pytest.raises(CheckpointError, match="another process is writing there"):
        CheckpointWriter(target, {"of": "y"})
    writer.write_part("a", [("a", *whole(numbers(4)))])
    with pytest.raises(KeyboardInterrupt):
        writer.write_part("b", fails())
    with open(writer.partial / ".c.distcp.1.tmp", "w") as file:  # as a killed one leaves it
        file.write("half")
    writer.close()
    assert not target.exists() and not complete(target.parent)

    with pytest.raises(CheckpointError, match="holds parts of something else"):
        CheckpointWriter(target, {"of": "y"})
    again = CheckpointWriter(target, {"of": "x"})
    assert again.has_part("a") and not again.has_part("b")
    again.write_part("b", [("b", *whole(numbers(3)))])
    again.finish({"step": 1}, {})
    assert complete(target.parent) == [target]
    names = [".metadata", "a.distcp", "b.distcp", "common.pt", MANIFEST, "metadata.json"]
    assert sorted(p.name for p in target.iterdir()) == names
    checkpoint = StoredCheckpoint(target)
    assert torch.equal(checkpoint.read("a"), numbers(4))
    assert torch.equal(checkpoint.read("b"), numbers(3))
    with pytest.raises(CheckpointError, match="exists"):
        CheckpointWriter(target)


def test_a_part_that_lost_bytes_is_written_again(tmp_path):
    writer = CheckpointWriter(tmp_path / "it")
    writer.write_part("a", [("a", *whole(numbers(4)))])
    os.truncate(writer.partial / "a.distcp", 10)
    writer.close()
    assert not CheckpointWriter(tmp_path / "it").has_part("a")


X = numbers(4, 4)
WRONG = {
    "gap": ([(X[:2], (4, 4), (0, 0))], "x is incomplete: 8 of 16"),
    "twice": ([(X, (4, 4), (0, 0)), (X[:1], (4, 4), (3, 0))], "blocks overlap"),
    "outside": ([(X, (4, 4), (1, 0))], "outside"),
    "axes": ([(X, (16,), (0,))], "outside"),
    "dtypes": ([(X[:2], (4, 4), (0, 0)), (X[2:].double(), (4, 4), (2, 0))], "differ in dtype"),
    "nothing": ([], "no tensor"),
}


@pytest.mark.parametrize("case", WRONG)
def test_blocks_cover_every_tensor_once(tmp_path, case):
    blocks, message = WRONG[case]
    writer = CheckpointWriter(tmp_path / "it")
    writer.write_part("p", [("x", *block) for block in blocks])
    with pytest.raises(CheckpointError, match=message):
        writer.finish({}, {})
    assert not writer.target.exists()


def test_a_full_disk_is_named(tmp_path):
    import resource

    writer = CheckpointWriter(tmp_path / "it")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="writing .*it failed"):
            writer.write_part("p", [("x", *whole(numbers(100_000)))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not writer.has_part("p") and not list(writer.partial.glob("*.distcp"))


# Manifests


def test_settings_that_an_older_manifest_lacks_are_at_their_defaults(saved, tmp_path):
    source = find(str(saved[0]), "checkpoint")
    model = read_manifest(source)["model"]
    old = json.loads((source / MANIFEST).read_text())
    del old["model"]["moe"]["num_groups"], old["model"]["linear"]["output_gate"]
    (tmp_path / MANIFEST).write_text(json.dumps(old))
    check_architecture(tmp_path, model)
    check_architecture(source, old["model"])

    grouped = {**model, "moe": {**model["moe"], "num_groups": 4}}
    with pytest.raises(CheckpointError, match=r"moe\.num_groups is 1 there and 4 here"):
        check_architecture(tmp_path, grouped)
    other_rate = {**model, "init_std": 0.1, "moe": {**model["moe"], "bias_update_rate": 0.5}}
    check_architecture(tmp_path, other_rate)  # how a model is trained
    del old["model"]["num_heads"]  # which has no default
    assert architecture_differences(old["model"], model) == [
        "model.num_heads is None there and 4 here"
    ]


@pytest.mark.parametrize("resume", ["auto", "named"])
def test_weights_alone_are_not_resumed(ranks, corpus, saved, tmp_path, resume):
    folder = tmp_path / "checkpoints" / "step_00000002"
    shutil.copytree(find(str(saved[0]), "checkpoint"), folder)
    manifest = read_manifest(folder)
    check_resumable(folder, "adamw")
    (folder / MANIFEST).write_text(json.dumps({**manifest, "weights_only": True}))
    out = tmp_path if resume == "auto" else tmp_path / "other"
    overrides = ["train.steps=3", f"train.resume={resume if resume == 'auto' else folder}"]
    kind, message = ranks.run(1, jobs.error_of, jobs.fit, overrides, corpus, str(out))[0]
    assert kind == "CheckpointError"
    assert "holds weights only" in message and f"train.weights={folder}" in message
