"""The same model in megakda and in `transformers`, side by side: the same prompts, greedy."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megakda.bench.conversion import HEAD as CONVERSION_HEAD
from megakda.bench.conversion import Conversion, conversions
from megakda.checkpoint import hf_export
from megakda.errors import ConfigError
from megakda.inference.choice import ModelChoice
from megakda.inference.request import SamplingParams


@dataclass(frozen=True)
class Case:
    """So many prompts of so many tokens, and answers of so many."""

    batch: int
    prompt: int
    tokens: int


@dataclass(frozen=True)
class Measured:
    """One case. Seconds are medians; `same` counts answers that agree in every token."""

    case: Case
    megakda_s: float
    transformers_s: float
    same: int


@dataclass(frozen=True)
class Comparison:
    """All cases, and how long each side took to load the model."""

    model: str
    threads: int
    transformers: str  # version
    rows: list[Measured]
    conversions: list[Conversion]

    def lines(self) -> list[str]:
        """As Markdown."""
        head = [
            f"`{self.model}` exported and loaded by transformers {self.transformers} (its PyTorch "
            f"code, without fla), {self.threads} thread(s); prompts of random tokens, greedy. "
            "Tokens per second count new tokens over the whole time, prefill included.",
            "",
            "| prompts | prompt tokens | new tokens | megakda tokens/s | transformers tokens/s | "
            "times as fast | equal answers |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            made = row.case.batch * row.case.tokens
            head.append(
                f"| {row.case.batch} | {row.case.prompt:,} | {row.case.tokens} | "
                f"{made / row.megakda_s:,.0f} | {made / row.transformers_s:,.0f} | "
                f"{row.transformers_s / row.megakda_s:.2f} | {row.same} of {row.case.batch} |"
            )
        head += [
            "",
            "Conversion of a model of random weights, everything flushed to disk here:",
            "",
        ]
        return [*head, *grid(CONVERSION_HEAD, [found.cells() for found in self.conversions])]


def grid(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows)]


def compare(model: Path, cases: list[Case], repeats: int, threads: int) -> Comparison:
    """Exports `model`, loads it on both sides, and times them in turn.

    Raises:
        ConfigError: transformers is not installed.
        CheckpointError: the model cannot be exported or loaded.
    """
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(
            f"a comparison with transformers needs the package ({error}): pip install 'megakda[hf]'"
        ) from error
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        exported = hf_export.export_hf(model, Path(folder) / "hf").folder
        peer = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype="auto").eval()
        peer.generation_config.eos_token_id = None  # as with ignore_eos
        with ModelChoice(model).open() as loaded:
            torch.set_num_threads(threads)
            for case in cases:
                rows.append(_measure(loaded, peer, case, repeats))
    converted = conversions(repeats)
    return Comparison(str(model), threads, transformers.__version__, rows, converted)


def _measure(model: Any, peer: Any, case: Case, repeats: int) -> Measured:
    from megakda.inference.engine import Engine, EngineSettings

    generator = torch.Generator().manual_seed(0)
    vocabulary = model.tokenizer.vocab_size - 1
    prompts = torch.randint(0, vocabulary, (case.batch, case.prompt), generator=generator)
    settings = EngineSettings(
        max_sequences=case.batch,
        max_context=case.prompt + case.tokens,
        prefill_chunk=max(512, case.batch * case.prompt),
        prefix_slots=0,
    )
    engine = Engine(model, settings)
    params = SamplingParams(max_tokens=case.tokens, temperature=0.0, ignore_eos=True)
    listed = prompts.tolist()

    def ours() -> list[list[int]]:
        return [answer.tokens for answer in engine.generate(listed, params)]

    @torch.no_grad()
    def theirs() -> list[list[int]]:
        out = peer.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=case.tokens,
            do_sample=False,
        )
        return out[:, case.prompt :].tolist()

    times: dict[Any, list[float]] = {ours: [], theirs: []}
    answers = {}
    for repeat in range(repeats + 1):
        for run, found in times.items():  # in turn, so that both see the same machine
            started = time.perf_counter()
            answers[run] = run()
            if repeat:  # the first is a warm-up
                found.append(time.perf_counter() - started)
    same = sum(a == b for a, b in zip(answers[ours], answers[theirs], strict=True))
    return Measured(case, statistics.median(times[ours]), statistics.median(times[theirs]), same)
