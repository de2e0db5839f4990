"""What is wrong with stages is said before any work."""

from typing import Any

import pytest

from megakda.errors import ConfigError
from tests.config.staged import derived_of, fall

ONE, WARM = fall(steps=1), {"kind": "warmup", "steps": 1}

ERRORS: dict[str, tuple[list[Any], list[str], list[str]]] = {
    "unknown kind": (
        [{"kind": "cosin", "steps": 1}],
        [],
        ["schedule.stages[0].kind=cosin", "did you mean cosine", "minus_sqrt"],
    ),
    "no kind": ([{"steps": 1}], [], ["schedule.stages[0].kind=None"]),
    "unknown key": (
        [WARM, fall(steps=1, contxt=3)],
        [],
        ["schedule.stages[1].contxt", "did you mean context"],
    ),
    "no mapping": (["warmup"], [], ["schedule.stages[0]='warmup'", "mapping"]),
    "no stages": ([], [], ["schedule.stages=[]"]),
    "two lengths": ([fall(steps=1, tokens=512)], [], ["steps=1 and tokens=512", "one length"]),
    "length of half a step": (
        [WARM, fall(tokens=200)],
        [],
        ["schedule.stages[1] (linear) has 200 tokens", "8 x 64 = 512"],
    ),
    "a growing batch that does not get to its end": (
        [WARM, fall(tokens=1000, batch={"from": 4, "to": 16})],
        [],
        ["schedule.stages[1] (linear) has 1,000 tokens", "16 x 64 = 1,024", "batch.to"],
    ),
    "fraction of a step": ([fall(steps=1.5)], [], ["schedule.stages[0].steps=1.5", "whole"]),
    "negative tokens": ([fall(tokens=-1e9)], [], ["schedule.stages[0].tokens=-1000000000.0"]),
    "a word for a number": ([fall(steps="ten")], [], ["schedule.stages[0].steps='ten'"]),
    "two open stages": ([fall(), WARM, fall()], [], ["stages[0] and schedule.stages[2] have no"]),
    "an open stage in an open run": (
        [WARM, fall()],
        [],
        ["schedule.stages[1] has no length", "train.steps", "train.tokens"],
    ),
    "nothing left": (
        [{"kind": "warmup", "steps": 9}, fall()],
        ["train.steps=9"],
        ["schedule.stages[1] (linear)", "train.steps=9", "they take 9"],
    ),
    "steps that do not add up": (
        [{"kind": "warmup", "steps": 2}, fall(steps=3)],
        ["train.steps=9"],
        ["5 steps (warmup 2 + linear 3)", "train.steps=9", "set train.steps=5 or null"],
    ),
    "tokens that do not add up": (
        [{"kind": "warmup", "steps": 2}, fall(tokens=3.0e3)],
        ["train.tokens=9.0e3"],
        ["4,024 tokens (warmup 1,024 + linear 3,000)", "train.tokens=9,000", "train.tokens=4024"],
    ),
    "a fall to nowhere": (
        [{"kind": "cosine", "steps": 1}],
        [],
        ["schedule.stages[0] (cosine)", "`to`"],
    ),
    "a negative rate": ([fall(steps=1) | {"to": -1}], [], ["schedule.stages[0].to=-1"]),
    "a warmup to nothing": ([WARM | {"to": 0}], [], ["schedule.stages[0].to=0", "warmup"]),
    "a rate of nothing": (
        [fall(steps=1) | {"to": 0}, {"kind": "constant", "steps": 1}],
        [],
        ["schedule.stages[1] (constant)", "learning rate 0"],
    ),
    "a budget of nothing": ([ONE], ["train.tokens=0"], ["train.tokens=0"]),
    "a batch by DP x micro-batch": (
        [ONE, fall(steps=1, batch=6)],
        [],
        ["schedule.stages[1].batch=6", "train.micro_batch = 2 x 2 = 4", "batch=4"],
    ),
    "a micro-batch of a stage": (
        [fall(steps=1, micro_batch=3)],
        [],
        ["train.global_batch=8", "schedule.stages[0].micro_batch = 2 x 3 = 6"],
    ),
    "the end of a growing batch": (
        [fall(steps=1, batch={"from": 4, "to": 10})],
        [],
        ["schedule.stages[0].batch.to=10", "2 x 2 = 4", "batch.to=8"],
    ),
    "how a batch grows": (
        [fall(steps=1, batch={"from": 4, "to": 12, "by": 6})],
        [],
        ["schedule.stages[0].batch.by=6", "the 8 that the batch grows by"],
    ),
    "by how much a batch grows": (
        [fall(steps=1, batch={"from": 4, "to": 8, "by": 1})],
        [],
        ["schedule.stages[0].batch.by=1", "2 x 2 = 4", "batch.by=4"],
    ),
    "a batch that shrinks": ([fall(steps=1, batch={"from": 8, "to": 4})], [], ["cannot fall"]),
    "half a growing batch": ([fall(steps=1, batch={"to": 4})], [], ["{'to': 4}", "from: 64"]),
    "micro-batches when interleaved": (
        [fall(steps=1, batch=6)],
        ["parallel=pp2_vpp2"],
        ["schedule.stages[0].batch=6 makes 3", "schedule.stages[0].batch=8"],
    ),
    "a context by its segments": (
        [ONE, fall(steps=1, context=66)],
        ["parallel.context=2"],
        ["schedule.stages[1].context=66", "multiple of 4", "schedule.stages[1].context=64"],
    ),
    "packing of a stage": (
        [ONE, fall(steps=1, data={"packing": "best_fit", "overlong": "carry"})],
        [],
        ["schedule.stages[1].data.overlong=carry", "schedule.stages[1].data.packing=best_fit"],
    ),
    "a choice in the data of a stage": (
        [fall(steps=1, data={"packing": "loose"})],
        [],
        ["schedule.stages[0].data.packing=loose", "best_fit"],
    ),
    "an unknown key of the data": (
        [fall(steps=1, data={"path": ["a"]})],
        [],
        ["schedule.stages[0].data.path", "did you mean paths"],
    ),
    "a type in the data": (
        [fall(steps=1, data={"weights": ["many"]})],
        [],
        ["schedule.stages[0].data.weights", "many"],
    ),
    "another tokenizer": (
        [fall(steps=1, data={"tokenizer": "byte"})],
        [],
        ["schedule.stages[0].data.tokenizer", "data.tokenizer"],
    ),
    "workers of a stage": (
        [fall(steps=1, data={"num_workers": 2})],
        [],
        ["schedule.stages[0].data.num_workers", "set data.num_workers"],
    ),
    "a bias rate without experts": (
        [fall(steps=1, expert_bias_rate=0.0)],
        ["model.ffn=dense"],
        ["schedule.stages[0].expert_bias_rate=0", "model.ffn=dense"],
    ),
    "a negative bias rate": (
        [fall(steps=1, expert_bias_rate=-1.0)],
        [],
        ["schedule.stages[0].expert_bias_rate=-1.0"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_name_the_stage_the_rule_and_the_remedy(case):
    stages, overrides, expected = ERRORS[case]
    with pytest.raises(ConfigError) as caught:
        derived_of(*stages, ranks=2, overrides=overrides)
    for text in expected:
        assert text in str(caught.value)
