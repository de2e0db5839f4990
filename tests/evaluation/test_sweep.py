"""Sweeps over lengths and depths: what is asked, how answers are scored, and the files."""

from __future__ import annotations

import csv
import json

import pytest

from megakda.data.tokenizer import load_tokenizer
from megakda.errors import ConfigError
from megakda.evaluation.heatmap import Grid, heatmap
from megakda.evaluation.sweep import (
    Sweep,
    clear_results,
    depth_grid,
    draw_heatmaps,
    markdown_table,
    matched,
    mean_scores,
    overview,
    run_sweep,
    write_tables,
)
from megakda.evaluation.synthetic import choose_tasks
from tests.evaluation.stand_ins import Constant, Reader

BYTE = load_tokenizer("byte")


def swept(engine, scoring="generate", tasks=("all",), **settings):
    settings = {"lengths": [1500, 2048], "samples": 2, "depths": [0, 0.5, 1], **settings}
    sweep = Sweep(choose_tasks(tasks), scoring=scoring, **settings)
    return sweep, run_sweep(sweep, BYTE, lambda tokens: engine)


def test_who_reads_the_text_is_right_everywhere():
    _, cells = swept(Reader(BYTE))
    assert {cell.score for cell in cells} == {1.0}
    assert len(cells) == 2 * (3 * 3 + 7)
    assert all(len(cell.answers) == 2 and cell.logprob is None for cell in cells)


def test_who_writes_nothing_is_right_nowhere():
    _, cells = swept(Constant(""))
    assert {cell.score for cell in cells} == {0.0}


def test_log_likelihoods():
    _, right = swept(Constant(rank=1), "loglikelihood")
    _, wrong = swept(Constant(rank=2), "loglikelihood")
    assert {cell.score for cell in right} == {1.0} and {cell.score for cell in wrong} == {0.0}
    assert {cell.logprob for cell in right} == {-1.0} and {cell.logprob for cell in wrong} == {-2.0}


def test_one_wrong_token_spoils_its_answer_alone():
    class Slip(Constant):
        def score(self, sequences):
            (scored,) = super().score(sequences)
            last = self.question.references[-1]
            scored[last.end - 1] = Constant(rank=7).score([[0, 5]])[0][1]
            return [scored]

    from megakda.evaluation.synthetic import make_sample

    engine = Slip()
    (task,) = choose_tasks(["needle_multivalue"])
    engine.question = make_sample(task, BYTE, 1500).questions[0]
    _, (cell,) = swept(engine, "loglikelihood", ["needle_multivalue"], lengths=[1500], samples=1)
    assert cell.score == 0.75
    assert cell.logprob == pytest.approx(-1 - 6 / 32)  # four answers of a blank and seven digits


def test_matches_are_shares_in_any_case():
    assert matched("It is a1B2, I think", ["A1b2"]) == 1
    assert matched("one and three", ["one", "two", "three", "four"]) == 0.5
    assert matched("", ["one"]) == 0


def test_engines_are_made_once_per_length():
    asked = []
    sweep = Sweep(choose_tasks(["needle_single_1", "variable_tracking"]), [2048, 900, 900], 1)

    def engine_for(tokens):
        asked.append(tokens)
        return Constant()

    seen = []
    cells = run_sweep(sweep, BYTE, engine_for, seen.append)
    assert asked == [900, 2048] and seen == cells


def test_what_cannot_be_measured_is_said_first():
    def engine_for(tokens):
        raise AssertionError("nothing may be measured")

    tasks = choose_tasks(["needle_single_1", "needle_multiquery"])
    with pytest.raises(ConfigError, match="length=300 is too short for needle_multiquery"):
        run_sweep(Sweep(tasks, [300, 4096]), BYTE, engine_for)
    for change, message in (
        ({"lengths": []}, r"lengths=\[\] must be above 0"),
        ({"lengths": [0]}, r"lengths=\[0\] must be above 0"),
        ({"samples": 0}, "samples=0 must be above 0"),
        ({"depths": [2]}, r"depths=\[2\] must be between 0 and 1"),
        ({"scoring": "guess"}, "scoring='guess' must be one of generate, loglikelihood"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_sweep(Sweep(tasks, **{"lengths": [4096], **change}), BYTE, engine_for)


class DepthReader(Reader):
    """Reads the second half of a text alone."""

    def answer(self, text):
        return super().answer("Text:" + text[len(text) // 2 :])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    engine = DepthReader(BYTE)
    names = ["needle_single_1", "needle_single_2", "needle_multikey_2"]
    sweep, cells = swept(engine, tasks=names, depths=[0, 0.25, 0.8], lengths=[1024, 1500, 3000])
    paths = write_tables(out, sweep, cells, {"model": "stand-in"})
    return out, sweep, cells, paths + draw_heatmaps(out, sweep, cells)


def test_grids_show_lengths_and_depths(written):
    cells = written[2]
    grid = depth_grid(cells, "needle_single_2")
    assert grid.columns == ["1k", "1500", "3000"] and grid.rows == ["0%", "25%", "80%"]
    assert grid.values == [[0, 0, 0], [0, 0, 0], [1, 1, 1]]
    whole = overview(cells)
    assert whole.rows == ["needle_single_1", "needle_single_2", "needle_multikey_2"]
    assert whole.columns == grid.columns
    assert whole.values[1] == pytest.approx([1 / 3] * 3)


def test_files(written):
    out, sweep, cells, paths = written
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in paths)
    results = json.loads((out / "results.json").read_text())
    assert results["model"] == "stand-in" and results["settings"]["samples"] == 2
    assert results["settings"]["tasks"][0]["name"] == "needle_single_1"
    assert len(results["cells"]) == len(cells) == 3 * (3 + 3 + 1)
    means = mean_scores(cells)
    assert results["scores"]["needle_multikey_2"]["1024"] == means["needle_multikey_2"][1024]
    with (out / "scores.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["score"]) for row in rows] == [cell.score for cell in cells]
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * len(cells)
    for line in lines:
        assert line["score"] == matched(line["output"][0], line["expected"][0])
    table = (out / "scores.md").read_text()
    assert table == markdown_table(cells)
    assert table.splitlines()[0] == "| task | 1024 | 1500 | 3000 |"
    assert "| needle_single_2 | 33.3 | 33.3 | 33.3 |" in table
    assert table.splitlines()[-1].startswith("| mean | ")


def test_a_used_folder_keeps_nothing_of_the_sweep_before(written, tmp_path):
    _, sweep, cells, paths = written
    write_tables(tmp_path, sweep, cells, {})
    assert len(draw_heatmaps(tmp_path, sweep, cells)) == 3
    others = {tmp_path / "notes.txt", tmp_path / "mine.png"}
    for path in others:
        path.touch()
    assert {path.name for path in tmp_path.iterdir()} > {path.name for path in paths}
    clear_results(tmp_path)
    assert set(tmp_path.iterdir()) == others


def test_a_part_of_a_sweep_has_gaps(written, tmp_path):
    _, sweep, cells, _ = written
    write_tables(tmp_path, sweep, cells[:8], {})
    table = (tmp_path / "scores.md").read_text().splitlines()
    assert table[2:] == [
        "| needle_single_1 | 33.3 | 0.0 |",
        "| needle_single_2 | 33.3 | - |",
        f"| needle_multikey_2 | {100 * cells[6].score:.1f} | - |",
        f"| mean | {100 * (2 / 3 + cells[6].score) / 3:.1f} | - |",
    ]
    assert overview(cells[:8]).values[1][1] is None


def test_heat_maps_are_pictures(written, monkeypatch):
    from matplotlib.image import imread

    out, _, cells, paths = written
    pictures = [path for path in paths if path.suffix == ".png"]
    names = ["overview.png", "needle_single_1.png", "needle_single_2.png"]
    assert [path.name for path in pictures] == names
    for path in pictures:
        height, width, _ = imread(path).shape
        assert 300 < height < 3000 and 500 < width < 3000

    # What is handed to matplotlib: one coloured cell and one number for each measured value.
    from matplotlib.axes import Axes

    shown, written_in = [], []
    image, text = Axes.imshow, Axes.text
    monkeypatch.setattr(Axes, "imshow", lambda ax, x, **kw: shown.append(x) or image(ax, x, **kw))
    monkeypatch.setattr(
        Axes, "text", lambda ax, x, y, s, **kw: written_in.append(s) or text(ax, x, y, s, **kw)
    )
    values = [[0.0, 1.0, None], [0.255, 0.5, 0.75]]
    grid = Grid(values, ["1k", "2k", "4k"], ["0%", "100%"], "Length", "Depth")
    heatmap(grid, "title", "meaning", out / "more" / "one.png")
    assert shown[0].shape == (2, 3) and shown[0][1, 0] == 0.255
    assert written_in == ["0", "100", "", "26", "50", "75"]
