"""A plan in words and tables, and as plain data."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megakda.config.schema import OptimConfig
from megakda.models.params import count_parameters
from megakda.plan.memory import StageMemory, kda_state_bytes
from megakda.plan.planner import Phase, RunPlan, part_config
from megakda.plan.probe import EMBEDDING, HEAD, unit_names
from megakda.plan.search import Proposal, Searched

GIB, MIB = 2**30, 2**20


def describe(plan: RunPlan) -> str:
    """The whole report of one plan."""
    blocks = [_head(plan)]
    for phase in plan.phases:
        if len(plan.phases) > 1:
            blocks.append(_title(_phase_name(phase)))
        blocks += [_memory(plan, phase), _layers(plan, phase), _traffic(phase), _time(phase)]
    blocks += [_cost(plan), _assumptions(plan)]
    return "\n\n".join(blocks)


def describe_search(found: Searched) -> str:
    """The proposals of a search, best first, and the overrides of each."""
    first = found.proposals[0].plan
    cluster, given = first.cluster, found.given
    rows = [
        [
            str(number),
            duration(main.time.seconds),
            f"{given.seconds / p.plan.seconds:.2f}x" if given else "-",
            f"{main.mfu:.1%}",
            size(p.plan.bytes),
            _hours(p.plan),
            _layout(p.plan),
        ]
        for number, p in enumerate(found.proposals, start=1)
        for main in [p.plan.longest_phase]
    ]
    header = ["", "step", "speed", "MFU", "memory", "GPU-hours", "layout"]
    lines = [
        _title(f"Best layouts of {found.tried:,} valid ones on {cluster.name} x {cluster.gpus}"),
        table(header, rows, left=(6,)),
    ]
    if given:
        lines.append(
            f"The recipe as it is, speed 1: {duration(given.longest_phase.time.seconds)} a step, "
            f"{size(given.bytes)}{'' if given.fits else ', which does not fit'}, {_layout(given)}"
        )
    lines += found.notes
    lines.append(
        "Each was accepted by the trainer's own validation and built on the meta device at "
        f"{cluster.gpus:,} ranks."
    )
    for number, proposal in enumerate(found.proposals, start=1):
        lines.append(
            f"{number:>2}. {proposal.reason}\n    "
            + (shlex.join(proposal.overrides) or "(the recipe as it is)")
        )
    return "\n\n".join(lines)


def duration(seconds: float) -> str:
    """With milliseconds where seconds would say nothing."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"


def size(count: float) -> str:
    """Of bytes, in MiB where GiB would say nothing."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 10 else f"{count / MIB:.1f} MiB"


def _hours(plan: RunPlan) -> str:
    return f"{plan.gpu_hours:,.0f}" if plan.gpu_hours >= 10 else f"{plan.gpu_hours:.2g}"


def _unit(most: float) -> tuple[str, int]:
    """For a table of bytes up to `most`."""
    return ("GiB", GIB) if most >= GIB / 10 else ("MiB", MIB)


def as_data(plan: RunPlan) -> dict[str, Any]:
    """Everything that `describe` says, in bytes, seconds and FLOPs, for JSON."""
    return {
        "cluster": asdict(plan.cluster),
        "model": plan.config.model.name,
        "parameters": count_parameters(plan.config.model).total,
        "parallel": asdict(plan.config.parallel),
        "fits": plan.fits,
        "bytes_per_gpu": plan.bytes,
        "seconds": plan.seconds,
        "gpu_hours": plan.gpu_hours,
        "price": plan.price,
        "phases": [
            {
                "stages": list(phase.stages),
                "context": phase.context,
                "global_batch": phase.global_batch,
                "micro_batch": phase.micro_batch,
                "micro_batches": phase.micro_batches,
                "steps": phase.steps,
                "tokens": phase.tokens,
                "step_seconds": phase.time.seconds,
                "breakdown_seconds": phase.time.breakdown,
                "traffic": {name: asdict(x) for name, x in phase.time.traffic.items()},
                "exposed_seconds": phase.time.exposed,
                "model_flops": phase.model_flops,
                "hardware_flops": phase.hardware_flops,
                "mfu": phase.mfu,
                "memory": [asdict(stage) for stage in phase.memory],
            }
            for phase in plan.phases
        ],
    }


def search_data(found: Searched) -> list[dict[str, Any]]:
    """The proposals, for JSON."""
    return [_proposal_data(proposal) for proposal in found.proposals]


def _proposal_data(proposal: Proposal) -> dict[str, Any]:
    return {
        "overrides": list(proposal.overrides),
        "reason": proposal.reason,
        **as_data(proposal.plan),
    }


# ------------------------------------------------------------------ blocks


def _head(plan: RunPlan) -> str:
    model, cluster, derived = plan.config.model, plan.cluster, plan.derived
    count = count_parameters(model)
    nodes = max(1, cluster.gpus // cluster.gpus_per_node)
    lines = [
        _title(f"{model.name} on {cluster.name} x {cluster.gpus:,}"),
        f"parameters  {count.total:,}, of which a token uses {count.active:,}",
        f"cluster     {nodes:,} node{'s' * (nodes > 1)} of {cluster.gpus // nodes} GPUs: "
        f"{cluster.memory / GIB:.1f} GiB at {cluster.memory_bandwidth_gbs:,.0f} GB/s, "
        f"{cluster.peak_bf16_tflops:,.1f} TFLOP/s bf16, NVLink {cluster.nvlink_gbs:,.0f} GB/s, "
        f"network {cluster.network_gbs:,.0f} GB/s per GPU",
        f"layout      {_layout(plan)}",
        f"            tensor {plan.config.parallel.tensor} x pipeline "
        f"{plan.config.parallel.pipeline} x context {plan.config.parallel.context} x data "
        f"{derived.data_parallel}; experts over {plan.config.parallel.expert}, expert-data "
        f"{derived.expert_data_parallel}",
        f"optimizer   {plan.config.optim.name}, {_clipping(plan.config.optim)}"
        + (
            "sharded over data-parallel ranks"
            if plan.config.parallel.distributed_optimizer
            else "whole on every rank"
        ),
    ]
    return "\n".join(lines)


def _clipping(optim: OptimConfig) -> str:
    return "" if optim.qk_clip is None else f"QK-Clip at {optim.qk_clip:g}, "


def _memory(plan: RunPlan, phase: Phase) -> str:
    """Per pipeline stage, in GiB."""
    header = ["stage", "layers", "weights", "gradients", "main", "moments", "activations"]
    header += ["in flight", "total", "of GPU"]
    fullest = phase.fullest
    in_unit, unit = _unit(fullest.total)
    rows = [
        [
            str(m.stage),
            ",".join(f"{first + 1}-{last}" for first, last in m.layers),
            *(
                f"{x / unit:.2f}"
                for x in (
                    m.state.weights,
                    m.state.gradients,
                    m.state.main,
                    m.state.moments,
                    m.activations.peak,
                )
            ),
            str(m.activations.in_flight),
            f"{m.total / unit:.2f}",
            f"{m.total / plan.cluster.memory:.0%}",
        ]
        for m in phase.memory
    ]
    name, most = biggest(fullest)
    a = fullest.activations
    free = plan.cluster.usable - fullest.total
    verdict = (
        f"Fits, {free / GIB:.1f} GiB below the limit"
        if free >= 0
        else f"DOES NOT FIT: {-free / GIB:.1f} GiB above the limit"
    )
    return "\n".join(
        [
            f"Memory of a GPU, {in_unit}, on the fullest rank of each pipeline stage",
            table(header, rows, left=(1,)),
            f"{verdict} of {plan.cluster.usable / GIB:.1f} GiB ({plan.cluster.memory_headroom:.0%} "
            f"of {plan.cluster.memory / GIB:.1f} GiB kept free).",
            f"Biggest on stage {fullest.stage}: {name}, {size(most)}. Activations are "
            f"fullest in the {'backward' if a.backward else 'forward'} pass of {a.unit}: "
            f"{size(a.saved)} saved, {size(a.working)} at work.",
        ]
    )


def biggest(memory: StageMemory) -> tuple[str, int]:
    """What takes the most memory, and its bytes."""
    state = memory.state
    parts = {
        "weights": state.weights,
        "gradients": state.gradients,
        "main parameters": state.main,
        "moments": state.moments,
        "activations": memory.activations.peak,
    }
    return max(parts.items(), key=lambda part: part[1])


def _traffic(phase: Phase) -> str:
    transfers = phase.time.traffic
    name, unit = _unit(max(max(x.nvlink, x.network) for x in transfers.values()))
    rows = [
        [
            purpose,
            f"{transfer.nvlink / unit:,.2f}",
            f"{transfer.network / unit:,.2f}",
            f"{transfer.seconds * 1e3:,.2f}",
            f"{phase.time.exposed[purpose] * 1e3:,.2f}",
        ]
        for purpose, transfer in transfers.items()
    ]
    header = ["what", f"NVLink {name}", f"network {name}", "ms", "awaited ms"]
    return (
        f"Sent by a GPU of stage {phase.time.slowest} in a step (awaited: by the stage that waits "
        f"longest)\n{table(header, rows, left=(0,))}"
    )


def _layers(plan: RunPlan, phase: Phase) -> str:
    """What one layer of each kind holds for one micro-batch."""
    names = list(dict.fromkeys([EMBEDDING, *unit_names(plan.config.model), HEAD]))
    rows = [
        [
            name,
            f"{phase.units[name].saved / 2**20:,.1f}",
            f"{phase.units[name].forward_peak / 2**20:,.1f}",
            f"{phase.units[name].backward_peak / 2**20:,.1f}",
        ]
        for name in names
    ]
    lines = [
        "One layer of each kind and one micro-batch, MiB: saved for the backward pass, and the "
        "most in each pass",
        table(["", "saved", "forward", "backward"], rows, left=(0,)),
    ]
    states = kda_state_bytes(part_config(plan.config, phase))
    if states:
        lines.append(
            f"KDA's states before each chunk and their gradients, in a layer's backward pass: "
            f"{states / 2**20:,.1f} MiB."
        )
    return "\n".join(lines)


def _time(phase: Phase) -> str:
    time = phase.time
    parts = sorted(time.breakdown.items(), key=lambda part: -part[1])
    rows = [
        [name, duration(seconds), f"{seconds / time.seconds:.1%}"]
        for name, seconds in parts
        if seconds >= 5e-4 * time.seconds
    ]
    tokens = phase.global_batch * phase.context
    return "\n".join(
        [
            f"Expected time of a step, {phase.micro_batches} micro-batches of "
            f"{phase.micro_batch} x {phase.context:,} tokens per rank",
            table(["", "time", "share"], rows, left=(0,)),
            f"{duration(time.seconds)} a step, {tokens / time.seconds / 1e6:.2f}M tokens/s, "
            f"MFU {phase.mfu:.1%}. Biggest: {parts[0][0]}.",
            f"Model {phase.model_flops / 1e15:,.1f} PFLOP a step, computed "
            f"{phase.hardware_flops / 1e15:,.1f} PFLOP with what is computed twice.",
        ]
    )


def _cost(plan: RunPlan) -> str:
    tokens = sum(phase.tokens for phase in plan.phases)
    steps = sum(phase.steps for phase in plan.phases)
    lines = [
        _title("The whole run"),
        f"{tokens / 1e9:,.1f}B tokens in {steps:,} steps: {plan.seconds / 86400:,.1f} days, "
        f"{_hours(plan)} GPU-hours, without validation, saving and failures.",
    ]
    if plan.price is not None:
        lines.append(
            f"Price {plan.price:,.0f} at {plan.cluster.price_per_gpu_hour:g} per GPU-hour "
            f"(recipes/cluster/{plan.cluster.name}.yaml)."
        )
    return "\n".join(lines)


def _assumptions(plan: RunPlan) -> str:
    c = plan.cluster
    shares = ", ".join(f"{name} {value:g}" for name, value in vars(c.efficiency).items())
    return "\n".join(
        [
            _title("What is counted and what is assumed"),
            "Counted on the layers themselves: parameters, saved activations, FLOPs, messages of "
            "tensor, expert and context parallelism. By megatron-core's rules: state, and messages "
            "of data parallelism, pipeline and Muon.",
            f"Assumed, never measured (recipes/cluster/{c.name}.yaml): shares of the rates, "
            f"{shares}; {c.latency_us:g} us per collective call; {c.launch_us:g} us per launch; "
            f"{c.memory_headroom:.0%} of memory kept free.",
            "Assumed besides: every expert gets the same number of tokens, messages inside layers "
            "are awaited, nothing fails. docs/planner.md says how each number comes about.",
        ]
    )


def _phase_name(phase: Phase) -> str:
    numbers = ", ".join(map(str, phase.stages))
    return (
        f"Stage{'s' * (len(phase.stages) > 1)} {numbers} of the schedule: context "
        f"{phase.context:,}, batch {phase.global_batch:,}, {phase.steps:,} steps"
    )


def _layout(plan: RunPlan) -> str:
    p, train = plan.config.parallel, plan.config.train
    words = [f"TP{p.tensor}", f"PP{p.pipeline}"]
    words += [f"VPP{p.virtual_pipeline}"] * (p.virtual_pipeline > 1)
    words += [f"CP{p.context} {p.context_mode}/{p.context_attention}"] * (p.context > 1)
    words += [f"EP{p.expert}"] * (plan.config.model.ffn == "moe")
    words += [f"ETP{p.expert_tensor}"] * (p.expert_tensor > 1)
    modules = f" {'+'.join(p.recompute_modules)}" if p.recompute == "selective" else ""
    words += [f"DP{plan.derived.data_parallel}", f"recompute {p.recompute}{modules}"]
    words.append(f"micro-batch {train.micro_batch}")
    if p.pipeline_layers is not None:
        words.append(f"layers {'-'.join(map(str, p.pipeline_layers))}")
    return " ".join(words)


def _title(text: str) -> str:
    return f"{text}\n{'-' * len(text)}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()) -> str:
    """Columns of text, to the right but for those named."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return ("  " + "  ".join(cells)).rstrip()

    return "\n".join(map(line, [header, *rows]))
