"""What tests of conversion run on ranks: random models saved, compared and loaded."""

from __future__ import annotations

import base64
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megakda.config import compose, to_yaml

TINY = (
    "model=tiny",
    "model.hidden_size=64",
    "model.num_heads=4",
    "model.linear.head_dim_k=16",
    "model.linear.head_dim_v=16",
    "model.linear.gate_rank=16",
    "model.linear.output_gate_rank=16",
    "model.mla.kv_lora_rank=32",
    "model.mla.qk_nope_head_dim=16",
    "model.mla.qk_shared_head_dim=8",
    "model.mla.v_head_dim=16",
    "model.dense_ffn=96",
    "model.moe.expert_ffn=32",
    "train.context=96",
    "runtime.threads=1",
    "runtime.timeout_minutes=1",
)
"""A hybrid whose widths the published format can say."""


@contextmanager
def chunks(config: Any) -> Iterator[list[Any]]:
    """This rank's bare chunks with uninitialised weights, in their process groups."""
    from megakda.models.kimi_linear import build_chunks
    from megakda.runtime.distributed import process_groups

    with process_groups(config.parallel, config.runtime, torch.device("cpu")):
        yield build_chunks(config.model, config.parallel, config.precision, config.train.context)
        torch.distributed.barrier()


def save(overrides: Sequence[str], out: str, ids: Any = None) -> torch.Tensor | None:
    """A run folder with a random model, the same numbers at every layout.

    Norm weights and routing biases are random, too. With `ids` [b, s] on one rank, returns the
    logits [b, s, V].
    """
    from megakda.checkpoint import state
    from megakda.checkpoint.folders import write_json
    from megakda.data.tokenizer import load_tokenizer
    from megakda.models.init import initialize

    config = compose([*TINY, *overrides, f"train.out={out}"])
    tokenizer = load_tokenizer(config.data.tokenizer)
    folder = Path(out) / "checkpoints/step_00000007"
    with chunks(config) as built:
        initialize(built, 3, 0.02)
        for chunk in built:
            _randomize(chunk)
        if torch.distributed.get_rank() == 0:
            folder.mkdir(parents=True)
        torch.distributed.barrier()
        state.write(folder, built, None, {}, False)
        if torch.distributed.get_rank() == 0:
            identity = {"spec": tokenizer.spec, "fingerprint": tokenizer.fingerprint}
            facts = {
                "format": 1,
                "step": 7,
                "model": dataclasses.asdict(config.model),
                "parallel": dataclasses.asdict(config.parallel),
                "precision": config.precision,
                "tokenizer": identity,
                "tokens_seen": 12345,
            }
            write_json(folder / "manifest.json", facts)
            (Path(out) / "config.yaml").write_text(to_yaml(config))
        if ids is None:
            return None
        positions = torch.arange(ids.shape[1]).expand(ids.shape)
        with torch.no_grad():
            return built[0].eval()(ids, positions, None).float()


def _randomize(chunk: Any) -> None:
    """Random values for what starts as ones or zeros, by global name."""
    from megakda.models.init import _block_seed
    from megakda.models.sharding import METADATA

    for entry in chunk.sharded_state_dict(metadata=dict(METADATA)).values():
        key = getattr(entry, "key", "")
        if key.endswith(("norm.weight", "expert_bias")):
            generator = torch.Generator().manual_seed(_block_seed(0, key, 0))
            whole = torch.rand(entry.global_shape, generator=generator)
            whole = whole * 0.1 - 0.05 if key.endswith("bias") else whole * 0.5 + 0.75
            where = zip(entry.global_offset, entry.local_shape, strict=True)
            entry.data.detach().copy_(whole[tuple(slice(o, o + n) for o, n in where)])


def load_differs(overrides: Sequence[str], saved: Sequence[str], folder: str) -> list[str]:
    """Local tensors in which a Hugging Face folder, loaded directly, differs from checkpoints."""
    from megakda.checkpoint import hf_config, manager
    from megakda.checkpoint.hf_load import load_hf

    config = compose([*TINY, *overrides])
    config.model = hf_config.read(Path(folder))
    with chunks(config) as built:
        named = {
            f"{i}.{name}": tensor.detach()
            for i, chunk in enumerate(built)
            for name, tensor in chunk.state_dict().items()
            if torch.is_tensor(tensor)
        }
        assert len(named) > 10

        def loaded(load: Callable[[], Any]) -> dict[str, torch.Tensor]:
            for tensor in named.values():
                tensor.fill_(0 if tensor.dtype == torch.uint8 else torch.nan)
            load()
            return {name: tensor.clone() for name, tensor in named.items()}

        direct = loaded(lambda: load_hf(Path(folder), built, config.model))
        model, wrong = dataclasses.asdict(config.model), []
        for path in saved:
            found = manager.find(path, "saved")
            other = loaded(lambda found=found: manager.load(found, built, None, model))
            wrong += [f"{path}: {n}" for n, t in direct.items() if not torch.equal(t, other[n])]
        return wrong


def random_folder(
    folder: Path, overrides: Sequence[str] = (), dtype: torch.dtype = torch.float32
) -> Any:
    """A Hugging Face folder of random numbers with the byte tokenizer; returns its model."""
    from megakda.checkpoint import hf_config, hf_tokenizer
    from megakda.checkpoint.hf_folder import FolderWriter
    from megakda.checkpoint.hf_map import tensors

    model = compose([*TINY, *overrides]).model
    folder.mkdir()
    plan = [(b.name, dtype, b.shape) for tensor in tensors(model) for b in tensor.blocks]
    writer = FolderWriter(folder, plan, 300_000)
    generator = torch.Generator().manual_seed(1)
    for name, kind, shape in plan:
        writer.write(name, torch.randn(shape, generator=generator).to(kind))
    writer.close()
    names = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
    config = hf_config.write(model, names[dtype], 512, bos=7, eos=[256, 9], pad=0)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [256, 9], "top_p": 0.95}')
    hf_tokenizer.write_byte(folder)
    return model


def edit(folder: Path, **settings: Any) -> None:
    """Changes settings of a folder's config.json."""
    from megakda.checkpoint import hf_config

    config = {**hf_config.load(folder), **settings}
    (folder / "config.json").write_text(json.dumps(config))


def tiktoken_instead(folder: Path) -> None:
    """Puts a tiktoken tokenizer of the 256 bytes, [BOS] and [EOS] in the place of a folder's."""
    (folder / "tokenizer.json").unlink()
    lines = [f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256)]
    (folder / "tiktoken.model").write_text("\n".join(lines))
    special = {
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "added_tokens_decoder": {"256": {"content": "[BOS]"}, "257": {"content": "[EOS]"}},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
