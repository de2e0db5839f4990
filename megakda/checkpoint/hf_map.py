"""The one table between megakda's tensors and those of published Hugging Face folders.

Import, export, loading without conversion, all checks of names and shapes, and
docs/checkpoints-hf-names.md follow from `TABLE`:

    python -m megakda.checkpoint.hf_map > docs/checkpoints-hf-names.md

Kimi Linear's names are those of its published checkpoint (arXiv 2510.26692), which `transformers`
loads as `kimi_linear`. A model of MLA with rotary positions in every layer is DeepSeek-V3's (arXiv
2412.19437) and has the names of `deepseek_v3`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from megakda.config.pattern import FULL, layer_kinds
from megakda.config.schema import ModelConfig

KIMI_LINEAR, DEEPSEEK_V3 = "kimi_linear", "deepseek_v3"

SPELLINGS = {
    KIMI_LINEAR: {"moe": "block_sparse_moe", "gate": "w1", "up": "w3", "down": "w2"},
    DEEPSEEK_V3: {"moe": "mlp", "gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}
"""The words of published names in which the two architectures differ, by `model_type`."""


@dataclass(frozen=True)
class Row:
    """How one of megakda's tensors lies in published ones.

    Attributes:
        part: the layers that have it: every, kda, mla, dense or moe, "direct" or "latent" for MLA
            without and with a latent for queries; before or after all layers.
        ours: megakda's name; in layers, below ``decoder.layers.{i}.``.
        theirs: published names; in layers, below ``model.layers.{i}.``; ``{e}`` counts experts,
            other words in braces are those of `SPELLINGS`.
        shape: of megakda's tensor, in the words of `SYMBOLS`.
        published: of each published one; a 1 is an axis that megakda's has not. "": the same.
        how: a key of `HOW`.
        fp32: "megakda" for what is fp32 in megakda whatever the precision of the run; "always"
            for what stays so in an exported bf16 folder.
        also: another spelling of `theirs`, which is read and never written.
    """

    part: str
    ours: str
    theirs: tuple[str, ...]
    shape: str
    published: str = ""
    how: str = "same"
    fp32: str = ""
    also: tuple[str, ...] = ()


HOW = {
    "same": "the same numbers in the same order",
    "halves": "the published matrices one below the other",
    "experts": "expert `{e}` at index `{e}`; of two names, the first at 0 and the second at 1 of "
    "the second axis",
    "rotary": "kimi_linear: the same. deepseek_v3: the P rotated rows (of each head, or the last "
    "ones) are published in pairs, row 2j + s there being row j + s P/2 here",
}

SYMBOLS = {
    "V": "vocab_size",
    "h": "hidden_size",
    "H": "num_heads",
    "HD": "num_heads x linear.head_dim_k, which equals linear.head_dim_v",
    "D": "linear.head_dim_v, which equals linear.gate_rank and linear.output_gate_rank",
    "W": "linear.conv_kernel",
    "N": "mla.qk_nope_head_dim",
    "P": "mla.qk_shared_head_dim",
    "L": "mla.kv_lora_rank",
    "Q": "mla.q_lora_rank",
    "U": "mla.v_head_dim",
    "HQ": "num_heads x (N + P)",
    "LP": "L + P",
    "HB": "num_heads x (N + U)",
    "HU": "num_heads x U",
    "F": "dense_ffn",
    "E": "moe.num_experts",
    "X": "moe.expert_ffn",
    "S": "moe.num_shared_experts x moe.expert_ffn",
}

_MIXER = "self_attention."
_ATTN = "self_attn."


def _mixer(part: str, name: str, shape: str, published: str = "", **more: str) -> Row:
    return Row(part, _MIXER + name, (_ATTN + name,), shape, published, **more)  # type: ignore[arg-type]


TABLE = (
    Row("before", "embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "V h"),
    Row("every", "input_layernorm.weight", ("input_layernorm.weight",), "h"),
    # KDA
    _mixer("kda", "q_proj.weight", "HD h"),
    _mixer("kda", "k_proj.weight", "HD h"),
    _mixer("kda", "v_proj.weight", "HD h"),
    _mixer("kda", "q_conv1d.weight", "HD W", "HD 1 W"),
    _mixer("kda", "k_conv1d.weight", "HD W", "HD 1 W"),
    _mixer("kda", "v_conv1d.weight", "HD W", "HD 1 W"),
    _mixer("kda", "b_proj.weight", "H h"),
    _mixer("kda", "f_a_proj.weight", "D h"),
    _mixer("kda", "f_b_proj.weight", "HD D"),
    _mixer("kda", "A_log", "H", "1 1 H 1", fp32="always"),
    _mixer("kda", "dt_bias", "HD", fp32="always"),
    _mixer("kda", "g_a_proj.weight", "D h"),
    _mixer("kda", "g_b_proj.weight", "HD D"),
    _mixer("kda", "o_norm.weight", "D"),
    _mixer("kda", "o_proj.weight", "h HD"),
    # MLA
    _mixer("direct", "q_proj.weight", "HQ h", how="rotary"),
    _mixer("latent", "q_a_proj.weight", "Q h"),
    _mixer("latent", "q_a_layernorm.weight", "Q"),
    _mixer("latent", "q_b_proj.weight", "HQ Q", how="rotary"),
    _mixer("mla", "kv_a_proj_with_mqa.weight", "LP h", how="rotary"),
    _mixer("mla", "kv_a_layernorm.weight", "L"),
    _mixer("mla", "kv_b_proj.weight", "HB L"),
    _mixer("mla", "o_proj.weight", "h HU"),
    # Feed-forward
    Row("every", "pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), "h"),
    Row(
        "dense",
        "mlp.linear_fc1.weight",
        ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "2F h",
        "F h",
        how="halves",
        # `save_pretrained` of transformers 5.23 gives the dense layers of kimi_linear this prefix.
        also=("{moe}.gate_proj.weight", "{moe}.up_proj.weight"),
    ),
    Row(
        "dense",
        "mlp.linear_fc2.weight",
        ("mlp.down_proj.weight",),
        "h F",
        also=("{moe}.down_proj.weight",),
    ),
    Row("moe", "mlp.router.weight", ("{moe}.gate.weight",), "E h", fp32="megakda"),
    Row(
        "moe",
        "mlp.router.expert_bias",
        ("{moe}.gate.e_score_correction_bias",),
        "E",
        fp32="always",
    ),
    Row(
        "moe",
        "mlp.experts.gate_up",
        ("{moe}.experts.{e}.{gate}.weight", "{moe}.experts.{e}.{up}.weight"),
        "E 2 X h",
        "X h",
        how="experts",
    ),
    Row("moe", "mlp.experts.down", ("{moe}.experts.{e}.{down}.weight",), "E h X", "h X", "experts"),
    Row(
        "moe",
        "mlp.shared_experts.linear_fc1.weight",
        ("{moe}.shared_experts.gate_proj.weight", "{moe}.shared_experts.up_proj.weight"),
        "2S h",
        "S h",
        how="halves",
    ),
    Row(
        "moe",
        "mlp.shared_experts.linear_fc2.weight",
        ("{moe}.shared_experts.down_proj.weight",),
        "h S",
    ),
    Row("after", "decoder.final_layernorm.weight", ("model.norm.weight",), "h"),
    Row("after", "output_layer.weight", ("lm_head.weight",), "V h"),
)


@dataclass(frozen=True)
class Rotation:
    """Groups of `period` rows whose last `rotated` ones are published in another order."""

    period: int
    rotated: int

    def published_rows(self, first: int, last: int) -> torch.Tensor:
        """Which published rows megakda's rows `first` to `last` are, int64 [last - first]."""
        rows = torch.arange(first, last)
        inside = rows % self.period - (self.period - self.rotated)
        half = self.rotated // 2
        pairs = rows - inside + 2 * (inside % half) + inside // half
        return torch.where(inside >= 0, pairs, rows)


@dataclass(frozen=True)
class Block:
    """One published tensor as a block of one of megakda's."""

    name: str
    also: str  # another spelling, or ""
    start: tuple[int, ...]  # in megakda's tensor
    size: tuple[int, ...]
    axes: tuple[int | None, ...]  # megakda's axis of each published one; None: one of size 1
    rotation: Rotation | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The published shape."""
        return tuple(1 if axis is None else self.size[axis] for axis in self.axes)

    def overlap(
        self, offset: tuple[int, ...], size: tuple[int, ...]
    ) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """Where it meets the block of `size` at `offset` of megakda's tensor.

        Returns:
            (slices of that block, slices of the published tensor but for its rotation), or None.
        """
        inside, published = [], []
        for begin, length, own, extent in zip(offset, size, self.start, self.size, strict=True):
            low, high = max(begin, own), min(begin + length, own + extent)
            if low >= high:
                return None
            inside.append(slice(low - begin, high - begin))
            published.append(slice(low - own, high - own))
        whole = slice(0, 1)
        return tuple(inside), tuple(whole if a is None else published[a] for a in self.axes)


@dataclass(frozen=True)
class Tensor:
    """One of megakda's tensors and the published ones that it is made of, in order."""

    name: str
    shape: tuple[int, ...]
    fp32: str  # as in `Row`
    blocks: tuple[Block, ...]

    def spans(self, max_bytes: int, itemsize: int) -> Iterator[tuple[int, int]]:
        """Rows to handle at a time, first and last + 1: no more than `max_bytes`, if one row is."""
        rows = self.shape[0]
        step = max(1, max_bytes // (math.prod(self.shape[1:]) * itemsize))
        if self.blocks[0].rotation is not None:  # its rows change places
            step = rows
        for first in range(0, rows, step):
            yield first, min(first + step, rows)


def family(model: ModelConfig) -> str:
    """The `model_type` under which a model is published."""
    return DEEPSEEK_V3 if model.mla.rope and set(_kinds(model)) == {FULL} else KIMI_LINEAR


def tensors(model: ModelConfig) -> Iterator[Tensor]:
    """Every tensor of a model, buffers included, in the order of its layers.

    The model must be one that `megakda.checkpoint.hf_config.check_publishable` accepts.
    """
    sizes = _sizes(model)

    def rows(parts: set[str], layer: int | None = None) -> Iterator[Tensor]:
        return (_tensor(row, layer, model, sizes) for row in TABLE if row.part in parts)

    yield from rows({"before"})
    for layer, kind in enumerate(_kinds(model)):
        moe = model.ffn == "moe" and layer >= model.moe.first_dense_layers
        query = "direct" if model.mla.q_lora_rank is None else "latent"
        mixer = {"mla", query} if kind == FULL else {"kda"}
        parts = {"every", *mixer, "moe" if moe else "dense"}
        yield from rows(parts, layer)
    yield from rows({"after"})


def _tensor(row: Row, layer: int | None, model: ModelConfig, sizes: dict[str, int]) -> Tensor:
    words = SPELLINGS[family(model)]
    ours, theirs = "", ""
    if layer is not None:
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
    shape = _shape(row.shape, sizes)
    blocks = []
    for expert in range(shape[0]) if row.how == "experts" else (None,):
        for index, name in enumerate(row.theirs):
            start, size, axes = _place(row, shape, expert, index)
            also = row.also[index] if row.also else ""
            blocks.append(
                Block(
                    name=theirs + name.format(e=expert, **words),
                    also=theirs + also.format(**words) if also else "",
                    start=start,
                    size=size,
                    axes=axes,
                    rotation=_rotation(row, model),
                )
            )
    return Tensor(ours + row.ours, shape, row.fp32, tuple(blocks))


def _place(
    row: Row, shape: tuple[int, ...], expert: int | None, index: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int | None, ...]]:
    """(start, size, axes) of the published tensor `index` (of an expert)."""
    rank = len(shape)
    if expert is not None:
        lead = (expert,) if len(row.theirs) == 1 else (expert, index)
        rest = rank - len(lead)
        start = lead + (0,) * rest
        size = (1,) * len(lead) + shape[len(lead) :]
        return start, size, tuple(range(len(lead), rank))
    if row.how == "halves":
        rows = shape[0] // len(row.theirs)
        return (index * rows, *(0,) * (rank - 1)), (rows, *shape[1:]), tuple(range(rank))
    ours = iter(range(rank))
    axes = tuple(None if word == "1" else next(ours) for word in _published(row).split())
    return (0,) * rank, shape, axes


def _rotation(row: Row, model: ModelConfig) -> Rotation | None:
    if row.how != "rotary" or family(model) != DEEPSEEK_V3:
        return None
    mla = model.mla
    lead = mla.qk_nope_head_dim if row.shape.startswith("HQ") else mla.kv_lora_rank
    return Rotation(lead + mla.qk_shared_head_dim, mla.qk_shared_head_dim)


def _published(row: Row) -> str:
    return row.published or row.shape


def _kinds(model: ModelConfig) -> tuple[str, ...]:
    return layer_kinds(model.pattern, model.num_layers, model.last_layer_full)


def _shape(words: str, sizes: dict[str, int]) -> tuple[int, ...]:
    return tuple(sizes[word] for word in words.split())


def _sizes(model: ModelConfig) -> dict[str, int]:
    heads, linear, mla, moe = model.num_heads, model.linear, model.mla, model.moe
    nope, shared, value = mla.qk_nope_head_dim, mla.qk_shared_head_dim, mla.v_head_dim
    sizes = {
        "V": model.vocab_size,
        "h": model.hidden_size,
        "H": heads,
        "HD": heads * linear.head_dim_k,
        "D": linear.head_dim_v,
        "W": linear.conv_kernel,
        "L": mla.kv_lora_rank,
        "Q": mla.q_lora_rank or 0,
        "HQ": heads * (nope + shared),
        "LP": mla.kv_lora_rank + shared,
        "HB": heads * (nope + value),
        "HU": heads * value,
        "F": model.dense_ffn,
        "E": moe.num_experts,
        "X": moe.expert_ffn,
        "S": moe.num_shared_experts * moe.expert_ffn,
        "1": 1,
        "2": 2,
    }
    return {**sizes, "2F": 2 * sizes["F"], "2S": 2 * sizes["S"]}


_INTRODUCTION = """\
# Names in Hugging Face folders

Written by `python -m megakda.checkpoint.hf_map`; do not edit.

How megakda's tensors lie in a published folder, as `tools/import_hf.py`, `tools/export_hf.py` and
generation from such a folder read and write them. Names inside layers begin with
`decoder.layers.{i}.` in megakda and with `model.layers.{i}.` there, `i` from 0. Axes of size 1 that
megakda's tensors have not are taken out.

There are two formats:

- `kimi_linear`: hybrids of KDA and MLA without positions, and either of them alone. Without an MLA
  layer `use_cache` is false in `config.json`, because transformers 5.23 cannot count the tokens in
  a cache without attention.
- `deepseek_v3`: MLA with rotary positions (`mla.rope`) in every layer.

Other models have no published format, and converting them is refused: Gated DeltaNet, rotary
positions in a hybrid, the bounded decay gate, another output gate than the sigmoid, no convolution,
head sizes and gate ranks of KDA that differ, norms with different epsilons, no shared expert.
Folders are refused that have tied embeddings, biases, scaled rotary positions, heads for
multi-token prediction, or quantised weights.""".splitlines()


def markdown() -> str:
    """The table as a page of documentation."""
    lines = [
        *_INTRODUCTION,
        "",
        "| layers | megakda | shape | published | shape there | how | fp32 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in TABLE:
        kimi, deepseek = (
            [name.format(e="{e}", **SPELLINGS[kind]) for name in row.theirs] for kind in SPELLINGS
        )
        names = ", ".join(f"`{name}`" for name in kimi)
        if kimi != deepseek:
            names += "; deepseek_v3: " + ", ".join(f"`{name}`" for name in deepseek)
        if row.also:
            also = ", ".join(f"`{n.format(**SPELLINGS[KIMI_LINEAR])}`" for n in row.also)
            names += f"; also read: {also}"
        cells = [
            row.part,
            f"`{row.ours}`",
            f"[{', '.join(row.shape.split())}]",
            names,
            f"[{', '.join(_published(row).split())}]",
            row.how,
            row.fp32 or "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "How:", ""]
    lines += [f"- **{key}**: {text}" for key, text in HOW.items()]
    lines += [
        "",
        "fp32: **megakda** is fp32 in megakda whatever `precision` is, and takes the precision of "
        "the folder when it is exported in bf16; **always** stays fp32 there, too.",
        "",
        "Sizes, in settings below `model.`:",
        "",
    ]
    lines += [f"- {key}: {text}" for key, text in SYMBOLS.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
