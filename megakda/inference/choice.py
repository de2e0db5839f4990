"""Which model a command line means, and at which layout."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import megakda.runtime
from megakda.config.schema import ParallelConfig, RuntimeConfig
from megakda.errors import ConfigError
from megakda.runtime.distributed import world_size

if TYPE_CHECKING:
    from megakda.inference.loading import LoadedModel

LAYOUT = {
    "tensor": "heads, widths and vocabulary over N ranks",
    "pipeline": "layers over N stages",
    "expert": "experts over N ranks, those of --tensor first",
}


@dataclass(frozen=True)
class ModelChoice:
    """What `open_model` is told.

    Attributes:
        path: a run's folder, a checkpoint, or a Hugging Face folder.
        parallel: layout over the ranks of torchrun.
        precision: "fp32", "bf16", or None for the checkpoint's.
        tokenizer: another one than the checkpoint names.
        runtime: device, threads and timeouts.
    """

    path: Path
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: str | None = None
    tokenizer: str | None = None
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    @contextmanager
    def open(self) -> Iterator[LoadedModel]:
        """Loads the model. Raises what `open_model` raises."""
        needed = self.parallel.tensor * self.parallel.pipeline
        if world_size() % needed:
            raise ConfigError(
                f"--tensor {self.parallel.tensor} x --pipeline {self.parallel.pipeline} need "
                f"{needed} ranks, but there are {world_size()}: start with torchrun --standalone "
                f"--nproc-per-node {needed}, or change the layout"
            )
        device = megakda.runtime.install(self.runtime.device)
        from megakda.inference.loading import open_model

        with open_model(
            self.path,
            self.parallel,
            self.runtime,
            device=device,
            precision=self.precision,
            tokenizer=self.tokenizer,
        ) as model:
            yield model


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that every command on a model takes."""
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="a run's folder (its newest checkpoint), a checkpoint, or a Hugging Face folder",
    )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--tokenizer", metavar="SPEC", help="another one than the checkpoint names, as hf:DIR"
    )
    group.add_argument(
        "--precision", choices=("fp32", "bf16"), help="(default: the checkpoint's own)"
    )
    group.add_argument(
        "--threads", type=int, metavar="N", help="of each CPU rank (default: cores / ranks)"
    )
    layout = parser.add_argument_group("layout, under torchrun with tensor x pipeline ranks")
    for name, what in LAYOUT.items():
        layout.add_argument(
            f"--{name}", type=int, default=1, metavar="N", help=f"{what} (%(default)s)"
        )


def chosen_model(args: argparse.Namespace) -> ModelChoice:
    """What `add_model_arguments` has read."""
    return ModelChoice(
        args.model,
        ParallelConfig(**{name: getattr(args, name) for name in LAYOUT}),
        args.precision,
        args.tokenizer,
        RuntimeConfig(threads=args.threads),
    )
