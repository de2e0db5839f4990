"""The 48B models build at 64 and 1024 ranks, with exactly the published parameter count."""

import subprocess
import sys

import pytest

from megakda.config import compose
from megakda.models.params import count_parameters

PROGRAM = """
import sys, json
import megakda.runtime
megakda.runtime.install("cpu")
from megakda.config import compose
from megakda.models.dry_run import count_over_stages
config = compose(json.loads(sys.argv[1]))
total, ranks = count_over_stages(config, int(sys.argv[2]))
print(json.dumps({
    "total": total,
    "layers": [rank.layers for rank in ranks],
    "parameters": [rank.parameters for rank in ranks],
}))
"""

RUN = ["experiment=pretrain/kimi_linear_48b", "data.paths=[corpus]", "train.global_batch=8192"]
LAYOUTS = {
    64: [],
    1024: ["parallel.tensor=4", "parallel.expert=64"],
}


def build(overrides, ranks):
    import json

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps([*RUN, *overrides]), str(ranks)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("ranks", LAYOUTS)
def test_kimi_linear_48b_builds_with_the_exact_parameter_count(ranks):
    built = build(LAYOUTS[ranks], ranks)
    assert built["total"] == 49_122_675_072
    assert sorted(sum(built["layers"], [])) == list(range(1, 28))
    count = count_parameters(compose(["model=kimi_linear_48b"]).model)
    assert (count.total, count.active) == (49_122_675_072, 3_106_965_888)


@pytest.mark.parametrize("model", ["mla_48b", "gdn_h_48b"])
def test_baselines_of_the_same_shape_build_and_agree_with_the_closed_form(model):
    built = build([f"model={model}"], 64)
    assert built["total"] == count_parameters(compose([f"model={model}"]).model).total
