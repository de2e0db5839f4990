"""Context parallelism in the real trainer against one rank: the matrix of all choices.

`make test` runs a selection in which every pair of choices meets; `make test-parity` runs all of
them (`-m parity`). The model is dense, so that sequence parallelism can be off; mixtures of experts
follow below, and in `test_layouts.py`.
"""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.parallel import context_jobs

STEPS = 3
TOLERANCE = 1e-5

CHOICES = {
    "context": [2, 3, 4],
    "mode": ["state", "heads", "two_level"],
    "layout": ["contiguous", "zigzag"],
    "documents": list(context_jobs.DOCUMENTS),
    "tensor": ["1", "2", "2_no_sp"],
    "recompute": ["none", "full"],
    "attention": ["all_gather", "ring"],
}
HEADS = {2: 4, 3: 6, 4: 8}  # per tensor-parallel rank a multiple of the context-parallel ones
Case = tuple[object, ...]


def selection() -> list[Case]:
    """A few cases in which every pair of choices meets: greedily, the one with most new pairs."""
    cases = list(product(*CHOICES.values()))
    pairs = {case: set(combinations(enumerate(case), 2)) for case in cases}
    missing = set().union(*pairs.values())
    chosen = []
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        missing -= pairs[best]
        chosen.append(best)
    return chosen


SELECTED = selection()
ALL = [
    pytest.param(*case, marks=() if case in set(SELECTED) else pytest.mark.parity)
    for case in product(*CHOICES.values())
]


@pytest.fixture(scope="module")
def one_rank(ranks, corpus):
    """The same run on one rank; computed once each."""
    cache = {}

    def reference(model, bounds, rows=1, global_batch=2):
        key = (*model, *bounds, rows, global_batch)
        if key not in cache:
            args = (list(model), corpus, bounds, STEPS, rows, global_batch)
            cache[key] = ranks.run(1, context_jobs.train_documents, *args)[0]
        return cache[key]

    return reference


def check(found, expected):
    for key in ("loss", "grad_norm"):
        assert found[key] == pytest.approx(expected[key], rel=TOLERANCE, abs=0)
    for key in ("gradients", "ends"):
        assert key == "ends" or found[key].keys() == expected[key].keys()
        for name in found[key]:
            theirs = expected[key][name]
            error = (found[key][name] - theirs).norm() / theirs.norm().clamp_min(1e-12)
            assert error < TOLERANCE, f"{name}: relative error {error:.2e}"


def parallel(context, mode, layout, tensor, recompute, attention):
    overrides = [
        f"parallel.context={context}",
        f"parallel.context_mode={mode}",
        f"parallel.context_layout={layout}",
        f"parallel.tensor={tensor[0]}",
        f"parallel.sequence={'false' if tensor == '2_no_sp' else 'true'}",
        f"parallel.recompute={recompute}",
        f"parallel.context_attention={attention}",
    ]
    if mode == "two_level":
        overrides.append(f"parallel.context_heads={3 if context == 3 else 2}")
    return overrides


@pytest.mark.parametrize(list(CHOICES), ALL)
def test_matrix(
    ranks, corpus, one_rank, context, mode, layout, documents, tensor, recompute, attention
):
    model = ["model.ffn=dense", f"model.num_heads={HEADS[context]}"]
    bounds = context_jobs.DOCUMENTS[documents]
    overrides = [*model, *parallel(context, mode, layout, tensor, recompute, attention)]
    world = context * int(tensor[0])
    args = (overrides, corpus, bounds, STEPS)
    found = ranks.run(world, context_jobs.train_documents, *args, global_batch=1)[0]
    check(found, one_rank(model, bounds, global_batch=1))


def test_the_selection_covers_every_pair():
    found = set().union(*(combinations(enumerate(case), 2) for case in SELECTED))
    assert found == set().union(
        *(combinations(enumerate(case), 2) for case in product(*CHOICES.values()))
    )


TWO_ROWS = [0, 7, 40, 48, 50, 96]
# ranks, overrides, bounds, rows
OTHERS = {
    "experts": (2, ["parallel.context=2", "parallel.expert=2"], [0, 7, 19, 33, 48], 1),
    "experts_tp": (
        4,
        ["parallel.context=2", "parallel.tensor=2", "parallel.expert=4"],
        [0, 5, 25, 26, 45, 48],
        1,
    ),
    # Ranks without a single real token
    "mostly_padding": (4, ["parallel.context=4", "parallel.expert=2"], [0, 4, 48], 1),
    "pipeline": (4, ["parallel.context=2", "parallel.pipeline=2"], [0, 3, 46, 48], 1),
    "everything": (
        8,
        [
            *(
                "parallel.context=2",
                "parallel.tensor=2",
                "parallel.pipeline=2",
                "parallel.expert=4",
            ),
            "parallel.recompute=full",
        ],
        [0, 5, 25, 26, 45, 48],
        1,
    ),
    "interleaved": (
        4,
        ["parallel.context=2", "parallel=pp2_vpp2", "parallel.recompute=full"],
        [0, 7, 19, 33, 48],
        1,
    ),
    "pipeline_tp_packed": (4, ["parallel=tp2_pp2"], [0, 7, 19, 33, 48], 1),
    "selective": (2, ["parallel.context=2", "parallel.recompute=selective"], [0, 3, 46, 48], 1),
    "two_rows": (2, ["parallel.context=2"], TWO_ROWS, 2),
    "two_rows_ring": (3, ["parallel.context=3", "parallel.context_attention=ring"], TWO_ROWS, 2),
    "packed_alone_tp": (2, ["parallel=tp2"], TWO_ROWS, 2),
}


@pytest.mark.parametrize("case", OTHERS)
def test_mixture_of_experts(ranks, corpus, one_rank, case):
    world, overrides, bounds, rows = OTHERS[case]
    args = (overrides, corpus, bounds, STEPS, rows)
    found = ranks.run(world, context_jobs.train_documents, *args)[0]
    check(found, one_rank([], bounds, rows))


GROUPS = ["parallel.recompute=full", "parallel.recompute_head_groups=2"]
VARIANTS = {
    "gdn": ["model.linear.mixer=gdn"],
    "gdn_in_head_groups": ["model.linear.mixer=gdn", *GROUPS],
    "head_groups": [*GROUPS, "model.linear.output_gate=none"],
    "rope": ["model.pattern='1:1'", "model.mla.rope=true"],
    "no_convolution": ["model.linear.conv_kernel=0"],
    "long_convolution": ["model.linear.conv_kernel=8"],  # longer than a segment
    "full_attention": ["model.pattern='0:1'"],
    "all_kda": ["model.pattern='1:0'"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(ranks, corpus, one_rank, variant):
    model = ["model.ffn=dense", *VARIANTS[variant]]
    bounds = context_jobs.DOCUMENTS["uneven"]
    overrides = [*model, "parallel.context=4", "parallel.context_mode=state"]
    args = (overrides, corpus, bounds, STEPS)
    found = ranks.run(4, context_jobs.train_documents, *args)[0]
    check(found, one_rank([o for o in model if "recompute" not in o], bounds))
