"""One layer of each kind, the embedding and the head, run forward and backward without memory.

The layers of a model are of a few kinds, and all of one kind allocate, compute and send the same.
So a model of one layer of each kind at full width, built on the meta device under fake process
groups, tells all there is to know about a run's activations, work and messages; `memory`, `network`
and `timing` put it together for any number of layers, stages and micro-batches.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch

from megakda.config import Config
from megakda.config.pattern import FULL, layer_kinds
from megakda.config.schema import ModelConfig
from megakda.layers.context_layout import Documents
from megakda.layers.mla import MultiLatentAttention
from megakda.models.dry_run import fake_ranks
from megakda.optim.matrices import Assignment, assign
from megakda.plan.meta_device import check_device, meta_device
from megakda.plan.recorder import OTHER, Recorder, Work

EMBEDDING, HEAD = "embedding", "head"
FP32 = 4  # bytes


@dataclass(frozen=True)
class Weight:
    """One parameter as one rank holds it.

    Attributes:
        name: in its unit.
        shape: of this rank's part.
        element_bytes: of its dtype.
        expert: whether it is reduced over expert-data ranks instead of data x context ranks.
        matrices: that Muon orthogonalises, parts of which it holds, as (rows, columns, number,
            elements of each here); none where AdamW has it.
    """

    name: str
    shape: tuple[int, ...]
    element_bytes: int
    expert: bool
    matrices: tuple[tuple[int, int, int, int], ...] = ()

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Unit:
    """What one rank does and holds for one layer (or end of the model) and one micro-batch.

    Bytes count from just before the layer's input comes into being.

    Attributes:
        saved: bytes that stay after the forward pass for the backward pass, the output apart.
        forward_peak: most bytes during the forward pass, the input included.
        backward_peak: most during the backward pass, `saved` and the output's gradient included.
        left: bytes that modules hold on to after the backward pass, until the next forward pass.
        output: bytes of what the next layer gets.
        keeps_input: whether `saved` includes the input.
        forward, backward: work and messages; recomputation belongs to the backward pass.
    """

    name: str
    weights: tuple[Weight, ...]
    saved: int
    forward_peak: int
    backward_peak: int
    left: int
    output: int
    keeps_input: bool
    forward: Work
    backward: Work


@dataclass(frozen=True)
class Probe:
    """The units of a model at one layout of its layers.

    Attributes:
        units: by name: `EMBEDDING`, kinds of layers as in `unit_names`, `HEAD`.
        workspace: bytes of the buffer that tensor parallelism gathers activations in, all layers
            one after the other.
        activation: bytes of what goes from one layer to the next.
    """

    units: dict[str, Unit]
    workspace: int
    activation: int

    def layers(self, model: ModelConfig, first: int, last: int) -> list[Unit]:
        """The units of layers `first` to `last` - 1, 0-based."""
        return [self.units[name] for name in unit_names(model)[first:last]]


def unit_names(model: ModelConfig) -> list[str]:
    """The kind of each layer: its mixer and its feed-forward, as in "kda+moe"."""
    kinds = layer_kinds(model.pattern, model.num_layers, model.last_layer_full)
    return [
        f"{'mla' if kind == FULL else model.linear.mixer}+{'moe' if _is_moe(model, i) else 'dense'}"
        for i, kind in enumerate(kinds)
    ]


def _is_moe(model: ModelConfig, layer: int) -> bool:
    return model.ffn == "moe" and layer >= model.moe.first_dense_layers


def probe(config: Config, device: str) -> Probe:
    """Runs the units of `config` as on a device of kind `device`, "cuda" or "cpu".

    Everything that does not concern a single layer is left out of account (pipeline, data
    parallelism, optimizer), so layouts that differ only there share one probe.

    Raises:
        ConfigError: `device` cannot be planned for here.
    """
    check_device(device)
    parallel = config.parallel
    layout = replace(
        parallel,
        pipeline=1,
        virtual_pipeline=1,
        pipeline_layers=None,
        recompute_modules=sorted(parallel.recompute_modules),
        distributed_optimizer=True,
        overlap_grad_reduce=False,
        overlap_param_gather=False,
    )
    own = replace(
        Config(),
        model=_one_of_each(config.model),
        parallel=layout,
        precision=config.precision,
        runtime=config.runtime,
        optim=config.optim,
        data=replace(config.data, paths=[]),
        train=replace(
            Config().train, context=config.train.context, micro_batch=config.train.micro_batch
        ),
    )
    return _probe(_Key(own, device))


@dataclass(frozen=True)
class _Key:
    """Configs are compared by value, and hashed by what they look like."""

    config: Config
    device: str

    def __hash__(self) -> int:
        return hash((repr(self.config), self.device))


def _one_of_each(model: ModelConfig) -> ModelConfig:
    """The same model with one layer of each of its kinds, dense feed-forwards first."""
    found = sorted({tuple(name.split("+")) for name in unit_names(model)}, key=lambda x: x[1])
    dense = sum(ffn == "dense" for _, ffn in found)
    return replace(
        model,
        num_layers=len(found),
        pattern=["full" if mixer == "mla" else "linear" for mixer, _ in found],
        moe=replace(model.moe, first_dense_layers=dense),
    )


@lru_cache(maxsize=4096)
def _probe(key: _Key) -> Probe:
    from megakda.models.kimi_linear import build_chunks

    config, device = key.config, key.device
    parallel = config.parallel
    world = math.lcm(parallel.tensor * parallel.context, parallel.expert * parallel.expert_tensor)
    # Of a contiguous layout the last rank has the most attention to compute.
    rank = (parallel.context - 1) * parallel.tensor
    recorder = Recorder()
    with fake_ranks(config, rank, world), meta_device(device, recorder):
        recorder.groups = _group_names()
        with torch.device("meta"):
            (chunk,) = build_chunks(
                config.model,
                parallel,
                config.precision,
                config.train.context,
                config.runtime.attention,
            )
        chunk.train()
        for module in chunk.modules():
            if isinstance(module, MultiLatentAttention) and config.optim.qk_clip is not None:
                module.record_max_logits()
        for param in chunk.parameters():
            param.register_post_accumulate_grad_hook(_accumulate(recorder))
        recorder.ignore([*chunk.parameters(), *chunk.buffers()])
        runner = _Runner(chunk, config, recorder)
        workspace = runner.allocate_workspace()
        activation = math.prod(runner.shape) * chunk.config.params_dtype.itemsize
        return Probe({unit.name: unit for unit in runner.run()}, workspace, activation)


def _accumulate(recorder: Recorder) -> Callable[[torch.Tensor], None]:
    """What megatron-core's wrapper does at this point: it adds the gradient to the main one, which
    is fp32, in an operation of its own, and drops it."""

    def hook(param: torch.Tensor) -> None:
        recorder.kernel(OTHER, 0, param.numel() * (param.element_size() + 2 * FP32))
        param.grad = None

    return hook


def _group_names() -> dict[str, str]:
    """What this rank's process groups are for, by torch's names of them."""
    from megatron.core import parallel_state as ps

    found = {
        "tensor": ps.get_tensor_model_parallel_group(),
        "context": ps.get_context_parallel_group(),
        "expert": ps.get_expert_model_parallel_group(),
        "expert_tensor": ps.get_expert_tensor_parallel_group(),
        "tensor_expert": ps.get_expert_tensor_and_model_parallel_group(),
    }
    names = {group.group_name: name for name, group in found.items()}
    for name, group in zip(
        ("context_heads", "context_state"),
        ps.get_hierarchical_context_parallel_groups(check_initialized=False) or (),
        strict=False,
    ):
        names[group.group_name] = name
    return names


def _matrices(assignment: Assignment) -> tuple[tuple[int, int, int, int], ...]:
    shapes = Counter(
        (block.matrix.rows, block.matrix.columns, block.size) for _, block in assignment.blocks
    )
    return tuple((rows, columns, n, size) for (rows, columns, size), n in shapes.items())


class _Enter(torch.autograd.Function):
    """An activation that somebody else has computed."""

    @staticmethod
    def forward(ctx, seed, shape, dtype):  # type: ignore[no-untyped-def]
        return seed.new_empty(shape, dtype=dtype)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return None, None, None


class _Runner:
    """Runs each unit of a chunk, apart from the others."""

    def __init__(self, chunk: Any, config: Config, recorder: Recorder):
        self.chunk, self.config, self.recorder = chunk, config, recorder
        self.seed = torch.empty((), device="meta", requires_grad=True)
        parallel, train = config.parallel, config.train
        self.tokens = train.context // parallel.context  # of a row, on this rank
        self.rows = recorder.rows = train.micro_batch
        shared = parallel.tensor if chunk.config.sequence_parallel else 1
        self.shape = (self.tokens // shared, self.rows, config.model.hidden_size)
        self.documents = None
        if config.data.packing != "none":
            self.documents = Documents.whole_rows(self.rows, train.context)

        assignments = assign(
            [SimpleNamespace(module=chunk)],
            layer_kinds(config.model.pattern, config.model.num_layers),
            muon=config.optim.name == "muon",
            heads=config.model.num_heads,
            heads_per_matrix=config.optim.muon.heads_per_matrix,
        )
        self.matrices = {x.param: _matrices(x) for x in assignments}

    def allocate_workspace(self) -> int:
        """megatron-core's buffer for gathered activations, which stays; its bytes."""
        from megatron.core.parallel_state import get_global_memory_buffer

        core = self.chunk.config
        if not core.sequence_parallel:
            return 0
        shape = (self.tokens, self.rows, self.config.model.hidden_size)
        with self.recorder:
            get_global_memory_buffer().get_tensor(shape, core.params_dtype, "mpu")
            return self.recorder.live

    def run(self) -> list[Unit]:
        decoder = self.chunk.decoder
        layers, norm = list(decoder.layers), decoder.final_layernorm
        units = [self._unit(EMBEDDING, [self.chunk.embedding], self._embed, has_input=False)]
        decoder.final_layernorm, decoder.num_layers_per_pipeline_rank = None, 1
        for name, layer in zip(unit_names(self.config.model), layers, strict=True):
            decoder.layers = torch.nn.ModuleList([layer])
            units.append(self._unit(name, [layer], self._layer))
        decoder.layers, decoder.final_layernorm = torch.nn.ModuleList(), norm
        units.append(self._unit(HEAD, [norm, self.chunk.output_layer], self._head))
        return units

    def _integers(self) -> torch.Tensor:
        return torch.empty(self.rows, self.tokens, dtype=torch.long, device="meta")

    def _embed(self, _: Any) -> torch.Tensor:
        return self.chunk.embedding(self._integers(), self._integers())

    def _layer(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        return self.chunk.decoder(
            inputs.pop(), attention_mask=None, packed_seq_params=self.documents
        )

    def _head(self, inputs: list[torch.Tensor]) -> torch.Tensor:
        hidden = self.chunk.decoder.final_layernorm(inputs.pop())
        names = ("input_ids", "position_ids", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin")
        loss = self.chunk._postprocess(
            hidden, labels=self._integers(), **dict.fromkeys(names, None)
        )
        mask = torch.empty(self.rows, self.tokens, device="meta")
        return (loss.float() * mask).sum()

    def _unit(
        self,
        name: str,
        modules: list[Any],
        run: Callable[..., torch.Tensor],
        has_input: bool = True,
    ) -> Unit:
        recorder = self.recorder
        with recorder:
            base = recorder.live
            inputs, entered = [], None
            if has_input:
                inputs.append(_Enter.apply(self.seed, self.shape, self.chunk.config.params_dtype))
                entered = inputs[0].untyped_storage()._cdata
            with recorder.measure():
                output = run(inputs)
                forward_peak, forward = recorder.peak - base, recorder.work
            size = output.untyped_storage().nbytes()
            saved = recorder.live - base - size
            keeps_input = entered is not None and recorder.knows(entered)

            grad = torch.empty_like(output)
            # The next layer, or the schedule, has let go of the output, or counts it itself.
            output.data = output.new_empty(())
            with recorder.measure():
                torch.autograd.Variable._execution_engine.run_backward(
                    (output,), (grad,), False, False, (), True, True
                )
                backward_peak, backward = recorder.peak - base, recorder.work
            del grad, output
        weights = tuple(
            Weight(
                key,
                tuple(param.shape),
                param.element_size(),
                not getattr(param, "allreduce", True),
                self.matrices[param],
            )
            for module in modules
            for key, param in module.named_parameters()
        )
        return Unit(
            name,
            weights,
            saved,
            forward_peak,
            backward_peak,
            recorder.live - base,
            size,
            keeps_input,
            forward,
            backward,
        )
