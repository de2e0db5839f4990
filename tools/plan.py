#!/usr/bin/env python3
"""Says what a run needs and how long it takes on a cluster, without a GPU.

Memory per GPU, messages by link, time of a step, MFU, GPU-hours and days; with --search the best
layouts. Layers run on the meta device, as on a GPU but without memory; rates of machines and how
much of them is reached are in recipes/cluster. docs/planner.md says how each number comes about.

python tools/plan.py experiment=pretrain/kimi_linear_48b cluster=h200x1024
python tools/plan.py experiment=pretrain/kimi_linear_48b cluster=b200x256 --search --top 5
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import megakda.runtime  # noqa: E402
from megakda.config import compose, validate  # noqa: E402
from megakda.errors import ConfigError, MegakdaError  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--search", action="store_true", help="look for the best layouts")
    parser.add_argument("--top", type=int, default=10, help="how many layouts to print")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("overrides", nargs="*", help="cluster=NAMExGPUS, and as for megakda.train")
    args = parser.parse_intermixed_args(argv)
    try:
        return _run(args)
    except MegakdaError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _run(args: argparse.Namespace) -> int:
    if args.top < 1:
        raise ConfigError(f"--top={args.top}: must be at least 1")
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise ConfigError(f"--json={args.json}: must be a file in a folder that exists")
    from megakda.plan.cluster import take_cluster

    cluster, overrides = take_cluster(args.overrides)
    config = compose(overrides)
    if not args.search:
        validate(config, cluster.gpus)  # before anything is imported that takes seconds
    megakda.runtime.install()  # whatever the run will use: no GPU is needed here
    logging.getLogger("megatron").setLevel(logging.ERROR)
    from megakda.plan import report
    from megakda.plan.planner import make_plan
    from megakda.plan.search import check_built, search

    if args.search:
        found = search(config, cluster, args.top)
        for proposal in found.proposals:
            check_built(proposal.plan)
        given = report.as_data(found.given) if found.given else None
        data = {"search": report.search_data(found), "given": given, "notes": list(found.notes)}
        print(report.describe_search(found))
        print(f"\nThe first of them:\n\n{report.describe(found.proposals[0].plan)}")
    else:
        plan = make_plan(config, cluster)
        check_built(plan)
        data = report.as_data(plan)
        print(report.describe(plan))
    if args.json is not None:
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
