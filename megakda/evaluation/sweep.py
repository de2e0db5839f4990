"""Long-context tests over lengths and depths: run, scored, and written as tables and pictures."""

from __future__ import annotations

import csv
import io
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megakda.data.tokenizer import Tokenizer
from megakda.errors import ConfigError
from megakda.evaluation import output
from megakda.evaluation.heatmap import Grid, heatmap
from megakda.evaluation.protocol import Generator
from megakda.evaluation.synthetic import TASKS, Sample, Task, make_sample
from megakda.inference.request import SamplingParams

SCORINGS = ("generate", "loglikelihood")
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
TABLES = ("results.json", "samples.jsonl", "scores.csv", "scores.md")
OVERVIEW = "overview"


@dataclass(frozen=True)
class Sweep:
    """What to measure.

    Attributes:
        tasks: tests, from `megakda.evaluation.synthetic.choose_tasks`.
        lengths: in tokens of the model's tokenizer, prompt and room for the answer together.
        samples: per task and length, and depth where depths are swept.
        depths: of the needle, for tasks of one needle alone (`needle_single_*`).
        scoring: ``generate`` looks for the true answers in a greedy continuation, in any case of
            letters, as RULER does; ``loglikelihood`` feeds the true answers and asks of each
            whether all its tokens were the likeliest, which suits small base models.
        seed: of the samples.
    """

    tasks: Sequence[Task]
    lengths: Sequence[int]
    samples: int = 10
    depths: Sequence[float] = DEPTHS
    scoring: str = "generate"
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError for settings that cannot work."""
        rules = [
            ("lengths", self.lengths, bool(self.lengths) and min(self.lengths) > 0, "above 0"),
            ("samples", self.samples, self.samples > 0, "above 0"),
            (
                "depths",
                self.depths,
                bool(self.depths) and all(0 <= depth <= 1 for depth in self.depths),
                "between 0 and 1, at least one",
            ),
            ("scoring", self.scoring, self.scoring in SCORINGS, f"one of {', '.join(SCORINGS)}"),
        ]
        for name, value, right, rule in rules:
            if not right:
                raise ConfigError(f"{name}={value!r} must be {rule}")

    def cells(self) -> Iterator[tuple[Task, int, float | None]]:
        """(task, length, depth) in the order of measuring: by length, the short ones first."""
        for length in sorted(set(self.lengths)):
            for task in self.tasks:
                swept = task.name.startswith("needle_single") and task.takes_depth
                for depth in sorted(set(self.depths)) if swept else [None]:
                    yield task, length, depth


@dataclass
class Answer:
    """What the model made of one sample.

    Attributes:
        index: of the sample.
        score: share of the references that were right.
        expected, output: per question; the output is empty with ``loglikelihood``.
        logprob: of the true answers, nats per token; None with ``generate``.
    """

    index: int
    score: float
    expected: list[list[str]]
    output: list[str] = field(default_factory=list)
    logprob: float | None = None


@dataclass
class Cell:
    """One task at one length, and one depth where depths are swept.

    `score` is the mean of the answers' scores, `logprob` that of their log-probabilities.
    """

    task: str
    length: int
    depth: float | None
    score: float
    logprob: float | None
    seconds: float
    answers: list[Answer]


def run_sweep(
    sweep: Sweep,
    tokenizer: Tokenizer,
    engine_for: Callable[[int], Generator],
    progress: Callable[[Cell], None] = lambda cell: None,
) -> list[Cell]:
    """Measures every cell; collective where the engine is.

    Args:
        engine_for: an engine for sequences of up to so many tokens; asked once per length.
        progress: called after each cell.

    Raises:
        ConfigError: settings that cannot work, or a length too short for a task. The latter is
            found before anything is measured.
    """
    sweep.check()
    for task, length, depth in sweep.cells():
        if length == min(sweep.lengths):
            _draw(sweep, tokenizer, task, length, depth)
    found: list[Cell] = []
    engine, prepared = None, 0
    for task, length, depth in sweep.cells():
        if engine is None or length != prepared:
            engine, prepared = None, length  # frees the caches of one before the next has its own
            engine = engine_for(length)
        start = time.monotonic()
        drawn = _draw(sweep, tokenizer, task, length, depth)
        ask = _generate if sweep.scoring == "generate" else _teacher_force
        answers = ask(engine, drawn)
        scores = [answer.score for answer in answers]
        logprobs = [answer.logprob for answer in answers if answer.logprob is not None]
        found.append(
            Cell(
                task.name,
                length,
                depth,
                math.fsum(scores) / len(scores),
                math.fsum(logprobs) / len(logprobs) if logprobs else None,
                round(time.monotonic() - start, 3),
                answers,
            )
        )
        progress(found[-1])
    return found


def _draw(
    sweep: Sweep, tokenizer: Tokenizer, task: Task, length: int, depth: float | None
) -> list[Sample]:
    return [
        make_sample(task, tokenizer, length, depth, sweep.seed, index)
        for index in range(sweep.samples)
    ]


def matched(output: str, references: Sequence[str]) -> float:
    """Share of `references` that `output` contains, in any case of letters, as RULER scores."""
    lower = output.lower()
    return sum(reference.lower() in lower for reference in references) / len(references)


def _generate(engine: Generator, samples: Sequence[Sample]) -> list[Answer]:
    asked = [(sample, question) for sample in samples for question in sample.questions]
    done = engine.generate(
        [sample.prompt(question) for sample, question in asked],
        [SamplingParams(max_tokens=question.room, temperature=0.0) for _, question in asked],
    )
    outputs = iter(completion.text for completion in done)
    answers = []
    for sample in samples:
        expected = _expected(sample)
        output = [next(outputs) for _ in sample.questions]
        scores = [matched(text, wanted) for text, wanted in zip(output, expected, strict=True)]
        answers.append(Answer(sample.index, sum(scores) / len(scores), expected, output))
    return answers


def _teacher_force(engine: Generator, samples: Sequence[Sample]) -> list[Answer]:
    answers = []
    scored = engine.score([list(sample.tokens) for sample in samples])
    for sample, tokens in zip(samples, scored, strict=True):
        spans = [span for question in sample.questions for span in question.references]
        pieces = [[t for t in tokens[span.start : span.end] if t] for span in spans]
        logprobs = [t.logprob for piece in pieces for t in piece]
        right = [all(t.rank == 1 for t in piece) for piece in pieces]
        answers.append(
            Answer(
                sample.index,
                sum(right) / len(right),
                _expected(sample),
                logprob=math.fsum(logprobs) / len(logprobs),
            )
        )
    return answers


def _expected(sample: Sample) -> list[list[str]]:
    return [[span.text for span in question.references] for question in sample.questions]


def mean_scores(cells: Sequence[Cell]) -> dict[str, dict[int, float]]:
    """Score of each task at each length, the mean over depths."""
    by_task: dict[str, dict[int, list[float]]] = {}
    for cell in cells:
        by_task.setdefault(cell.task, {}).setdefault(cell.length, []).append(cell.score)
    return {
        task: {length: math.fsum(scores) / len(scores) for length, scores in by_length.items()}
        for task, by_length in by_task.items()
    }


def overview(cells: Sequence[Cell]) -> Grid:
    """Tasks against lengths."""
    means = mean_scores(cells)
    lengths = sorted({cell.length for cell in cells})
    return Grid(
        values=[[row.get(length) for length in lengths] for row in means.values()],
        columns=[_tokens(length) for length in lengths],
        rows=list(means),
        column_label="Length in tokens",
        row_label="Task",
    )


def depth_grid(cells: Sequence[Cell], task: str) -> Grid:
    """Depths of one task's needle against lengths."""
    of_task = {
        (c.depth, c.length): c.score for c in cells if c.task == task and c.depth is not None
    }
    depths = sorted({depth for depth, _ in of_task})
    lengths = sorted({length for _, length in of_task})
    return Grid(
        values=[[of_task.get((depth, length)) for length in lengths] for depth in depths],
        columns=[_tokens(length) for length in lengths],
        rows=[f"{depth:.0%}" for depth in depths],
        column_label="Length in tokens",
        row_label="Depth of the needle",
    )


def markdown_table(cells: Sequence[Cell]) -> str:
    """Tasks against lengths in percent, and the mean of all tasks where all are measured."""
    means = mean_scores(cells)
    lengths = sorted({cell.length for cell in cells})
    rows: dict[str, list[float | None]] = {
        task: [row.get(length) for length in lengths] for task, row in means.items()
    }
    if len(means) > 1:
        rows["mean"] = []
        for length in lengths:
            known = [row[length] for row in means.values() if length in row]
            whole = len(known) == len(means)
            rows["mean"].append(math.fsum(known) / len(known) if whole else None)
    lines = [
        "| task | " + " | ".join(map(str, lengths)) + " |",
        "|---|" + "---:|" * len(lengths),
    ]
    for name, values in rows.items():
        texts = ("-" if value is None else f"{100 * value:.1f}" for value in values)
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def write_tables(
    out: Path, sweep: Sweep, cells: Sequence[Cell], facts: dict[str, Any]
) -> list[Path]:
    """Writes results.json, samples.jsonl, scores.csv and scores.md, of a part of the cells too.

    Args:
        facts: what else to say of the run, in results.json: model, versions.

    Returns:
        The files.

    Raises:
        ConfigError: one cannot be written.
    """
    settings = {**asdict(sweep), "tasks": [asdict(task) for task in sweep.tasks]}
    rows = [
        {name: value for name, value in asdict(cell).items() if name != "answers"} for cell in cells
    ]
    results = {**facts, "settings": settings, "scores": mean_scores(cells), "cells": rows}
    samples = []
    for cell in cells:
        where = {"task": cell.task, "length": cell.length, "depth": cell.depth}
        samples += [json.dumps({**where, **asdict(answer)}) + "\n" for answer in cell.answers]
    scores = io.StringIO()
    writer = csv.DictWriter(scores, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    whole = json.dumps(results, indent=2) + "\n"
    texts = (whole, "".join(samples), scores.getvalue(), markdown_table(cells))
    paths = [out / name for name in TABLES]
    for path, text in zip(paths, texts, strict=True):
        output.write_text(path, text)
    return paths


def clear_results(out: Path) -> None:
    """Removes the files of an earlier sweep, so that its pictures do not stand beside new tables.

    Raises:
        ConfigError: one cannot be removed.
    """
    for path in result_files(out):
        with output.writing(path):
            path.unlink(missing_ok=True)


def result_files(out: Path) -> list[Path]:
    """Every file that `write_tables` and `draw_heatmaps` may write, of any sweep."""
    return [out / name for name in (*TABLES, *(f"{task}.png" for task in (OVERVIEW, *TASKS)))]


def draw_heatmaps(out: Path, sweep: Sweep, cells: Sequence[Cell]) -> list[Path]:
    """Draws overview.png, and a picture of each task whose depths are swept; returns the files.

    Raises:
        ConfigError: one cannot be written.
    """
    meaning = {
        "generate": "Share of the true answers in what the model wrote",
        "loglikelihood": "Share of the true answers of which every token was the likeliest",
    }[sweep.scoring]
    grids = {OVERVIEW: ("Long-context tests", overview(cells))}
    for task in dict.fromkeys(cell.task for cell in cells if cell.depth is not None):
        grids[task] = task, depth_grid(cells, task)
    paths = []
    for name, (title, grid) in grids.items():
        with output.writing(out / f"{name}.png"):
            paths.append(heatmap(grid, title, meaning, out / f"{name}.png"))
    return paths


def _tokens(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
