"""Checkpoints from checkpoints: resharded, cast, averaged, stripped of the optimizer.

Everything streams: a block of rows is read, changed and written, so that memory is bounded by a few
times `chunk_bytes`, whatever the size of the model. The output is a run folder,
`OUT/checkpoints/step_*` with a copy of the run's config.yaml and tokenizer where there are any,
which `train.weights` and the tools take. An interrupted conversion goes on where it was when it is
started again in the same way.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from megakda import __version__
from megakda.checkpoint.folders import (
    architecture_differences,
    check_space,
    find,
    lock_of,
    write_text,
)
from megakda.checkpoint.stored import (
    OPTIMIZER,
    CheckpointWriter,
    StoredCheckpoint,
    StoredTensor,
    is_finite,
)
from megakda.errors import CheckpointError, ConfigError

CHUNK_BYTES = 256 * 10**6
"""A file of the output has at most so many bytes of numbers, and so have the chunks in it."""

_PIECE_BYTES = 8 * 10**6  # cast or added up at a time

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

_ALWAYS_FP32 = re.compile(r"\.(A_log|dt_bias|router\.weight|router\.expert_bias)$")
"""What a bf16 model holds in fp32 (`layers/kda.py`, `models/kimi_linear.py`)."""


@dataclass
class Conversion:
    """What a conversion wrote.

    Attributes:
        path: the checkpoint folder.
        tensors: how many it holds.
        nbytes: of their numbers.
        seconds: that it took.
        kept: files that an interrupted conversion had completed.
        not_finite: weights that hold NaN or infinite numbers.
    """

    path: Path
    tensors: int
    nbytes: int
    seconds: float = 0.0
    kept: int = 0
    not_finite: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.tensors:,} tensors, {self.nbytes:,} bytes"]
        lines[0] += f" in {self.seconds:.1f} s"
        if self.kept:
            lines.append(f"{self.kept} files of an interrupted conversion were kept")
        for name in self.not_finite:
            lines.append(f"warning: {name} holds numbers that are not finite")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Rows:
    """Rows of a tensor that are one chunk of the output."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]  # of the whole tensor
    nbytes: int


def reshard(checkpoint: str, out: Path, chunk_bytes: int = CHUNK_BYTES) -> Conversion:
    """Rewrites a checkpoint, optimizer state and all, in files of bounded size; a run goes on from
    it bit for bit.

    Args:
        checkpoint: a checkpoint or run folder; of a run the newest.
        out: the run folder to write.
        chunk_bytes: limit of a file, but for a single row that is larger.

    Raises:
        CheckpointError: `checkpoint` cannot be read, or `out` exists or cannot be written.
    """
    source = _open(checkpoint)
    unknown = [name for name in source.objects if "._extra_state/" not in name]
    if unknown:
        raise CheckpointError(
            f"{source.path} holds {unknown[0]}, which is no tensor of a model or an optimizer: "
            "another program wrote it; its weights alone can be had with strip"
        )
    job = _Job("reshard", [source], out, chunk_bytes)
    dtypes = {name: tensor.dtype for name, tensor in source.tensors.items()}
    optimizer = source.common.get("optimizer")
    return job.run(dtypes, source.read, {}, source.trainer, optimizer)


def strip(checkpoint: str, out: Path, chunk_bytes: int = CHUNK_BYTES) -> Conversion:
    """Copies the weights and leaves the optimizer out. Arguments and errors are `reshard`'s."""
    source = _open(checkpoint)
    job = _Job("strip", [source], out, chunk_bytes)
    dtypes = {name: source.tensors[name].dtype for name in source.model_names()}
    return job.run(dtypes, source.read, {"weights_only": True})


def cast(checkpoint: str, out: Path, dtype: str, chunk_bytes: int = CHUNK_BYTES) -> Conversion:
    """Copies the weights in another precision.

    What a bf16 model holds in fp32 stays fp32. To fp32 the numbers stay as they are: the
    optimizer's own fp32 weights are not looked at.

    Args:
        dtype: ``fp32`` or ``bf16``.

    Raises:
        ConfigError: another `dtype`.
        CheckpointError: as `reshard`.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype={dtype} must be one of {', '.join(DTYPES)}")
    source = _open(checkpoint)
    job = _Job("cast", [source], out, chunk_bytes, {"dtype": dtype})
    dtypes = {
        name: torch.float32 if _ALWAYS_FP32.search(name) else DTYPES[dtype]
        for name in source.model_names()
    }

    def block(name: str, start: int, stop: int) -> torch.Tensor:
        return _by_pieces(
            source.tensors[name], dtypes[name], start, stop, lambda a, b: source.read(name, a, b)
        )

    return job.run(dtypes, block, {"weights_only": True, "precision": dtype})


def average(
    checkpoints: Sequence[str],
    out: Path,
    weights: Sequence[float] | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> Conversion:
    """The weighted mean of several checkpoints of one model, expert biases included.

    Sums are in float64 and rounded once, to the dtypes of the checkpoint with the most steps, whose
    other facts the result takes too.

    Args:
        checkpoints: two or more checkpoint or run folders.
        weights: one per checkpoint, not negative; they are divided by their sum. None: equal ones.

    Raises:
        ConfigError: fewer than two checkpoints, or weights that do not fit.
        CheckpointError: another architecture, tokenizer or tensor among them; else as `reshard`.
    """
    if len(checkpoints) < 2:
        raise ConfigError(f"{len(checkpoints)} checkpoint to average: name at least two")
    shares = _shares(len(checkpoints), weights)
    sources = [_open(checkpoint) for checkpoint in checkpoints]
    newest = max(sources, key=lambda source: source.manifest.get("step", 0))
    for source in sources:
        _check_same_model(newest, source)
    job = _Job("average", sources, out, chunk_bytes, {"weights": shares}, like=newest)
    dtypes = {name: newest.tensors[name].dtype for name in newest.model_names()}

    def block(name: str, start: int, stop: int) -> torch.Tensor:
        def mean(first: int, last: int) -> torch.Tensor:
            pairs = zip(sources, shares, strict=True)
            return reduce(
                torch.add, (one.read(name, first, last).double() * share for one, share in pairs)
            )

        return _by_pieces(newest.tensors[name], dtypes[name], start, stop, mean)

    return job.run(dtypes, block, {"weights_only": True})


class _Job:
    """One conversion into a folder."""

    def __init__(
        self,
        command: str,
        sources: list[StoredCheckpoint],
        out: Path,
        chunk_bytes: int,
        options: dict[str, Any] | None = None,
        like: StoredCheckpoint | None = None,
    ):
        self.like = sources[0] if like is None else like
        self.out, self.chunk_bytes = out, chunk_bytes
        self.target = out / "checkpoints" / f"step_{self.like.manifest.get('step', 0):08d}"
        self.facts = {
            "command": command,
            "sources": [str(source.path) for source in sources],
            **(options or {}),
        }
        self.identity = {
            **self.facts,
            "chunk_bytes": chunk_bytes,
            "fingerprints": [_fingerprint(source.path) for source in sources],
        }

    def run(
        self,
        dtypes: dict[str, torch.dtype],
        block: Callable[[str, int, int], torch.Tensor],
        manifest: dict[str, Any],
        trainer: dict[str, Any] | None = None,
        optimizer: dict[str, Any] | None = None,
    ) -> Conversion:
        """Writes the checkpoint.

        Args:
            dtypes: of every tensor to write.
            block: (name, start, stop) to those rows of it.
            manifest: what differs from the source's.
        """
        started = time.monotonic()
        _refuse_existing(self.out, self.target)
        parts = {
            f"part_{number:05d}": rows
            for number, rows in enumerate(_plan(self.like, dtypes, self.chunk_bytes))
        }
        nbytes = sum(piece.nbytes for rows in parts.values() for piece in rows)
        result = Conversion(self.target, len(dtypes), nbytes)
        with CheckpointWriter(self.target, self.identity) as writer:
            todo = {name: rows for name, rows in parts.items() if not writer.has_part(name)}
            result.kept = len(parts) - len(todo)
            remaining = sum(piece.nbytes for rows in todo.values() for piece in rows)
            check_space(writer.partial, remaining)
            _copy_run(self.like.path.parent.parent, self.out, manifest.get("precision"))
            notes = writer.partial / "not_finite.json"  # removed by `finish`
            if notes.is_file():
                result.not_finite = json.loads(notes.read_text())
            with progress_bar(nbytes, str(self.facts["command"])) as bar:
                bar.update(nbytes - remaining)
                for name, rows in todo.items():
                    writer.write_part(name, _blocks(rows, block, result, bar))
                    if result.not_finite:
                        _write(notes, json.dumps(result.not_finite))
            facts = {"megakda": __version__, **manifest, "converted": self.facts}
            writer.finish({**self.like.manifest, **facts}, trainer or {}, optimizer)
        _write(self.target.parent / "latest", f"{self.target.name}\n")
        result.seconds = time.monotonic() - started
        return result


def progress_bar(nbytes: int, label: str) -> Any:
    """A bar that counts bytes on a terminal, and nothing elsewhere."""
    from tqdm import tqdm

    return tqdm(total=nbytes, unit="B", unit_scale=True, desc=label, disable=None, leave=False)


def row_blocks(rows: int, nbytes: int, limit: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of blocks of whole rows with at most `limit` bytes, but at least one row."""
    step = max(1, limit * rows // max(1, nbytes))
    for start in range(0, max(1, rows), step):  # a tensor without rows has a block, too
        yield start, min(rows, start + step)


def _plan(
    source: StoredCheckpoint, dtypes: dict[str, torch.dtype], limit: int
) -> Iterator[list[_Rows]]:
    """The files of the output, each at most `limit` bytes where rows allow."""
    file: list[_Rows] = []
    filled = 0
    for name, dtype in dtypes.items():
        tensor = source.tensors[name]
        row_bytes = math.prod(tensor.shape[1:]) * dtype.itemsize
        for start, stop in row_blocks(tensor.rows, tensor.rows * row_bytes, limit):
            nbytes = (stop - start) * row_bytes
            if file and filled + nbytes > limit:
                yield file
                file, filled = [], 0
            file.append(_Rows(name, start, stop, tensor.shape, nbytes))
            filled += nbytes
    yield file


def _blocks(
    rows: list[_Rows],
    block: Callable[[str, int, int], torch.Tensor],
    result: Conversion,
    bar: Any,
) -> Iterator[tuple[str, torch.Tensor, tuple[int, ...], tuple[int, ...]]]:
    for piece in rows:
        tensor = block(piece.name, piece.start, piece.stop)
        is_weight = not piece.name.startswith(OPTIMIZER)
        if is_weight and piece.name not in result.not_finite and not is_finite(tensor):
            result.not_finite.append(piece.name)
        offset = (piece.start, *[0] * (len(piece.shape) - 1)) if piece.shape else ()
        yield piece.name, tensor, piece.shape, offset
        del tensor  # or it would be held while the next one is read
        bar.update(piece.nbytes)


def _by_pieces(
    tensor: StoredTensor,
    dtype: torch.dtype,
    start: int,
    stop: int,
    make: Callable[[int, int], torch.Tensor],
) -> torch.Tensor:
    """Rows of a tensor from `make`, a few at a time: what it needs on the way stays small."""
    rows = torch.empty((stop - start, *tensor.shape[1:]) if tensor.shape else (1,), dtype=dtype)
    nbytes = tensor.nbytes // max(1, tensor.rows) * (stop - start)
    for first, last in row_blocks(stop - start, nbytes, _PIECE_BYTES):
        rows[first:last] = make(start + first, start + last)
    return rows if tensor.shape else rows.reshape(())


def _open(checkpoint: str) -> StoredCheckpoint:
    # Resolved, so that its run is found from it, and so that a job is the same from everywhere.
    return StoredCheckpoint(find(checkpoint, "CHECKPOINT").resolve())


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        return [1 / count] * count
    total = math.fsum(weights)
    if len(weights) != count or not (math.isfinite(total) and total > 0) or min(weights) < 0:
        given = " ".join(str(weight) for weight in weights)
        raise ConfigError(
            f"--weights {given} of {count} checkpoints: give one to each, none negative, with a "
            "finite sum above 0"
        )
    return [weight / total for weight in weights]


def _check_same_model(one: StoredCheckpoint, other: StoredCheckpoint) -> None:
    differences = architecture_differences(
        other.manifest.get("model", {}), one.manifest.get("model", {})
    )
    if differences:
        raise CheckpointError(
            f"{other.path} and {one.path} are different models, which have no average: "
            f"{'; '.join(differences[:6])}"
        )
    theirs, ours = ((source.manifest.get("tokenizer") or {}) for source in (other, one))
    if theirs.get("fingerprint") != ours.get("fingerprint"):
        raise CheckpointError(
            f"{other.path} was trained with the tokenizer {theirs.get('spec')} and {one.path} with "
            f"{ours.get('spec')}, which gives other ids: average checkpoints of one tokenizer"
        )
    shapes, expected = (
        {name: source.tensors[name].shape for name in source.model_names()}
        for source in (other, one)
    )
    if shapes != expected:
        name = sorted(dict(shapes.items() ^ expected.items()))[0]
        raise CheckpointError(
            f"{name} has the shape {shapes.get(name)} in {other.path} and {expected.get(name)} in "
            f"{one.path}: one of them is damaged"
        )


def _fingerprint(path: Path) -> str:
    """Tells a save from any other: `.metadata` holds an id that is drawn for each."""
    return hashlib.sha256((path / ".metadata").read_bytes()).hexdigest()


def _refuse_existing(out: Path, target: Path) -> None:
    """`out` may hold what an interrupted conversion has left, and nothing else."""
    partial = target.parent / f".{target.name}.partial"
    found = {*out.iterdir(), *target.parent.glob("*")} if out.is_dir() else set()
    ours = {out / "config.yaml", out / "tokenizer", target.parent, partial, lock_of(partial)}
    interrupted = partial in found and found <= ours
    if out.is_file() or (found and not interrupted):
        raise CheckpointError(f"{out} exists: choose another --out, or delete it")


def _write(path: Path, text: str) -> None:
    try:
        write_text(path, text)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _copy_run(run: Path, out: Path, precision: str | None) -> None:
    """Copies what a run's folder has beside its checkpoints: config.yaml and the tokenizer.

    Args:
        precision: to write into config.yaml; None for the one that is there.
    """
    file, tokenizer = run / "config.yaml", run / "tokenizer"
    try:
        if file.is_file():
            text = file.read_text()
            if precision is not None:
                text = re.sub(r"(?m)^precision: .*$", f"precision: {precision}", text)
            _write(out / file.name, text)
        if tokenizer.is_dir():
            shutil.copytree(tokenizer, out / tokenizer.name, dirs_exist_ok=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run} cannot be copied to {out}: {error}") from error
