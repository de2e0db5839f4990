"""Imported runs that move, tokenizers behind links, two writers of one folder, damaged settings."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megakda.checkpoint import convert, hf_config, hf_tokenizer
from megakda.checkpoint.folders import find
from megakda.checkpoint.hf_export import export_hf
from megakda.checkpoint.hf_import import dry_run, import_hf
from megakda.data.tokenizer import load_tokenizer
from megakda.errors import CheckpointError, ConfigError, DataError
from tests.checkpoint.hf_jobs import edit, random_folder, tiktoken_instead


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "folder"
    random_folder(folder)
    tiktoken_instead(folder)
    import_hf(folder, folder.parent / "run")
    return folder.parent


@pytest.fixture
def folder(pristine, tmp_path):
    return Path(shutil.copytree(pristine / "folder", tmp_path / "folder"))


@pytest.fixture
def run(pristine, tmp_path):
    """An imported run, copied to where neither its manifest nor its config.yaml say that it is."""
    return Path(shutil.copytree(pristine / "run", tmp_path / "run"))


@pytest.fixture
def lost(pristine):
    """The place that they name is gone for a while."""
    (pristine / "run").rename(pristine / "gone")
    yield
    (pristine / "gone").rename(pristine / "run")


@pytest.fixture
def cache(folder, tmp_path):
    """The folder as a Hugging Face cache holds it: links into a folder of blobs."""
    revision = tmp_path / "cache/snapshots/1a2b"
    revision.mkdir(parents=True)
    (tmp_path / "cache/blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.move(path, tmp_path / f"cache/blobs/{number}")
        (revision / path.name).symlink_to(f"../../blobs/{number}")
    return revision


def manifest_of(run):
    return json.loads((find(str(run), "run") / "manifest.json").read_text())


# --- Tokenizers ---


def test_a_cache_of_links_keeps_its_tokenizer(cache, tmp_path, monkeypatch):
    spec = hf_tokenizer.find_spec(cache)
    assert spec == f"tiktoken:{cache}/tiktoken.model"
    assert (
        load_tokenizer(spec).fingerprint
        != load_tokenizer(
            f"tiktoken:{(cache / 'tiktoken.model').resolve()}"  # without the file beside it
        ).fingerprint
    )
    monkeypatch.chdir(cache)
    assert hf_tokenizer.absolute("tiktoken:tiktoken.model") == spec
    assert hf_tokenizer.absolute("hf:.") == f"hf:{cache}"
    assert hf_tokenizer.absolute("byte") == "byte"
    import_hf(cache, tmp_path / "own")
    import_hf(cache, tmp_path / "named", tokenizer="tiktoken:tiktoken.model")
    for name in ("own", "named"):
        said = manifest_of(tmp_path / name)["tokenizer"]
        assert load_tokenizer(said["spec"]).fingerprint == said["fingerprint"]
    config = json.loads((cache / "config.json").read_text())
    del config["megakda"]  # which has the model's name
    (cache / "config.json").write_text(json.dumps(config))
    assert hf_config.read(cache).name == "1a2b"


def test_a_run_that_moved_finds_its_tokenizer(run, lost, tmp_path):
    export_hf(run, tmp_path / "out")
    again = (tmp_path / "out/tiktoken.model").read_bytes()
    assert again == (run / "tokenizer/tiktoken.model").read_bytes()

    config = run / "tokenizer/tokenizer_config.json"
    config.write_text(config.read_text().replace("[EOS]", "[END]"))
    with pytest.raises(CheckpointError, match="another tokenizer than tiktoken:.*/run/tokenizer"):
        export_hf(run, tmp_path / "out2")
    shutil.rmtree(run / "tokenizer")
    with pytest.raises(DataError, match="tiktoken"):
        export_hf(run, tmp_path / "out2")
    checkpoint = find(str(run), "run")
    assert hf_tokenizer.located("hf:/no/such", checkpoint) == "hf:/no/such"
    (run / "tokenizer").mkdir()
    assert hf_tokenizer.located("hf:/no/such", checkpoint) == f"hf:{run}/tokenizer"
    assert hf_tokenizer.located(f"hf:{tmp_path}", checkpoint) == f"hf:{tmp_path}"
    assert hf_tokenizer.located("byte", checkpoint) == "byte"


def test_a_conversion_takes_the_runs_files_along(run, lost, tmp_path, monkeypatch):
    checkpoint = find(str(run), "run")
    monkeypatch.chdir(checkpoint.parent)
    first = convert.strip(checkpoint.name, tmp_path / "first")
    monkeypatch.chdir(checkpoint)
    second = convert.strip(".", tmp_path / "second")
    for done in (first, second):
        facts = json.loads((done.path / "manifest.json").read_text())
        assert facts["converted"]["sources"] == [str(checkpoint)]
    shutil.rmtree(run)
    for name in ("first", "second"):
        assert (tmp_path / name / "config.yaml").is_file()
        assert export_hf(tmp_path / name, tmp_path / f"{name}_out").tensors


def test_other_tokenizers_beside_a_rank_file_are_not_copied(folder):
    for name in ("sentencepiece.model", "other.tiktoken", "merges.txt"):
        (folder / name).touch()
    tokenizer = load_tokenizer(f"tiktoken:{folder}/tiktoken.model")
    names = {path.name for path in hf_tokenizer.files_of(tokenizer)}
    assert names == {"tiktoken.model", "tokenizer_config.json", "merges.txt"}


# --- Two writers ---

HOLDER = """
import sys
from pathlib import Path
from megakda.checkpoint.folders import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("command", ["export", "import"])
def test_two_processes_do_not_write_one_folder(folder, run, tmp_path, command):
    """Nobody is kept out by one that was killed."""
    out = tmp_path / "out"
    target = out if command == "export" else out / "checkpoints/step_00000000"
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True)
    (partial / "mine").touch()

    def attempt():
        return export_hf(run, out) if command == "export" else import_hf(folder, out)

    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(partial)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(CheckpointError, match="another process is writing there"):
            attempt()
        assert (partial / "mine").is_file() and not target.exists()
    finally:
        holder.kill()
        holder.communicate()
    assert partial.with_name(f"{partial.name}.lock").is_file()
    attempt()
    assert not list(target.parent.glob(".*"))
    assert not [name for name in os.listdir(target) if "lock" in name or name == "mine"]


# --- Settings ---


@pytest.mark.parametrize("context", [None, 0, "long"])
def test_a_context_is_needed_before_anything_is_written(folder, tmp_path, context):
    edit(folder, model_max_length=context)
    for attempt in (lambda: dry_run(folder), lambda: import_hf(folder, tmp_path / "new")):
        with pytest.raises(CheckpointError, match="model_max_length=.* must be"):
            attempt()
    assert not (tmp_path / "new").exists()


def test_a_damaged_generation_config_is_found_before_anything_is_written(folder, tmp_path):
    (folder / "generation_config.json").write_text("{")
    for attempt in (lambda: dry_run(folder), lambda: import_hf(folder, tmp_path / "new")):
        with pytest.raises(CheckpointError, match="generation_config.json .*not JSON"):
            attempt()
    assert not (tmp_path / "new").exists()


def test_a_context_below_one(run, tmp_path):
    with pytest.raises(ConfigError, match="--context=0 must be at least 1"):
        export_hf(run, tmp_path / "out", context=0)


DAMAGED = {
    "no YAML": b"train: [1",
    "a list": b"[1, 2]",
    "unknown": b"nonsense: 1",
    "another type": b"train: {context: many}",
    "no text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_run_whose_settings_cannot_be_read(run, tmp_path, case):
    (run / "config.yaml").write_bytes(DAMAGED[case])
    with pytest.raises(CheckpointError, match="config.yaml cannot be read: .*give --context"):
        export_hf(run, tmp_path / "out")
    done = export_hf(run, tmp_path / "out", context=64)
    (warning,) = done.warnings
    assert "config.yaml cannot be read" in warning and "model card" in warning
    assert hf_config.context(tmp_path / "out") == 64


def test_end_tokens_that_a_folder_left_out_are_the_tokenizers(run, tmp_path):
    manifest = manifest_of(run)
    manifest["huggingface"]["special_ids"]["eos"] = None
    (find(str(run), "run") / "manifest.json").write_text(json.dumps(manifest))
    export_hf(run, tmp_path / "out")
    config = hf_config.load(tmp_path / "out")
    assert (config["bos_token_id"], config["eos_token_id"]) == (7, 257)


def test_the_card_says_what_bf16_costs(run, tmp_path):
    for dtype, said in (("keep", False), ("bf16", True)):
        export_hf(run, tmp_path / dtype, dtype)
        card = (tmp_path / dtype / "README.md").read_text()
        assert ("logits are those of the run to bf16 precision" in card) == said
