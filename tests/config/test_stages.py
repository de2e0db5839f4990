"""Stages: what they may say, and the timetable of steps that follows."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megakda.config import compose, validate
from megakda.config.schema import ScheduleConfig
from megakda.config.stages import read_stages, summary, unread_settings
from megakda.config.timetable import Timetable
from megakda.errors import ConfigError
from tests.config.staged import STEP, WHOLE, composed, config_of, fall, timetable_of


def rates(timetable: Timetable) -> list[float]:
    return [timetable.at(step).lr for step in range(timetable.steps)]


def cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * done))


# A stage of three steps from 0.8 to 0.2. Notches: a fall is at its end one step after its last one.
RATES = {
    "warmup": ({"to": 0.2}, [0.6, 0.4, 0.2]),
    "constant": ({}, [0.8, 0.8, 0.8]),
    "linear": ({"to": 0.2}, [0.65, 0.5, 0.35]),
    "cosine": ({"to": 0.2}, [0.2 + 0.6 * cosine(n / 4) for n in (1, 2, 3)]),
    "exponential": ({"to": 0.2}, [0.2 + 0.6 * (2 * 0.5 ** (n / 4) - 1) for n in (1, 2, 3)]),
    "minus_sqrt": ({"to": 0.2}, [0.2 + 0.6 * (1 - math.sqrt(n / 4)) for n in (1, 2, 3)]),
}


@pytest.mark.parametrize("kind", RATES)
@pytest.mark.parametrize("length", ["steps", "tokens"])
def test_rates_inside_and_at_the_borders(kind, length):
    said, expected = RATES[kind]
    stage = {"kind": kind, length: 3 if length == "steps" else 3 * STEP, **said}
    timetable = timetable_of(
        {"kind": "warmup", "steps": 2, "to": 0.8}, stage, {"kind": "constant"}, **OPEN
    )
    after = 0.8 if kind == "constant" else 0.2
    assert rates(timetable) == pytest.approx([0.4, 0.8, *expected, after, after], rel=1e-12)
    assert [timetable.at(step).stage.number for step in range(7)] == [1, 1, 2, 2, 2, 3, 3]
    borders = [tokens for tokens in range(0, timetable.tokens, STEP // 2)]
    assert [timetable.lr_at(tokens) for tokens in borders[::2]] == rates(timetable)
    assert [timetable.lr_at(tokens) for tokens in borders[1::2]] == rates(timetable)
    assert timetable.lr_at(STEP - 1) == timetable.at(0).lr != timetable.lr_at(STEP)
    with pytest.raises(ValueError, match=r"must be in 0\.\.3583"):
        timetable.lr_at(timetable.tokens)


OPEN: dict[str, Any] = {"overrides": ["train.steps=7"]}


def test_the_first_stage_and_stages_that_rise():
    fall = {"kind": "linear", "steps": 1, "to": 0.5}
    assert rates(timetable_of(fall, fall)) == [
        0.75,
        0.5,
    ]  # from optim.lr=1, where there is no warmup
    assert rates(timetable_of({"kind": "warmup", "steps": 2})) == [0.5, 1.0]
    again = {"kind": "warmup", "steps": 2, "to": 0.9}
    assert rates(timetable_of(fall, again)) == pytest.approx([0.75, 0.7, 0.9])
    rise = {"kind": "linear", "steps": 1, "to": 1.5}
    assert rates(timetable_of(fall, rise)) == [0.75, 1.0]
    jump = {"kind": "constant", "steps": 2, "to": 0.1}
    assert rates(timetable_of(fall, jump)) == [0.75, 0.1, 0.1]


@pytest.mark.parametrize(
    "shorthand",
    [
        ("style=wsd", "warmup_steps=3", "decay_steps=4", "decay_shape=minus_sqrt", "min_lr=0.1"),
        ("style=cosine", "warmup_steps=3", "min_lr=0.1"),
        ("style=linear",),
        ("style=constant", "warmup_steps=3"),
        ("style=wsd", "warmup_steps=30"),
    ],
)
def test_the_shorthand_stands_for_stages(shorthand):
    said = [f"schedule.{setting}" for setting in ("warmup_steps=0", *shorthand)]
    derived = validate(compose([*WHOLE, *said, "train.steps=20"]), 2)
    steps = {"style=wsd": (3, 13, 4), "style=cosine": (3, 17), "style=linear": (20,)}
    expected = steps.get(shorthand[0], (3, 17)) if "warmup_steps=30" not in shorthand else (20,)
    assert tuple(stage.steps for stage in derived.timetable.stages) == expected
    assert (derived.steps, derived.total_tokens) == (20, 20 * STEP)
    assert len(derived.timetable.streams) == 1 and derived.timetable.streams[0].sequences == 20 * 8
    assert [line for line in derived.lines(compose(WHOLE)) if "micro-batches 2 = " in line]
    # The same run by its tokens
    tokens = [*WHOLE, *said, "train.steps=null", f"train.tokens={20 * STEP + 100}"]
    assert validate(compose(tokens), 2).timetable == derived.timetable


def test_a_shorthand_needs_one_length():
    with pytest.raises(ConfigError, match=r"train\.steps=null and train\.tokens=null"):
        validate(compose([*WHOLE, "train.steps=null"]), 1)
    with pytest.raises(ConfigError, match=r"train\.steps=3 of 512 tokens are 1,536 tokens, not"):
        validate(compose([*WHOLE, "train.steps=3", "train.tokens=4000"]), 1)


def test_the_open_stage_takes_the_rest():
    stages = {"kind": "warmup", "steps": 5}, {"kind": "constant"}, fall(tokens=10 * STEP)
    by_steps = timetable_of(*stages, overrides=["train.steps=40"])
    by_tokens = timetable_of(*stages, overrides=[f"train.tokens={40 * STEP}"])
    assert by_steps == by_tokens
    assert [stage.steps for stage in by_steps.stages] == [5, 25, 10]


def test_tokens_are_rounded_to_whole_steps_once():
    """Each border is at the step nearest to it; roundings do not add up."""
    timetable = timetable_of(*[fall(tokens=1.4 * STEP * 5) for _ in range(5)])  # 7 steps each
    assert [stage.steps for stage in timetable.stages] == [7] * 5
    timetable = timetable_of(
        *[fall(tokens=int(2.4 * STEP)) for _ in range(5)]
    )  # borders 2.4, 4.8, 7.2, ...
    assert [stage.first_step for stage in timetable.stages] == [0, 2, 5, 7, 10]
    assert timetable.steps == 12
    # A stage in steps has those, and passes on what the one before it lacks.
    timetable = timetable_of(
        fall(tokens=int(2.4 * STEP)), fall(steps=2), fall(tokens=int(2.4 * STEP))
    )
    assert [stage.steps for stage in timetable.stages] == [2, 2, 3]


def test_a_batch_that_grows():
    """From 4 to 16 in multiples of 2 ranks x 2, each size for a quarter of the tokens."""
    grows = {"batch": {"from": 4, "to": 16}}
    timetable = timetable_of(
        {"kind": "warmup", "tokens": 200 * STEP, **grows}, fall(steps=3), ranks=2
    )
    (stage, _) = timetable.stages
    assert [size.global_batch for size in stage.sizes] == [4, 8, 12, 16]
    for size in stage.sizes:
        assert size.steps * size.global_batch * 64 == pytest.approx(50 * STEP, abs=STEP)
    batches = [timetable.at(step).global_batch for step in range(timetable.steps)]
    assert batches == sorted(batches[:-3]) + [8] * 3
    assert [timetable.at(step).micro_batches for step in (0, stage.steps - 1)] == [1, 4]
    assert stage.tokens == pytest.approx(200 * STEP, abs=STEP)
    # The rate follows the tokens, not the steps.
    for step in range(0, stage.steps, 7):
        now = timetable.at(step)
        done = now.tokens_before + now.global_batch * 64
        assert now.lr == pytest.approx(done / stage.tokens, rel=1e-12)
    assert timetable.at(stage.steps - 1).lr == 1.0
    by = {"batch": {"from": 4, "to": 16, "by": 6}, "micro_batch": 1}
    coarse = timetable_of({"kind": "warmup", "tokens": 200 * STEP, **by}, ranks=2).stages[0]
    assert [size.global_batch for size in coarse.sizes] == [4, 10, 16]
    # In steps, and in the multiples of an interleaved pipeline
    pipeline = ["parallel=pp2_vpp2"]
    steps = timetable_of({"kind": "warmup", "steps": 50, **grows}, ranks=2, overrides=pipeline)
    assert steps.steps == 50
    assert [size.global_batch for size in steps.stages[0].sizes] == [4, 8, 12, 16]
    assert (
        timetable_of({"kind": "warmup", "steps": 2, **grows}).steps == 2
    )  # fewer steps than sizes


def test_a_short_stage_whose_batch_grows_keeps_to_its_length():
    """One step of the last batch, less of the others, and within half of that step."""
    step = 64 * 64
    for length in (step, 3 * step // 2, 5 * step):
        timetable = timetable_of(
            {"kind": "warmup", "tokens": length, "batch": {"from": 8, "to": 64}},
            {"kind": "constant", "tokens": length},
        )
        assert timetable.stages[0].batch == 64
        assert timetable.stages[0].tokens == pytest.approx(length, abs=step / 2)
        assert timetable.tokens == pytest.approx(2 * length, abs=STEP / 2)


def test_a_stage_after_much_longer_steps_has_a_step():
    long = {"kind": "warmup", "tokens": 96 * 64, "batch": 64}  # 1.5 steps, so 2
    timetable = timetable_of(
        long, {"kind": "constant", "tokens": STEP}, {"kind": "constant", "steps": 1}
    )
    assert [stage.steps for stage in timetable.stages] == [2, 1, 1]


def test_what_a_stage_changes_is_its_own():
    longer = {"context": 128, "batch": 4, "micro_batch": 1, "expert_bias_rate": 0.0}
    timetable = timetable_of(fall(steps=2), fall(steps=2, **longer), fall(steps=2), ranks=2)
    seen = [timetable.at(step) for step in (1, 3, 5)]
    assert [now.context for now in seen] == [64, 128, 64]
    assert [(now.global_batch, now.micro_batch, now.micro_batches) for now in seen] == [
        (8, 2, 2),
        (4, 1, 2),
        (8, 2, 2),
    ]
    assert [now.expert_bias_rate for now in seen] == [1e-3, 0.0, 1e-3]
    # The third stage goes on in the data of the first.
    assert [stage.stream for stage in timetable.stages] == [0, 1, 0]
    assert [stream.sequences for stream in timetable.streams] == [32, 8]
    assert timetable.longest_context == 128
    assert timetable.streams_from(4).keys() == {0} and timetable.streams_from(0).keys() == {0, 1}


def test_data_of_a_stage():
    config = config_of(
        fall(steps=1),
        fall(steps=1, data={"paths": ["b", "c"], "packing": "documents"}),
        fall(steps=1, data={"weights": [1.0, 2.0]}),
        overrides=("data.paths=[x,y]", "data.weights=[0.5,0.5]"),
    )
    first, second, third = (stream.data for stream in validate(config, 1).timetable.streams)
    assert first == config.data
    assert (second.paths, second.weights, second.packing) == (["b", "c"], None, "documents")
    assert (third.paths, third.weights) == (["x", "y"], [1.0, 2.0])
    assert second.split == config.data.split


def test_only_what_decides_the_sequences_makes_a_stream():
    timetable = timetable_of(
        fall(steps=1),
        fall(steps=1, data={"cache": "/tmp/elsewhere", "paths": ["corpus/a"]}),
        fall(steps=1, data={"split": [90.0, 10.0, 0.0]}),
        overrides=("data.prepare=stdlib",),
    )
    assert [stage.stream for stage in timetable.stages] == [0, 0, 1]


def test_an_end_that_is_passed():
    """Whoever steps on beyond the end trains as in the last step."""
    timetable = timetable_of({"kind": "warmup", "steps": 2}, fall(steps=2))
    last, past = timetable.at(3), timetable.at(5)
    assert (past.lr, past.step, past.tokens_before) == (last.lr, 5, 5 * STEP)


def test_what_a_person_reads():
    config = config_of(
        {"kind": "warmup", "steps": 2, "batch": {"from": 4, "to": 8}},
        fall(tokens=16 * STEP, context=128, batch=4),
    )
    derived = validate(config, 2)
    assert derived.lines(config)[2:] == [
        "stage 1 warmup, steps 2, tokens 768, rate 0 -> 1, context 64, batch 4 -> 8, micro-batch 2",
        "stage 2 linear, steps 16, tokens 8,192, rate 1 -> 0.1, context 128, batch 4, "
        "micro-batch 2",
        "tokens in all 8,960 in 18 steps",
    ]
    assert summary(config) == "warmup to 1 for 2 steps, linear to 0.1 for 8,192 tokens"


def test_what_stages_change_stands_in_the_table():
    blend = {"paths": ["x", "y"], "weights": [1.0, 2.5], "packing": "documents"}
    first, second = timetable_of(
        fall(steps=1), fall(steps=1, expert_bias_rate=0.0, data=blend, micro_batch=1)
    ).rows()
    assert (first["bias-rate"], second["bias-rate"]) == ("0.001", "0")
    assert first["data"] == "paths=corpus/a weights=null packing=none"
    assert second["data"] == "paths=x,y weights=1,2.5 packing=documents"


def test_a_short_form_beside_stages_is_named():
    assert composed(()).schedule == ScheduleConfig()  # so that its defaults are what nobody said
    config = config_of(fall(steps=1))
    assert unread_settings(config) is None
    said = config_of(fall(steps=1), overrides=("schedule=cosine", "schedule.warmup_steps=2000"))
    note = unread_settings(said)
    assert note is not None
    assert "schedule.style=cosine, schedule.warmup_steps=2000 are not read" in note
    assert "schedule.stages=null" in note
    assert validate(said, 1).lines(said)[-1] == f"note: {note}"
    said.schedule.stages = None
    assert unread_settings(said) is None


def test_stages_from_the_command_line():
    stages = "[{kind:warmup,tokens:1e3,batch:{from:2,to:8}},{kind:cosine,steps:2,to:1e-4}]"
    config = compose([*WHOLE, "train.steps=null", f"schedule.stages={stages}"])
    first, second = read_stages(config)
    assert (first.tokens, first.batch, second.to) == (1000, (2, 8), 1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(sorted(RATES)),
            st.booleans(),
            st.integers(1, 20),
            st.sampled_from([32, 64, 128]),
            st.integers(1, 4),
            st.integers(0, 5),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_a_plan_is_one_run(drawn):
    """Stages follow one another without gaps; a token and its step find each other."""
    stages = []
    for kind, in_steps, length, context, batch, growth in drawn:
        size: Any = 4 * batch
        if growth:
            size = {"from": 4 * batch, "to": 4 * (batch + growth)}
        unit = (
            {"steps": length} if in_steps else {"tokens": length * 4 * (batch + growth) * context}
        )
        stages.append({"kind": kind, "to": 0.5, "context": context, "batch": size, **unit})
    timetable = timetable_of(*stages, ranks=2)
    assert timetable.steps == sum(stage.steps for stage in timetable.stages)
    assert all(stage.steps > 0 and stage.tokens > 0 for stage in timetable.stages)
    for stage, said in zip(timetable.stages, stages, strict=True):
        assert stage.batch == said["batch"]["to"] if isinstance(said["batch"], dict) else True
        assert stage.steps == said.get("steps", stage.steps)
    token = 0
    for step in range(timetable.steps):
        now = timetable.at(step)
        assert now.tokens_before == token
        assert now.micro_batches * 2 * now.micro_batch == now.global_batch
        assert timetable.step_at(token) == step
        token += now.global_batch * now.context
        assert timetable.step_at(token - 1) == step
        assert 0 < now.lr <= 1.0
    assert token == timetable.tokens
    # Roundings do not add up.
    asked = sum(
        said.get("tokens", stage.tokens)
        for stage, said in zip(timetable.stages, stages, strict=True)
    )
    assert abs(token - asked) < max(stage.batch * stage.context for stage in timetable.stages)
    assert sum(s.sequences * s.context for s in timetable.streams) == token
