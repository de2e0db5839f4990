"""Seconds to convert a model of some hundred megabytes, here and in `transformers`."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megakda.checkpoint import hf_config, hf_tokenizer
from megakda.checkpoint.hf_export import export_hf
from megakda.checkpoint.hf_folder import FolderWriter
from megakda.checkpoint.hf_import import import_hf
from megakda.checkpoint.hf_map import tensors
from megakda.config import compose

OVERRIDES = [
    "model=tiny",
    "model.hidden_size=768",
    "model.num_heads=12",
    "model.num_layers=8",
    "model.dense_ffn=2048",
    "model.vocab_size=8192",
    *(f"model.linear.{name}=64" for name in ("head_dim_k", "head_dim_v", "gate_rank")),
    "model.linear.output_gate_rank=64",
    "model.mla.kv_lora_rank=256",
    "model.moe.num_experts=128",
    "model.moe.expert_ffn=64",
]


@dataclass(frozen=True)
class Conversion:
    """Medians in seconds of one precision."""

    precision: str
    megabytes: float
    import_s: float
    export_s: float
    transformers_s: float  # from_pretrained and save_pretrained

    def cells(self) -> list[str]:
        """A row of the table under `HEAD`."""
        seconds = (self.import_s, self.export_s, self.transformers_s)
        return [self.precision, f"{self.megabytes:,.0f}", *(f"{s:.2f}" for s in seconds)]


HEAD = ["precision", "MB", "import_hf s", "export_hf s", "transformers load + save s"]


def conversions(repeats: int) -> list[Conversion]:
    """Times both directions in fp32 and bf16; needs transformers."""
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return [_conversion(name, kind, repeats) for name, kind in kinds.items()]


def _conversion(precision: str, dtype: torch.dtype, repeats: int) -> Conversion:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        size = _random_folder(folder / "hf", dtype)

        def there_and_back(turn: int) -> None:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype="auto")
            model.save_pretrained(folder / f"theirs{turn}")

        runs: dict[str, Callable[[int], Any]] = {
            "import": lambda turn: import_hf(folder / "hf", folder / f"run{turn}"),
            "export": lambda turn: export_hf(folder / f"run{turn}", folder / f"hf{turn}"),
            "transformers": there_and_back,
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in range(repeats + 1):
            for name, run in runs.items():  # in turn, so that all see the same machine
                started = time.perf_counter()
                run(turn)
                if turn:  # the first is a warm-up
                    times[name].append(time.perf_counter() - started)
        found = {name: statistics.median(seconds) for name, seconds in times.items()}
    return Conversion(
        precision, size / 1e6, found["import"], found["export"], found["transformers"]
    )


def _random_folder(folder: Path, dtype: torch.dtype) -> int:
    """A published folder of random numbers with the byte tokenizer; returns its bytes."""
    model = compose(OVERRIDES).model
    folder.mkdir()
    plan = [(block.name, dtype, block.shape) for t in tensors(model) for block in t.blocks]
    writer = FolderWriter(folder, plan, 10**9)
    generator = torch.Generator().manual_seed(0)
    for name, kind, shape in plan:
        writer.write(name, torch.randn(shape, generator=generator).to(kind))
    writer.close()
    name = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(hf_config.write(model, name, 4096, eos=256)))
    hf_tokenizer.write_byte(folder)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
