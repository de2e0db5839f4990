"""Closed-form parameter counts, from the configuration alone.

Sizes per layer, with E = hidden size, H = heads, K and V = key and value size per head, W = taps of
the short convolution, R = gate rank, Ro = output-gate rank:

    KDA     q, k: 2 E H K    v: E H V    convolutions: W (2 H K + H V)
            decay: f_a E R, f_b R H K, A_log H, dt_bias H K         beta: b E H
            output gate: g_a E Ro, g_b Ro H V (none without a gate) o_norm V    o: H V E
    GDN     the same, but one decay per head: a E H, A_log H, dt_bias H replace KDA's decay
    MLA     with N and S = the separate and the shared key dims per head, L = rank of the latent:
            q: E H (N + S), or with a latent of rank Q for queries q_a: E Q, norm: Q,
            q_b: Q H (N + S)    kv_a: E (L + S)    norm: L    kv_b: L H (N + V)    o: H V E
    FFN     gated, three matrices: dense 3 E F; each routed expert 3 E Fe; the shared experts
            together 3 E (num_shared Fe); router E num_experts
    norms   E before the mixer and E before the feed-forward of each layer, and E at the end
    ends    embedding and LM head, vocabulary x E each (not tied)

No linear map has a bias. The experts' balancing bias is a buffer and is not counted. Shapes follow
Kimi Linear (arXiv 2510.26692, section 4) and its published 48B configuration.
"""

from __future__ import annotations

from dataclasses import dataclass

from megakda.config.pattern import FULL, layer_kinds
from megakda.config.schema import ModelConfig
from megakda.errors import ConfigError


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of trainable parameters.

    ``active`` is what one token uses: everything, but of the routed experts only ``top_k`` per
    layer, and without the input embedding (a lookup, not a product). ``components`` adds up to
    ``total`` and ``active_components`` to ``active``.
    """

    components: dict[str, int]
    active_components: dict[str, int]

    @property
    def total(self) -> int:
        """All trainable parameters."""
        return sum(self.components.values())

    @property
    def active(self) -> int:
        """Parameters that one token uses, without the input embedding."""
        return sum(self.active_components.values())

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding."""
        return self.components["embedding"]

    @property
    def lm_head(self) -> int:
        """Parameters of the output projection onto the vocabulary."""
        return self.components["lm_head"]


def linear_attention_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters of one linear-attention layer (KDA or GDN), by parameter name."""
    linear, hidden, heads = model.linear, model.hidden_size, model.num_heads
    keys, values = heads * linear.head_dim_k, heads * linear.head_dim_v
    counts = {
        "q_proj": hidden * keys,
        "k_proj": hidden * keys,
        "v_proj": hidden * values,
        "q_conv1d": linear.conv_kernel * keys,
        "k_conv1d": linear.conv_kernel * keys,
        "v_conv1d": linear.conv_kernel * values,
        "b_proj": hidden * heads,
        "A_log": heads,
    }
    if linear.mixer == "kda":
        counts["f_a_proj"] = hidden * linear.gate_rank
        counts["f_b_proj"] = linear.gate_rank * keys
        counts["dt_bias"] = keys
    elif linear.mixer == "gdn":
        counts["a_proj"] = hidden * heads
        counts["dt_bias"] = heads
    else:
        raise ConfigError(
            f"model.linear.mixer={linear.mixer!r}: no such token mixer; use kda or gdn."
        )
    if linear.output_gate != "none":
        counts["g_a_proj"] = hidden * linear.output_gate_rank
        counts["g_b_proj"] = linear.output_gate_rank * values
    counts["o_norm"] = linear.head_dim_v
    counts["o_proj"] = values * hidden
    return counts


def full_attention_parameters(model: ModelConfig) -> dict[str, int]:
    """Parameters of one full-attention layer (MLA), by name."""
    mla, hidden, heads = model.mla, model.hidden_size, model.num_heads
    queries = heads * (mla.qk_nope_head_dim + mla.qk_shared_head_dim)
    if mla.q_lora_rank is None:
        query = {"q_proj": hidden * queries}
    else:
        query = {
            "q_a_proj": hidden * mla.q_lora_rank,
            "q_a_layernorm": mla.q_lora_rank,
            "q_b_proj": mla.q_lora_rank * queries,
        }
    return {
        **query,
        "kv_a_proj": hidden * (mla.kv_lora_rank + mla.qk_shared_head_dim),
        "kv_a_layernorm": mla.kv_lora_rank,
        "kv_b_proj": mla.kv_lora_rank * heads * (mla.qk_nope_head_dim + mla.v_head_dim),
        "o_proj": heads * mla.v_head_dim * hidden,
    }


def gated_ffn_parameters(hidden: int, ffn: int) -> int:
    """Parameters of a gated feed-forward (gate, up and down projection) of inner size ``ffn``."""
    return 3 * hidden * ffn


def count_layers(model: ModelConfig) -> dict[str, int]:
    """Numbers of layers: ``linear`` + ``full`` and ``dense`` + ``moe`` are each all layers."""
    kinds = layer_kinds(model.pattern, model.num_layers, model.last_layer_full)
    full = kinds.count(FULL)
    if model.ffn == "dense":
        dense = model.num_layers
    elif model.ffn == "moe":
        dense = min(model.moe.first_dense_layers, model.num_layers)
    else:
        raise ConfigError(f"model.ffn={model.ffn!r}: no such feed-forward; use moe or dense.")
    return {
        "linear": model.num_layers - full,
        "full": full,
        "dense": dense,
        "moe": model.num_layers - dense,
    }


def count_parameters(model: ModelConfig) -> ParameterCount:
    """Parameters of the whole model, total and active per token, by component.

    Components: embedding, linear_attention, full_attention, norms (those of the residual stream;
    a norm inside a mixer counts with the mixer), dense_ffn, router, routed_experts,
    shared_experts, lm_head.

    Raises `ConfigError` for an unknown layer pattern, mixer or feed-forward.
    """
    hidden, moe, layers = model.hidden_size, model.moe, count_layers(model)
    # Not evaluated without dense layers: a model of experts only need not set `dense_ffn`.
    dense = gated_ffn_parameters(hidden, model.dense_ffn) if layers["dense"] else 0
    expert = gated_ffn_parameters(hidden, moe.expert_ffn)
    components = {
        "embedding": model.vocab_size * hidden,
        "linear_attention": layers["linear"] * sum(linear_attention_parameters(model).values()),
        "full_attention": layers["full"] * sum(full_attention_parameters(model).values()),
        "norms": (2 * model.num_layers + 1) * hidden,
        "dense_ffn": layers["dense"] * dense,
        "router": layers["moe"] * moe.num_experts * hidden,
        "routed_experts": layers["moe"] * moe.num_experts * expert,
        "shared_experts": layers["moe"] * moe.num_shared_experts * expert,
        "lm_head": model.vocab_size * hidden,
    }
    active = dict(components)
    active["embedding"] = 0
    active["routed_experts"] = layers["moe"] * moe.top_k * expert
    return ParameterCount(components=components, active_components=active)
