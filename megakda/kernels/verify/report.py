"""Compiles guarded cases for all architectures and keeps the figures, by version of triton."""

from __future__ import annotations

import dataclasses
import importlib
import json
import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megakda.kernels.verify import budget

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
PRODUCTION = "megakda.kernels.verify.production"

Record = dict[str, Any]


@dataclasses.dataclass
class Report:
    """What `compile_cases` found.

    Attributes:
        versions: of triton, ptxas and torch.
        launches: figures of every compiled kernel: those of `aot.Compiled`, and its case.
        problems: sentences on what is over budget.
    """

    versions: dict[str, str]
    launches: list[Record]
    problems: list[str]


def find_cases(module: str, only: Sequence[str] = ()) -> list[budget.Case]:
    """The list CASES of a module, or those of them that are named.

    Raises:
        ValueError: a name that is not there.
    """
    cases = importlib.import_module(module).CASES
    unknown = set(only) - {case.name for case in cases}
    if unknown:
        raise ValueError(
            f"no case {', '.join(sorted(unknown))}; there are {', '.join(c.name for c in cases)}"
        )
    return [case for case in cases if not only or case.name in only]


def compile_cases(
    module: str = PRODUCTION,
    only: Sequence[str] = (),
    architectures: Sequence[str] = ARCHITECTURES,
    jobs: int = 2,
) -> Report:
    """Compiles the cases of `module`. None of this must happen under TRITON_INTERPRET=1.

    Args:
        module: one with a list CASES of `budget.Case`.
        only: names of cases; empty for all.
        architectures: keys of `gpu.GPUS`.
        jobs: how many processes; 1 is this one.

    Raises:
        ValueError: an unknown case.
    """
    work = [
        (module, case.name, name) for case in find_cases(module, only) for name in architectures
    ]
    if jobs == 1:
        versions, *results = map(_work, [None, *work])
    else:
        with multiprocessing.get_context("spawn").Pool(jobs) as pool:
            versions, *results = pool.map(_work, [None, *work], chunksize=1)
    launches, problems = [], []
    for some_launches, some_problems in results:
        launches += some_launches
        problems += some_problems
    return Report(versions, launches, problems)


def _work(task: tuple[str, str, str] | None) -> Any:
    from megakda.kernels.verify import aot

    if task is None:
        return aot.versions()
    module, name, architecture = task
    [case] = find_cases(module, [name])
    failed = None
    with aot.compiling(architecture, keep_going=True) as compiled:
        try:
            case.run()
        except Exception as error:
            failed = f"{name}, {architecture}: {type(error).__name__}: {error}"
    launches = [{"case": name, **dataclasses.asdict(entry)} for entry in compiled]
    return launches, [failed] if failed else budget.over_budget(case, architecture, compiled)


def read(path: Path) -> dict[str, Any]:
    """Reports written earlier, by version of triton; none if there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, report: Report) -> None:
    """Puts the report into the JSON file, in place of the one of the same triton, one launch a
    line, and all that are in it into a Markdown file beside it."""
    reports = read(path)
    launches = [{k: v for k, v in x.items() if k != "seconds"} for x in report.launches]
    reports[report.versions["triton"]] = {"versions": report.versions, "launches": launches}
    reports = dict(sorted(reports.items()))
    parts = []
    for version, content in reports.items():
        lines = ",\n".join(f"   {json.dumps(launch)}" for launch in content["launches"])
        parts.append(
            f' "{version}": {{\n  "versions": {json.dumps(content["versions"])},\n'
            f'  "launches": [\n{lines}\n  ]\n }}'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    path.with_suffix(".md").write_text(markdown(reports))


def compare(path: Path, report: Report) -> list[str]:
    """Sentences on what is worse than the report in the file, made with the same triton."""
    version = report.versions["triton"]
    recorded = read(path).get(version)
    if recorded is None:
        return [f"{path.name} has no figures of triton {version}; write them without --check"]
    cases = {launch["case"] for launch in report.launches}
    architectures = {launch["architecture"] for launch in report.launches}
    comparable = [
        launch
        for launch in recorded["launches"]
        if launch["case"] in cases and launch["architecture"] in architectures
    ]
    return budget.regressions(comparable, report.launches)


def markdown(reports: dict[str, Any]) -> str:
    """All reports as tables."""
    lines = [
        "# What the compiler makes of the kernels",
        "",
        "Written by `tools/kernel_report.py`, without a GPU. Registers and spilled bytes (stored,",
        "loaded) are per thread, shared memory is KiB per block, warps are those a multiprocessor",
        "holds at once; matrix instructions are wgmma on sm_90, mma on sm_80, tcgen05 on sm_100.",
    ]
    for version in reversed(reports):
        content = reports[version]
        ptxas, torch = (content["versions"][name] for name in ("ptxas", "torch"))
        lines += ["", f"## triton {version} (ptxas {ptxas}, torch {torch})"]
        for architecture in dict.fromkeys(x["architecture"] for x in content["launches"]):
            lines += ["", f"### {architecture}", "", *_table(content["launches"], architecture)]
    return "\n".join(lines) + "\n"


def _table(launches: Sequence[Record], architecture: str) -> list[str]:
    lines = [
        "| case | kernel | constants | warps, stages | registers | spills | shared | warps per SM "
        "| matrix |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for x in launches:
        if x["architecture"] != architecture:
            continue
        constants = ", ".join(
            name if value is True else f"{name} {value}"
            for name, value in x["constexprs"].items()
            if value is not False
        )
        warps = f"{x['num_warps']}, {x['num_stages']}"
        if x["error"] is not None:
            figures = f"{x['error'].splitlines()[0]} | | | |"
        else:
            matrix = {
                name: n
                for name, n in x["instructions"].items()
                if name in ("HGMMA", "HMMA", "UTCHMMA")
            }
            spills = f"{x['spill_stores']}, {x['spill_loads']}" if x["spill_stores"] else "0"
            figures = (
                f"{x['registers']} | {spills} | {x['shared'] / 1024:.1f} "
                f"| {x['blocks_per_sm'] * x['num_warps']} "
                f"| {', '.join(f'{n} {name}' for name, n in matrix.items())}"
            )
        lines.append(f"| {x['case']} | {x['kernel']} | {constants} | {warps} | {figures} |")
    return lines
