"""Floating-point operations per token, in closed form, and model FLOPs utilisation (MFU).

A multiply-add is 2 FLOPs. Only products of matrices count: norms, activations, gates, softmax,
short convolutions (depthwise), the embedding lookup and the optimizer do not, as is usual for MFU,
since matrix units do not run them. Recomputed activations do not count either.

**Projections.** A weight [in, out] costs 2 in out per token, so every projection costs twice its
number of parameters (`megakda.models.params`). Of the routed experts a token uses ``top_k``.

**Linear attention** (KDA, GDN) in chunks of C = 64 tokens, per head. Kimi Linear (arXiv 2510.26692,
eq. 13) counts, for T tokens and K = V = d,

    6 T d^2 + 3 T C d + T C^2

Per token and with K != V these terms are

    6 K V           three products with the [K, V] state, 2 K V each: what the state predicts (W S),
                    what the queries read (q S), and the update (k^T V')
    C (2 K + V)     three triangular products inside the chunk, half of 2 C K or 2 C V each: scores
                    k k^T and q k^T over K, and the scores times V' over V
    C^2             the inverse of the unit lower triangular [C, C] matrix: C^3 per chunk

which is the report's formula at K = V. The report does not derive it; matching its terms to these
products is our inference. It leaves no room for applying the inverse to keys and values (W and U:
C (K + V) more, 13 percent at K = V = 128), so that is not counted here either and numbers compare
with published ones. GDN multiplies the same matrices; only its decay is one scalar per head.

**Full attention**, per head, causal: q k^T over Dqk key dims costs 2 T^2 Dqk and the scores times
values 2 T^2 Dv; half of each lies above the diagonal and does not count. Per sequence of T tokens:

    T^2 Dqk + T^2 Dv        (2 T^2 d at Dqk = Dv = d: the report's eq. 14)

so T (Dqk + Dv) per token, the mean over the sequence. MLA has Dqk = separate + shared key dims. The
latent is expanded to keys and values (kv_b) as in training, not absorbed as in decoding.

**Training** is 3 times forward: the backward pass has two products for each forward one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megakda.config.schema import ModelConfig
from megakda.errors import ConfigError
from megakda.models.params import (
    count_layers,
    count_parameters,
    full_attention_parameters,
    linear_attention_parameters,
)

CHUNK = 64  # tokens; the C of the report's formula, whatever chunk a kernel uses


@dataclass(frozen=True)
class FlopCount:
    """FLOPs per token at one context length. ``components`` adds up to ``forward``."""

    context: int
    components: dict[str, int]

    @property
    def forward(self) -> int:
        """FLOPs per token of the forward pass."""
        return sum(self.components.values())

    @property
    def training(self) -> int:
        """FLOPs per token of the forward and the backward pass together."""
        return 3 * self.forward


def linear_state_flops(head_dim_k: int, head_dim_v: int, chunk: int = CHUNK) -> int:
    """Forward FLOPs per token and head of KDA's or GDN's state arithmetic in chunk form.

    Kimi Linear (arXiv 2510.26692) eq. 13 per token, for keys and values of different size.
    """
    return 6 * head_dim_k * head_dim_v + chunk * (2 * head_dim_k + head_dim_v) + chunk * chunk


def full_attention_flops(head_dim_qk: int, head_dim_v: int, context: int) -> int:
    """Forward FLOPs per token and head of causal softmax attention, mean over ``context`` tokens.

    Kimi Linear (arXiv 2510.26692) eq. 14 per token, for keys and values of different size.
    """
    return context * (head_dim_qk + head_dim_v)


def _projections(parameters: dict[str, int]) -> int:
    return 2 * sum(count for name, count in parameters.items() if name.endswith("_proj"))


def flops_per_token(model: ModelConfig, context: int) -> FlopCount:
    """FLOPs per token of training on sequences of ``context`` tokens, by component.

    Components: linear_projections, linear_state, full_projections, full_attention, dense_ffn,
    router, routed_experts, shared_experts, lm_head. The formulas are in this module's docstring.

    Raises `ConfigError` for a context below 1 or an unknown layer pattern, mixer or feed-forward.
    """
    if context < 1:
        raise ConfigError(f"train.context={context!r}: must be at least 1 token; set a length.")
    layers, active = count_layers(model), count_parameters(model).active_components
    linear, mla, heads = model.linear, model.mla, model.num_heads
    state = linear_state_flops(linear.head_dim_k, linear.head_dim_v)
    scores = full_attention_flops(
        mla.qk_nope_head_dim + mla.qk_shared_head_dim, mla.v_head_dim, context
    )
    components = {
        "linear_projections": layers["linear"] * _projections(linear_attention_parameters(model)),
        "linear_state": layers["linear"] * heads * state,
        "full_projections": layers["full"] * _projections(full_attention_parameters(model)),
        "full_attention": layers["full"] * heads * scores,
    }
    for name in ("dense_ffn", "router", "routed_experts", "shared_experts", "lm_head"):
        components[name] = 2 * active[name]
    return FlopCount(context=context, components=components)


# Dense bf16 FLOP/s of the matrix units, first match wins, so variants stand before their family.
# Data sheets of Hopper print the rate with 2:4 sparsity; dense is half of it.
_PEAKS: tuple[tuple[str, float], ...] = (
    # NVIDIA A100 Tensor Core GPU data sheet: 312 dense, SXM and PCIe alike.
    (r"\bA100\b", 312e12),
    # NVIDIA H100 Tensor Core GPU data sheet: PCIe 1513, NVL 1671, SXM 1979 with sparsity.
    (r"\bH100\b.*\bPCIe\b", 756.5e12),
    (r"\bH100\b.*\bNVL\b", 835.5e12),
    (r"\bH100\b", 989.5e12),
    # NVIDIA H200 Tensor Core GPU data sheet: NVL 1671, SXM 1979 with sparsity.
    (r"\bH200\b.*\bNVL\b", 835.5e12),
    (r"\bH200\b", 989.5e12),
    # NVIDIA H800 Tensor Core GPU data sheet: PCIe 1513, SXM 1979 with sparsity.
    (r"\bH800\b.*\bPCIe\b", 756.5e12),
    (r"\bH800\b", 989.5e12),
    # NVIDIA HGX B200 data sheet: 36 PFLOP/s for 8 devices with sparsity.
    (r"\bB200\b", 2250e12),
)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device in FLOP/s, by the name that CUDA reports; None if unknown.

    A slice of a device (MIG) has no entry: it has a share of the units that its name does not say
    exactly. Set ``runtime.peak_tflops`` for such devices and for others that the table lacks.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, peak in _PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return peak
    return None


def mfu(tokens_per_second: float, flops_per_token: float, devices: int, peak: float) -> float:
    """Model FLOPs utilisation: the share (0 to 1) of the devices' peak that the model's FLOPs fill.

    ``tokens_per_second`` counts all devices together, ``flops_per_token`` is `FlopCount.training`
    for a training step, ``peak`` is FLOP/s of one device.

    Raises `ConfigError` unless ``devices`` and ``peak`` are positive.
    """
    if devices < 1 or not peak > 0:
        raise ConfigError(
            f"runtime.peak_tflops: MFU needs a positive peak and at least one device, not "
            f"{peak!r} FLOP/s on {devices!r} devices; set the peak of one device in TFLOP/s."
        )
    return tokens_per_second * flops_per_token / (devices * peak)
