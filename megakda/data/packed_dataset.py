"""Rows of packed documents as a dataset that megatron-core's builder splits, blends and caches."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset

from megakda.data.indexed import answers_prefix
from megakda.data.packing import (
    INDEX_FORMAT,
    PackedRows,
    load_rows,
    pack_epochs,
    rows_are_saved,
    save_rows,
)
from megakda.errors import DataError

Batch = dict[str, torch.Tensor]


@dataclass
class PackedDatasetConfig(GPTDatasetConfig):
    """GPTDataset's settings and data.packing, data.overlong, data.loss."""

    packing: str = "documents"
    overlong: str = "split"
    loss: str = "all"


class PackedDataset(MegatronDataset):
    """One split of one corpus in rows of `config.sequence_length` positions.

    Built by `BlendedMegatronDatasetBuilder`, on rank 0 first: it packs, writes the index under
    `config.path_to_cache`, and the other ranks map it. The file names hold a hash of everything
    that the rows depend on, among it the length of every document. A document is what the .idx
    calls a sequence, as for GPTDataset.

    Raises:
        DataError: no document has two tokens; the index is damaged, cannot be written, or is not
            to be seen by this rank.
    """

    numel_low_level_dataset = staticmethod(GPTDataset.numel_low_level_dataset)
    build_low_level_dataset = staticmethod(GPTDataset.build_low_level_dataset)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        tokens = self.dataset.sequence_lengths[self.indices]
        # The base class knows the path alone, and there may be other documents by now.
        self.unique_identifiers["index_format"] = INDEX_FORMAT
        self.unique_identifiers["documents"] = hashlib.blake2b(
            self.indices.tobytes() + tokens.tobytes(), digest_size=16
        ).hexdigest()
        self.unique_description = json.dumps(
            self.unique_identifiers, indent=4, default=lambda x: x.unique_identifiers
        )
        self.unique_description_hash = hashlib.blake2b(
            self.unique_description.encode(), digest_size=16
        ).hexdigest()
        self.rows = self._rows(tokens)
        # Rows are the same whatever is trained on, and so are their files.
        self.answers = None
        if self.config.loss == "answers":
            marks = answers_prefix(self.dataset_path)
            self.answers = self.build_low_level_dataset(marks, self.config)

    @staticmethod
    def _key_config_attributes() -> list[str]:
        return [*MegatronDataset._key_config_attributes(), "packing", "overlong"]

    def _rows(self, tokens: numpy.ndarray) -> PackedRows:
        config = self.config
        name = f"{self.unique_description_hash}-{type(self).__name__}-{self.index_split.name}"
        base = Path(config.path_to_cache) / name
        first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
        # A split that nobody draws from may have no usable document, and needs no files.
        if self.num_samples == 0 or (first and not rows_are_saved(base)):
            try:
                rows = pack_epochs(
                    tokens,
                    self.indices,
                    config.sequence_length,
                    config.packing,
                    config.overlong,
                    config.random_seed,
                    self.num_samples,
                )
            except DataError as error:
                raise DataError(
                    f"the {self.index_split.name} split of {self.dataset_path}: {error}; change "
                    "data.split, or make longer documents with tools/preprocess_data.py"
                ) from error
            if self.num_samples == 0:
                return rows
            save_rows(base, rows, self.unique_description)
        return load_rows(base)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """Row `index`.

        Returns:
            tokens, labels, position_ids [context] int64 (positions count from 0 in every piece);
            loss_mask [context] float, 0 where there is nothing to predict and, with data.loss=
            answers, where the label is no token of an answer; padding_mask [context] bool, True at
            padding, whose tokens and labels are the end mark; cu_seqlens [pieces + 1] int32, the
            bounds of the pieces from 0 to context. Padding, if any, is the last piece.

        Raises:
            IndexError: there is no such row.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        context = self.config.sequence_length
        tokens = numpy.full(context, self.config.tokenizer.eod, numpy.int64)
        labels = tokens.copy()
        learned = numpy.zeros(context, bool)
        bounds = [0]
        first, last = self.rows.starts[index : index + 2]
        for document, start, length in self.rows.pieces[first:last].tolist():
            text = self.dataset.get(document, offset=start, length=length + 1)
            here = slice(bounds[-1], bounds[-1] + length)
            tokens[here], labels[here] = text[:-1], text[1:]
            learned[here] = True
            if self.answers is not None:
                marks = self.answers.get(document, offset=start, length=length + 1)
                learned[here] = marks[1:]  # a position's label is the next token
            bounds.append(here.stop)
        padding = numpy.arange(context) >= bounds[-1]
        if bounds[-1] < context:
            bounds.append(context)
        cu_seqlens = numpy.array(bounds, numpy.int32)
        starts = numpy.repeat(cu_seqlens[:-1], numpy.diff(cu_seqlens))
        # As GPTDataset does: a padding id among the tokens is nothing to learn.
        learned &= labels != self._pad_token_id
        return {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(labels),
            "position_ids": torch.from_numpy(numpy.arange(context) - starts),
            "loss_mask": torch.from_numpy(learned.astype(numpy.float32)),
            "padding_mask": torch.from_numpy(padding),
            "cu_seqlens": torch.from_numpy(cu_seqlens),
        }


def collate(rows: list[Batch]) -> Batch:
    """A micro-batch of `PackedDataset` rows, or of rows without cu_seqlens, which are stacked.

    Returns:
        The rows' tensors stacked, [rows, context], and cu_seqlens [pieces + 1] int32 over the
        flattened stream of rows * context positions: a piece ends where its row ends.
    """
    if "cu_seqlens" not in rows[0]:
        return torch.utils.data.default_collate(rows)
    batch = torch.utils.data.default_collate(
        [{name: row[name] for name in row if name != "cu_seqlens"} for row in rows]
    )
    context = batch["tokens"].shape[1]
    bounds = [row["cu_seqlens"][1:] + n * context for n, row in enumerate(rows)]
    batch["cu_seqlens"] = torch.cat([rows[0]["cu_seqlens"][:1], *bounds])
    return batch


@dataclass(frozen=True)
class PackingEfficiency:
    """How well rows are filled."""

    real: float  # share of positions that are no padding
    documents_per_row: float  # pieces: a part of a longer document counts as one
    document_tokens: int  # length of a piece, in the mean over real positions

    def __str__(self) -> str:
        return (
            f"{self.real:.2%} of positions are real, {self.documents_per_row:.2f} documents per "
            f"row, a token's document has {self.document_tokens:,} in the mean"
        )


def packing_efficiency(dataset: PackedDataset | BlendedDataset) -> PackingEfficiency:
    """The mean over the rows of a packed dataset; of a blend, weighted by the rows drawn from each.

    Reads the index, no tokens.
    """
    if isinstance(dataset, PackedDataset):
        rows = dataset.rows
        positions = len(rows) * dataset.config.sequence_length
        lengths = numpy.asarray(rows.pieces[:, 2], dtype=numpy.float64)
        return PackingEfficiency(
            rows.positions / positions,
            len(rows.pieces) / len(rows),
            max(1, round(float(lengths @ lengths) / rows.positions)),
        )
    drawn = numpy.bincount(dataset.dataset_index, minlength=len(dataset.datasets))
    parts = [packing_efficiency(part) for part in dataset.datasets]
    return PackingEfficiency(
        float(numpy.average([part.real for part in parts], weights=drawn)),
        float(numpy.average([part.documents_per_row for part in parts], weights=drawn)),
        round(float(numpy.average([part.document_tokens for part in parts], weights=drawn))),
    )
