"""What `tools/evaluate.py` does: a model is opened, measured, and the result printed and written.

Every rank does the same; rank 0 alone prints and writes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

import megakda
from megakda.data.indexed import read_index
from megakda.errors import ConfigError
from megakda.evaluation import output
from megakda.evaluation.perplexity import PerplexitySettings, corpus_perplexity
from megakda.evaluation.sweep import (
    Cell,
    Sweep,
    clear_results,
    draw_heatmaps,
    markdown_table,
    result_files,
    run_sweep,
    write_tables,
)
from megakda.inference.chat import read_template
from megakda.inference.choice import ModelChoice
from megakda.runtime.distributed import rank

if TYPE_CHECKING:
    from megakda.evaluation.harness import Prompting
    from megakda.inference.engine import Engine
    from megakda.inference.loading import LoadedModel

_CACHE_TOKENS = 1 << 18
"""Tokens of all sequences together that an engine gets room for, and one sequence at least."""


@dataclass(frozen=True)
class Judged:
    """A model to measure, and how much of it to run at once.

    Attributes:
        choice: which model, at which layout.
        sequences: at the same time, at most.
        chunk: prompt tokens per forward pass.
    """

    choice: ModelChoice
    sequences: int = 16
    chunk: int = 1024

    def check(self) -> None:
        """Raises ConfigError for numbers that cannot work."""
        for name in ("sequences", "chunk"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} {getattr(self, name)} must be at least 1")

    @contextmanager
    def open(self) -> Iterator[LoadedModel]:
        """Loads it. Raises what `megakda.inference.loading.open_model` raises."""
        self.check()
        with self.choice.open() as model:
            yield model

    def engine(self, model: LoadedModel, tokens: int, prefixes: int = 0) -> Engine:
        """An engine for sequences of so many tokens, with fewer at a time where they are long."""
        from megakda.inference.engine import Engine, EngineSettings

        sequences = max(1, min(self.sequences, _CACHE_TOKENS // tokens))
        settings = EngineSettings(
            max_sequences=sequences,
            max_context=max(tokens, 2),
            prefill_chunk=self.chunk,
            prefix_slots=prefixes,
        )
        return Engine(model, settings)

    def facts(self, model: LoadedModel) -> dict[str, Any]:
        """For result files."""
        return {
            "model": str(model.source),
            "precision": model.precision,
            "tokenizer": {
                "spec": model.tokenizer.spec,
                "fingerprint": model.tokenizer.fingerprint,
            },
            "megakda": megakda.__version__,
        }


def perplexity(
    judged: Judged, data: Sequence[str], settings: PerplexitySettings, out: Path | None
) -> None:
    """Perplexity on corpora: a line for each on stdout, and JSON in `out`."""
    settings.check()
    if out is not None:
        output.check_file(out)
    for prefix in data:
        read_index(prefix)  # a wrong name shows before a large model is loaded
    found: dict[str, Any] = {}
    with judged.open() as model:
        engine = judged.engine(model, settings.context + 1)
        for prefix in data:
            with _bar(None, "tok", prefix) as bar:

                def show(done: int, total: int, bar: Any = bar) -> None:
                    bar.total = total
                    bar.update(done - bar.n)

                result = corpus_perplexity(
                    engine, model.tokenizer, model.config.vocab_size, prefix, settings, show
                )
            found[prefix] = asdict(result)
            _print(f"{prefix}: {result}")
            if not result.tokenizer_checked:
                _print(
                    f"note: {prefix}.json is not there or not megakda's, so it could not be checked"
                    f" that the tokens are of {model.tokenizer.spec}",
                    error=True,
                )
        facts = judged.facts(model)
    if out is not None and rank() == 0:
        results = {**facts, "settings": asdict(settings), "results": found}
        output.write_text(out, json.dumps(results, indent=2) + "\n")


def lm_eval(
    judged: Judged,
    tasks: Sequence[str],
    include_path: str | None,
    limit: float | None,
    num_fewshot: int | None,
    max_length: int,
    prefix_token: int | None,
    seed: int,
    prompting: Prompting,
    chat_template: Path | None,
    out: Path | None,
) -> None:
    """lm_eval's tasks: its table on stdout, its results in `out` and samples beside it.

    `chat_template` is a Jinja file, in the place of the model's own chat template.
    """
    from megakda.evaluation import harness

    if max_length < 1:
        raise ConfigError(f"max-length={max_length} must be at least 1")
    prompting.check()
    if chat_template is not None and not prompting.apply_chat_template:
        raise ConfigError(
            f"--chat-template {chat_template} is for conversations: give --apply-chat-template too"
        )
    template = None if chat_template is None else read_template(chat_template)
    if out is not None:
        output.check_file(out)
        output.check_file(harness.samples_file(out))
    found = harness.find_tasks(tasks, include_path, limit, num_fewshot, seed)
    from megakda.evaluation.lm_eval_model import MegakdaLM

    with judged.open() as model:
        engine = judged.engine(model, max_length + 1, prefixes=8)
        lm = MegakdaLM.on(
            engine,
            model.tokenizer,
            str(model.source),
            max_length,
            prefix_token_id=prefix_token,
            seed=seed,
            chat_template=template,
        )
        results = harness.run_tasks(lm, found, prompting)
        if rank() == 0:
            print(harness.table(results))
            if out is not None:
                harness.write_results({**results, **judged.facts(model)}, out)


def long_context(judged: Judged, sweep: Sweep, out: Path) -> None:
    """Long-context tests: a table on stdout, and tables, samples and heat maps in `out`.

    Those of another sweep in `out` go when this one has something to write.
    """
    sweep.check()
    output.check_folder(out)
    for path in result_files(out):
        output.check_file(path)
    total = len(list(sweep.cells()))
    found: list[Cell] = []
    with judged.open() as model, _bar(total, "cells", "long context") as bar:
        facts = judged.facts(model)

        def keep(cell: Cell) -> None:
            found.append(cell)
            if rank() == 0:  # after each, so that a long sweep may be stopped
                if len(found) == 1:
                    clear_results(out)
                write_tables(out, sweep, found, facts)
            bar.set_postfix_str(f"{cell.task} {cell.length}: {cell.score:.0%}")
            bar.update()

        def engine_for(tokens: int) -> Engine:
            return judged.engine(model, tokens, prefixes=sweep.samples)

        run_sweep(sweep, model.tokenizer, engine_for, keep)
    if rank() == 0:
        print(markdown_table(found), end="")
        paths = write_tables(out, sweep, found, facts) + draw_heatmaps(out, sweep, found)
        print("\n".join(map(str, paths)))


def _bar(total: int | None, unit: str, what: str) -> Any:
    return tqdm(total=total, unit=unit, desc=what, disable=rank() != 0, leave=False)


def _print(text: str, error: bool = False) -> None:
    if rank() == 0:
        print(text, file=sys.stderr if error else sys.stdout, flush=True)
