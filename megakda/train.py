"""Trains a model: ``python -m megakda.train [override ...]``, alone or under torchrun.

Overrides follow Hydra's syntax: ``experiment=quickstart``, ``model=tiny train.steps=100``. Hydra's
own flags work too (``--help``, ``--cfg job``, ``--multirun``).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig

from megakda.config import Config, Derived, compose, recipes_dir, validate
from megakda.config.compose import from_tree
from megakda.config.timetable import Stream
from megakda.errors import ConfigError, MegakdaError
from megakda.runtime.distributed import named_failures, process_groups, rank, world_size


def run(config: Config) -> None:
    """Everything from a composed config to a trained model.

    Settings and files are checked before any process group is made.

    Raises:
        MegakdaError: a problem that a person can solve; the message says how.
    """
    import megakda.runtime

    derived = validate(config, world_size())
    runtime = config.runtime
    device = megakda.runtime.install(runtime.device, runtime.backend, runtime.attention)

    # megatron-core is imported below this line only: install() adapts it on import.
    from megakda.checkpoint import manager as checkpoints
    from megakda.data.datasets import build_datasets, prepare_data
    from megakda.trainer import Trainer, checkpoint_root, resume_point

    with contextlib.ExitStack() as stack:
        if rank() == 0:
            resumed = checkpoints.resolve(config.train.resume, checkpoint_root(config))
            needed = _streams(derived, resumed).values()
            if config.train.weights is not None:
                checkpoints.find(config.train.weights, "train.weights")
            prepare_data(config, streams=needed)
            stack.enter_context(claim_folder(Path(config.train.out)))
        stack.enter_context(process_groups(config.parallel, config.runtime, device))
        streams = _streams(derived, resume_point(config))
        corpus = prepare_data(config, scan=False, streams=streams.values())
        datasets = build_datasets(config, corpus, streams)
        trainer = Trainer(config, derived, corpus.tokenizer, datasets)
        stack.callback(trainer.close)
        with named_failures():
            trainer.fit()


def _streams(derived: Derived, resumed: Path | None) -> dict[int, Stream]:
    """The data that the run still reads: stages that it resumes behind need theirs no more."""
    from megakda.checkpoint.folders import read_manifest

    return derived.timetable.streams_from(read_manifest(resumed)["step"] if resumed else 0)


@contextlib.contextmanager
def claim_folder(out: Path) -> Iterator[None]:
    """Keeps a second run from writing into `out` while this process lives, however it ends.

    Raises:
        ConfigError: another process is training into `out`.
    """
    import fcntl

    out.mkdir(parents=True, exist_ok=True)
    with open(out / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"train.out={out}: another run is writing there; wait for it or end it (after a "
                "crash of torchrun alone its workers may live on), or set another train.out"
            ) from None
        except OSError as error:  # a file system without locks
            print(f"train.out={out} cannot be locked ({error}): start one run there at a time")
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if any(argument.startswith("-") for argument in arguments):
            _run_with_hydra()
        else:
            run(compose(arguments))
    except MegakdaError as error:
        # Every rank meets the same wrong setting; one of them is enough to say so.
        if rank() == 0 or error.exit_code not in (2, 3):
            print(f"megakda: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _run_with_hydra() -> None:
    """Hydra's command line, for its flags and for sweeps; every run of a sweep has a folder."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    errors: list[MegakdaError] = []

    @hydra.main(config_path=str(recipes_dir()), config_name="config", version_base="1.3")
    def job(tree: DictConfig) -> None:
        settings = HydraConfig.get()
        if settings.mode == RunMode.MULTIRUN and world_size() > 1:
            errors.append(
                ConfigError(
                    f"a sweep (-m) on {world_size()} ranks: process groups are made once, so its "
                    "runs would not start after the first; start torchrun once for each run"
                )
            )
            return
        named = any(override.startswith("train.out=") for override in settings.overrides.task)
        if settings.mode == RunMode.MULTIRUN and not named:
            tree.train.out = f"{tree.train.out}/{settings.job.override_dirname}"
        try:
            run(from_tree(tree))
        except MegakdaError as error:  # Hydra would print it with its own stack
            errors.append(error)

    job()
    if errors:
        raise errors[0]


if __name__ == "__main__":
    sys.exit(main())
