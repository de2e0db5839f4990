"""Kimi Delta Attention as a megatron-core attention layer; Gated DeltaNet is its scalar-decay case.

Kimi Linear, arXiv 2510.26692, section 4. Projections, short convolutions, the delta-rule recurrence
(`megakda.kernels.kda`), a gated per-head norm and the output projection, with heads split over the
tensor-parallel group.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide

from megakda.config.schema import LinearAttentionConfig
from megakda.kernels.gated_norm import gated_rms_norm
from megakda.kernels.kda import kda_gate
from megakda.layers import initializers
from megakda.layers.cached import CachedTokens, LinearCache
from megakda.layers.context_layout import Documents
from megakda.layers.context_parallel import ALONE, ContextParallel
from megakda.layers.kda_cached import MixerWeights, mix_cached
from megakda.layers.kda_context_parallel import kda_context_parallel, of_heads
from megakda.layers.linear import (
    ReplicatedLinear,
    column_parallel,
    project_together,
    projected_together,
    ready_weight,
    row_parallel,
)

SATURATED_LOW, SATURATED_HIGH = 0.01, 0.999
"""A decay exp(g) outside these is saturated: it forgets all, or nothing, in one step."""


class ShortConvolution(MegatronModule):
    """The weight of a depthwise causal convolution over the sequence; channels follow the heads.

    Parameter `weight` [channels/TP, taps]. It is applied where the neighbouring tokens are known,
    in `megakda.layers.kda_context_parallel`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        channels: int,
        taps: int,
        tp_group: torch.distributed.ProcessGroup,
    ):
        super().__init__(config=config)
        self.tp_group = tp_group
        self.weight = _head_parameter(
            (divide(channels, tp_group.size()), taps), config.params_dtype, initializers.short_conv
        )

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Split along the channels."""
        return _shard_first_axis(self, ["weight"], prefix, sharded_offsets, metadata)


class HeadNorm(torch.nn.Module):
    """RMSNorm over each head's values with one weight for all heads, times the output gate.

    Every rank's weight gradient covers its own heads only, with sequence parallelism on and off:
    the `partial_over_tensor_parallel` mark asks for the sum (`megakda.optim.finalize`).

    Shape: x and gate [..., head_dim] -> [..., head_dim].
    """

    def __init__(
        self, config: TransformerConfig, head_dim: int, eps: float, activation: str | None
    ):
        super().__init__()
        self.eps, self.activation = eps, activation
        self.weight = torch.nn.Parameter(
            torch.empty(head_dim, device=torch.cuda.current_device(), dtype=config.params_dtype)
        )
        self.weight.partial_over_tensor_parallel = True  # type: ignore[attr-defined]
        initializers.set_initializer(self.weight, initializers.ones)

    def forward(self, x: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        return gated_rms_norm(x, self.weight, gate, activation=self.activation, eps=self.eps)


class KimiDeltaAttention(MegatronModule):
    """The linear token mixer: KDA (`mixer=kda`) or Gated DeltaNet (`mixer=gdn`).

    The two differ in the decay alone: KDA has one per key channel, through a low-rank projection;
    Gated DeltaNet (arXiv 2412.06464) one per head.

    Args:
        config: megatron-core's config; hidden size, dtype, sequence parallelism and recompute.
        layer_number: 1-based, over the whole model.
        linear: widths, gates and the convolution.
        num_heads: over all ranks.
        pg_collection: process groups; `tp` is used.
        context: how sequences are shared by ranks.
        head_groups: for the least memory, recompute the mixer apart from the rest of its layer, and
            its core in so many groups of heads, one after the other; 0 for neither.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        linear: LinearAttentionConfig,
        num_heads: int,
        pg_collection: ProcessGroupCollection,
        context: ContextParallel = ALONE,
        head_groups: int = 0,
        **_: Any,
    ):
        super().__init__(config=config)
        self.linear = linear
        self.context = context
        self.layer_number = layer_number
        self.tp_group = tp = pg_collection.tp
        self.num_heads = divide(num_heads, tp.size())  # on this rank
        hidden = config.hidden_size
        key_dim, value_dim = num_heads * linear.head_dim_k, num_heads * linear.head_dim_v

        self.q_proj = column_parallel(hidden, key_dim, config, pg_collection)
        self.k_proj = column_parallel(hidden, key_dim, config, pg_collection)
        self.v_proj = column_parallel(hidden, value_dim, config, pg_collection)
        self.b_proj = column_parallel(hidden, num_heads, config, pg_collection)
        if linear.conv_kernel:
            self.q_conv1d = ShortConvolution(config, key_dim, linear.conv_kernel, tp)
            self.k_conv1d = ShortConvolution(config, key_dim, linear.conv_kernel, tp)
            self.v_conv1d = ShortConvolution(config, value_dim, linear.conv_kernel, tp)

        if linear.mixer == "kda":
            self.f_a_proj = ReplicatedLinear(hidden, linear.gate_rank, config)
            self.f_b_proj = column_parallel(linear.gate_rank, key_dim, config, pg_collection)
        else:
            self.a_proj = column_parallel(hidden, num_heads, config, pg_collection)
        decays = self.num_heads * (linear.head_dim_k if linear.mixer == "kda" else 1)
        # fp32 whatever the model's dtype: bf16 cannot hold a decay close to 1.
        self.A_log = _head_parameter((self.num_heads,), torch.float32, initializers.log_decay_rate)
        self.dt_bias = _head_parameter((decays,), torch.float32, initializers.decay_bias)

        if linear.output_gate != "none":
            self.g_a_proj = ReplicatedLinear(hidden, linear.output_gate_rank, config)
            self.g_b_proj = column_parallel(
                linear.output_gate_rank, value_dim, config, pg_collection
            )
        self.o_norm = HeadNorm(
            config,
            linear.head_dim_v,
            linear.norm_eps,
            None if linear.output_gate == "none" else linear.output_gate,
        )
        self.o_proj = row_parallel(value_dim, hidden, config, pg_collection)
        selective = config.recompute_granularity == "selective"
        self.recompute_core = head_groups > 0 or (
            selective and "core_attn" in config.recompute_modules
        )
        self.head_groups = head_groups
        self.watch = False  # set by the trainer on the steps whose telemetry it wants
        self.telemetry: torch.Tensor | None = None  # sums over calls, see `_record`

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        packed_seq_params: Documents | CachedTokens | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """[s, b, h] -> ([s, b, h], no bias).

        s is this rank's share under sequence and context parallelism. Causal by construction; state
        and convolution begin afresh with each of the documents of `packed_seq_params` where that
        is given, and go on from a cache with `CachedTokens`. `attention_mask` and the other
        arguments of megatron-core's attention interface are not used.
        """
        if isinstance(packed_seq_params, CachedTokens):
            mixed = self._forward_cached(packed_seq_params, hidden_states)
        elif self.head_groups and self.training:
            mixed = tensor_parallel.checkpoint(
                partial(self._forward, packed_seq_params), False, hidden_states
            )
        else:
            mixed = self._forward(packed_seq_params, hidden_states)
        return mixed, None

    def _forward(self, documents: Documents | None, hidden_states: torch.Tensor) -> torch.Tensor:
        """Projections, mixing, norm and output projection; shapes as in `forward`."""
        inputs, gate = self._project(hidden_states)

        # [S, b, ...] -> [b, S, ...], the kernels' layout
        q, k, v, decay, beta = (t.transpose(0, 1) for t in inputs)
        if documents is None:
            documents = Documents.whole_rows(len(q), q.shape[1] * self.context.layout.ranks)
        whole = [t.unflatten(-1, (self.num_heads, -1)) for t in (q, k, v, decay)] + [beta]
        parts = []
        share = divide(self.num_heads, max(1, self.head_groups))
        for first in range(0, self.num_heads, share):
            heads = slice(first, first + share)
            mix, tensors = partial(self._mix, documents, heads), [t[:, :, heads] for t in whole]
            if self.recompute_core and self.training:
                parts.append(tensor_parallel.checkpoint(mix, False, *tensors))
            else:
                parts.append(mix(*tensors))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, 2)

        out = out.transpose(0, 1)  # [S, b, H/TP, v]
        if gate is not None:
            gate = gate.view(out.shape)
        return self.o_proj(self.o_norm(out, gate).flatten(2))[0]

    def _project(
        self, hidden_states: torch.Tensor
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """[s, b, h] -> q, k, v, decay and beta [S, b, ...], and the output gate if there is one."""
        low_rank = self.low_rank_projections
        joint = None
        if self.tp_group.size() == 1:
            joint = projected_together(hidden_states, [*self.joint_projections, *low_rank])
        if joint is None:
            joint = project_together(hidden_states, self.joint_projections)
            joint += tuple(linear(hidden_states) for linear in low_rank)
        q, k, v, beta, *rest = joint
        decay = rest[0] if self.linear.mixer == "gdn" else self.f_b_proj(rest[0])[0]
        gate = self.g_b_proj(rest[1])[0] if self.linear.output_gate != "none" else None
        return [q, k, v, decay, beta], gate

    @property
    def joint_projections(self) -> list[ColumnParallelLinear]:
        """Of q, k, v, beta and Gated DeltaNet's decay, which are done in one matrix product."""
        projections = [self.q_proj, self.k_proj, self.v_proj, self.b_proj]
        return projections + ([self.a_proj] if self.linear.mixer == "gdn" else [])

    @property
    def low_rank_projections(self) -> list[ReplicatedLinear]:
        """The first of KDA's decay and of the output gate."""
        projections = [self.f_a_proj] if self.linear.mixer == "kda" else []
        return projections + ([self.g_a_proj] if self.linear.output_gate != "none" else [])

    def _forward_cached(self, new: CachedTokens, hidden_states: torch.Tensor) -> torch.Tensor:
        """New tokens of cached sequences, [s, 1, h] -> [s, 1, h]."""
        inputs, gate = self._project(hidden_states)
        cache = new.caches[self.layer_number]
        assert isinstance(cache, LinearCache)
        weights = MixerWeights(
            tuple(ready_weight(conv) for conv in self._convolutions),
            self.A_log,
            self.dt_bias,
            self._lower_bound,
            self.o_norm.weight,
            self.o_norm.eps,
            self.o_norm.activation,
        )
        inputs = [x.squeeze(1) for x in inputs]
        mixed = mix_cached(inputs, None if gate is None else gate.squeeze(1), weights, new, cache)
        return self.o_proj(mixed.unsqueeze(1))[0]

    def make_cache(self, rows: int) -> LinearCache:
        """An empty cache of `rows` sequences for this layer's share of the heads."""
        linear, device, dtype = self.linear, self.A_log.device, self.q_proj.weight.dtype
        shape = (rows, self.num_heads, linear.head_dim_k, linear.head_dim_v)
        return LinearCache(
            torch.zeros(shape, device=device),
            tuple(
                torch.zeros(
                    rows, len(conv.weight), linear.conv_kernel - 1, device=device, dtype=dtype
                )
                for conv in self._convolutions
            ),
        )

    def _mix(
        self,
        documents: Documents,
        heads: slice,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        decay: torch.Tensor,
        beta: torch.Tensor,
    ) -> torch.Tensor:
        """Convolution, gates and the recurrence of some of this rank's heads.

        q, k [b, S, H, K], v [b, S, H, V], decay [b, S, H, K or 1] and beta [b, S, H] before their
        activations -> [b, S, H, V]; S is this rank's share of the tokens.
        """
        A_log, dt_bias = (of_heads(p, self.num_heads, heads) for p in (self.A_log, self.dt_bias))
        if self.watch and torch.is_grad_enabled():
            with torch.no_grad():
                self._record(kda_gate(decay, A_log, dt_bias, self._lower_bound), beta)
        out, _ = kda_context_parallel(
            q,
            k,
            v,
            decay,
            beta,
            context=self.context,
            documents=documents,
            conv_weights=[
                of_heads(ready_weight(conv), self.num_heads, heads) for conv in self._convolutions
            ],
            A_log=A_log,
            dt_bias=dt_bias,
            lower_bound=self._lower_bound,
            use_gate_in_kernel=True,
            use_qk_l2norm_in_kernel=True,
            use_beta_sigmoid_in_kernel=True,
        )
        return out

    @property
    def _convolutions(self) -> list[ShortConvolution]:
        """Of q, k and v; none without convolution."""
        return [self.q_conv1d, self.k_conv1d, self.v_conv1d] if self.linear.conv_kernel else []

    @property
    def _lower_bound(self) -> float | None:
        return self.linear.gate_lower_bound if self.linear.gate == "bounded" else None

    def _record(self, g: torch.Tensor, beta: torch.Tensor) -> None:
        """Adds this call to `telemetry`: sums of mean decay, mean beta and saturated share, calls.

        Under activation recomputation the layer runs twice; only the run that builds the graph
        counts.
        """
        decay = g.exp()
        saturated = (decay < SATURATED_LOW) | (decay > SATURATED_HIGH)
        sums = torch.stack(
            [
                decay.mean(),
                beta.float().sigmoid().mean(),
                saturated.float().mean(),
                decay.new_ones(()),
            ]
        )
        self.telemetry = sums if self.telemetry is None else self.telemetry + sums

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """A_log and dt_bias split along the heads; the rest as the submodules say."""
        sharded = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        own = _shard_first_axis(self, ["A_log", "dt_bias"], prefix, sharded_offsets, metadata)
        return {**sharded, **own}


def _head_parameter(
    shape: tuple[int, ...], dtype: torch.dtype, initializer: initializers.Initializer
) -> torch.nn.Parameter:
    """A parameter whose first axis follows the heads of this tensor-parallel rank."""
    param = torch.nn.Parameter(torch.empty(shape, device=torch.cuda.current_device(), dtype=dtype))
    tensor_parallel.set_tensor_model_parallel_attributes(param, True, 0, 1)
    initializers.set_initializer(param, initializer)
    return param


def _shard_first_axis(
    module: MegatronModule,
    names: list[str],
    prefix: str,
    sharded_offsets: tuple,
    metadata: dict | None,
) -> dict[str, Any]:
    return make_sharded_tensors_for_checkpoint(
        {name: getattr(module, name) for name in names},
        prefix,
        dict.fromkeys(names, 0),
        sharded_offsets,
        tp_group=module.tp_group,
        dp_cp_group=(metadata or {}).get("dp_cp_group"),
    )
