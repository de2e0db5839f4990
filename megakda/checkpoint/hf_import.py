"""A Hugging Face folder -> a run-like folder with a megakda checkpoint that loads at any layout."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megakda import __version__
from megakda.checkpoint import hf_config, hf_tokenizer
from megakda.checkpoint.folders import check_space, write_json, write_text
from megakda.checkpoint.hf_map import Tensor
from megakda.checkpoint.hf_source import HFSource
from megakda.checkpoint.stored import CheckpointWriter, is_finite
from megakda.config import compose, to_yaml
from megakda.config.schema import ModelConfig, ParallelConfig
from megakda.data.tokenizer import Tokenizer, load_tokenizer
from megakda.errors import CheckpointError

DTYPES = {"keep": None, "bf16": torch.bfloat16, "fp32": torch.float32}
SPAN_BYTES = 256 << 20
"""Of one tensor at a time; one block of the checkpoint."""
_NAME = "step_00000000"
_NONFINITE = ".nonfinite.json"  # names found in parts that are complete, until the import is


@dataclass
class Imported:
    """What an import has written, or with `--dry-run` would write."""

    model: ModelConfig
    precision: str
    tensors: int
    published: int  # tensors of the Hugging Face folder
    parts: int
    bytes: int  # of the checkpoint's tensors
    memory: int  # bytes of tensors held at a time, at most
    seconds: float = 0.0
    nonfinite: list[str] = field(default_factory=list)  # megakda's names with NaN or infinity

    def __str__(self) -> str:
        return (
            f"{self.published:,} published tensors are {self.tensors:,} of megakda's in "
            f"{self.parts} parts, {self.bytes / 2**20:,.1f} MiB in {self.precision}; at most "
            f"{self.memory / 2**20:,.1f} MiB of them in memory at a time"
        )


def import_hf(
    folder: Path,
    out: Path,
    dtype: str = "keep",
    tokenizer: str | None = None,
    progress: bool = False,
) -> Imported:
    """Converts a Hugging Face folder, tensor by tensor.

    `out` becomes like a run's folder: a checkpoint of step 0 with weights alone, `config.yaml`, and
    the tokenizer. The checkpoint gets its name after everything else is on disk. An interrupted
    import goes on where it was, with the same arguments.

    Args:
        folder: with `config.json`, safetensors and, if `tokenizer` is not given, a tokenizer.
        out: does not exist, or was left by an interrupted import of the same folder.
        dtype: "keep" for the folder's, "bf16" or "fp32"; what is fp32 in megakda is so in any case.
        tokenizer: as `data.tokenizer`, instead of the one in the folder.
        progress: a bar on stderr.

    Raises:
        CheckpointError: a folder of another architecture, with tensors that are missing, unknown or
            of another shape, or truncated files; an output that exists or cannot be written; a
            tokenizer with more ids than the model.
        DataError: the tokenizer cannot be loaded.
    """
    started = time.monotonic()
    target = out / "checkpoints" / _NAME
    _refuse_existing(out, target)
    with _Plan(folder, dtype) as plan:
        loaded, own = _tokenizer(folder, tokenizer, plan.model)
        result = plan.result()
        with _named(out), CheckpointWriter(target, job=plan.job()) as writer:
            check_space(out, plan.left(writer))
            notes = out / _NONFINITE
            if notes.is_file():
                result.nonfinite = json.loads(notes.read_text())
            with tqdm(
                total=result.bytes, unit="B", unit_scale=True, disable=not progress, desc="import"
            ) as bar:
                for part, members in plan.parts.items():
                    if not writer.has_part(part):
                        writer.write_part(part, plan.blocks(members, result.nonfinite))
                        if result.nonfinite:
                            write_json(notes, result.nonfinite)
                    bar.update(sum(plan.bytes(tensor) for tensor in members))
            spec = _copy_tokenizer(loaded, out) if own else hf_tokenizer.absolute(loaded.spec)
            write_text(out / "config.yaml", _config_yaml(plan, spec, out))
            writer.finish(plan.manifest(spec, loaded), trainer={})
            notes.unlink(missing_ok=True)
    result.seconds = time.monotonic() - started
    return result


def dry_run(folder: Path, dtype: str = "keep") -> Imported:
    """Everything that an import checks before it writes, and what it would write.

    Reads headers only.

    Raises:
        CheckpointError: as `import_hf`, but for the tokenizer and the output.
    """
    with _Plan(folder, dtype) as plan:
        return plan.result()


class _Plan:
    """A folder, checked, and the parts of the checkpoint to make of it. A context manager.

    Attributes:
        model: architecture.
        parts: by name, the tensors of each file of the checkpoint.
        context: tokens that the model is meant for.
    """

    def __init__(self, folder: Path, dtype: str):
        self.folder, self.dtype = folder, dtype
        self.model = hf_config.read(folder)
        self.context = hf_config.context(folder)
        self._config = hf_config.load(folder)
        self._generation = hf_config.generation_config(folder)
        self.source = HFSource(folder, self.model)
        self.parts: dict[str, list[Tensor]] = {}
        for tensor in self.source.tensors.values():
            words = tensor.name.split(".")
            part = f"layer_{int(words[2]):05d}" if words[1] == "layers" else words[0]
            self.parts.setdefault(part, []).append(tensor)
        self._kinds = {name: self._kind(tensor) for name, tensor in self.source.tensors.items()}

    def __enter__(self) -> _Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()

    @property
    def precision(self) -> str:
        bulk = self._kinds["output_layer.weight"]
        return "bf16" if bulk == torch.bfloat16 else "fp32"

    def bytes(self, tensor: Tensor) -> int:
        return math.prod(tensor.shape) * self._kinds[tensor.name].itemsize

    def left(self, writer: CheckpointWriter) -> int:
        """Bytes of the parts that a writer has not yet."""
        parts = [members for part, members in self.parts.items() if not writer.has_part(part)]
        return sum(self.bytes(tensor) for members in parts for tensor in members)

    def result(self) -> Imported:
        all_tensors = self.source.tensors.values()
        return Imported(
            model=self.model,
            precision=self.precision,
            tensors=len(all_tensors),
            published=sum(len(tensor.blocks) for tensor in all_tensors),
            parts=len(self.parts),
            bytes=sum(map(self.bytes, all_tensors)),
            memory=max(map(self._held, all_tensors)),
        )

    def blocks(
        self, members: list[Tensor], nonfinite: list[str]
    ) -> Iterator[tuple[str, torch.Tensor, tuple[int, ...], tuple[int, ...]]]:
        """The blocks of a part, one after the other, as `CheckpointWriter.write_part` takes them.

        Appends to `nonfinite` the names of tensors with NaN or infinity.
        """
        for tensor in members:
            kind, inner = self._kinds[tensor.name], tensor.shape[1:]
            for first, last in tensor.spans(SPAN_BYTES, kind.itemsize):
                block = torch.empty((last - first, *inner), dtype=kind)
                offset = (first, *(0 for _ in inner))
                self.source.fill(tensor.name, block, offset)
                if not is_finite(block) and tensor.name not in nonfinite:
                    nonfinite.append(tensor.name)
                yield tensor.name, block, tensor.shape, offset

    def job(self) -> dict[str, Any]:
        """What tells this import from another one."""
        files = sorted([self.folder / hf_config.CONFIG, *self.source.files])
        state = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        return {"import": str(self.folder.resolve()), "dtype": self.dtype, "files": state}

    def manifest(self, spec: str, tokenizer: Tokenizer) -> dict[str, Any]:
        return {
            "step": 0,
            "megakda": __version__,
            "model": dataclasses.asdict(self.model),
            "parallel": dataclasses.asdict(ParallelConfig()),
            "precision": self.precision,
            "tokenizer": {"spec": spec, "fingerprint": tokenizer.fingerprint},
            "sequences_consumed": 0,
            "tokens_seen": 0,
            "weights_only": True,
            # What an export of these weights hands on
            "huggingface": {
                "name": self.folder.resolve().name,
                "context": self.context,
                "special_ids": {
                    key: self._config.get(f"{key}_token_id") for key in ("bos", "eos", "pad")
                },
                "generation_config": self._generation,
            },
        }

    def _kind(self, tensor: Tensor) -> torch.dtype:
        wanted = torch.float32 if tensor.fp32 else DTYPES[self.dtype]
        found = self.source.dtype(tensor.name)
        if wanted is None and found == torch.float16:
            raise CheckpointError(
                f"{self.folder}: {tensor.name} is F16, and megakda trains in fp32 or bf16: give "
                "--dtype fp32, which keeps every bit, or --dtype bf16"
            )
        return wanted or found

    def _held(self, tensor: Tensor) -> int:
        """Bytes in memory at a time: a block, and what it is filled from."""
        kind, row = self._kinds[tensor.name], math.prod(tensor.shape[1:])
        rows = max(last - first for first, last in tensor.spans(SPAN_BYTES, kind.itemsize))
        return self.source.held(tensor.name, rows * row, kind)


def _refuse_existing(out: Path, target: Path) -> None:
    ours = {"checkpoints", "tokenizer", "config.yaml", _NONFINITE}
    there = {path.name for path in out.iterdir()} if out.is_dir() else set()
    partial = target.parent / f".{target.name}.partial"
    if out.is_file() or target.exists() or (there and not (partial.is_dir() and there <= ours)):
        raise CheckpointError(f"--out={out} exists already: choose another folder, or remove it")


def _tokenizer(folder: Path, spec: str | None, model: ModelConfig) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether it is one of the folder's files.

    Raises:
        CheckpointError: there is none, or it has more ids than the model.
    """
    found = spec or hf_tokenizer.find_spec(folder)
    if found is None:
        raise CheckpointError(
            f"{folder} has no tokenizer (tokenizer.json, tiktoken.model, ...): name one with "
            "--tokenizer, byte, hf:DIR or tiktoken:FILE"
        )
    tokenizer = load_tokenizer(found)
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"the tokenizer {found} has {tokenizer.vocab_size:,} ids, and the model in {folder} "
            f"was made for {model.vocab_size:,}: name the right one with --tokenizer"
        )
    return tokenizer, spec is None and found != "byte"


def _copy_tokenizer(tokenizer: Tokenizer, out: Path) -> str:
    """Copies its files into `out`; what `data.tokenizer` says then."""
    folder = out.resolve() / "tokenizer"
    folder.mkdir(exist_ok=True)
    hf_tokenizer.copy(hf_tokenizer.files_of(tokenizer), folder)
    kind, _, rest = tokenizer.spec.partition(":")
    return f"{kind}:{folder / Path(rest).name if kind == 'tiktoken' else folder}"


def _config_yaml(plan: _Plan, spec: str, out: Path) -> str:
    config = compose(["data=indexed"])
    config.model = plan.model
    config.precision = plan.precision
    config.data.tokenizer = spec
    config.train.out = str(out.resolve())
    config.train.context = plan.context
    return to_yaml(config)


@contextmanager
def _named(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"--out={out} cannot be written: {error.strerror or error}; what is complete stays, "
            "and the same command goes on from there"
        ) from error
