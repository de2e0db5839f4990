"""Peak memory of one side on the CPU, as JSON on the last line: run by `measure`, one process each.

python -m megakda.kernels.verify.bench.peak '{"side": ..., "shape": ..., "gate": ..., "dtype": ...,
"threads": ...}'
"""

from __future__ import annotations

import json
import sys

import torch

from megakda.kernels.verify.bench import agreement
from megakda.kernels.verify.bench.measure import cpu_peak
from megakda.kernels.verify.bench.problems import make_problem, parse_shape, small_shape
from megakda.kernels.verify.bench.sides import find_sides


def main(argument: str) -> None:
    task = json.loads(argument)
    torch.set_num_threads(task["threads"])
    [side] = find_sides([task["side"]])
    shape, dtype = parse_shape(task["shape"]), getattr(torch, task["dtype"])
    options = {"dtype": dtype, "scalar_decay": side.family == "gdn"}
    # What is loaded and set up only once does not count.
    warm = make_problem(small_shape(shape), task["gate"], **options).with_gradients()
    agreement.results(side.prepare(warm), warm.do, side.backward)
    problem = make_problem(shape, task["gate"], **options).with_gradients()
    run = side.prepare(problem)
    peaks = {"forward": cpu_peak(lambda: agreement.results(run, problem.do, False))}
    if side.backward:
        peaks["both"] = cpu_peak(lambda: agreement.results(run, problem.do, True))
    print(json.dumps(peaks))


if __name__ == "__main__":
    main(sys.argv[1])
