"""Both token mixers against plain float64 formulas, causality, telemetry and dtypes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from megakda.config import compose
from megakda.config.schema import LinearAttentionConfig, MLAConfig
from megakda.kernels.kda.reference import kda_recurrence
from megakda.layers import mla as mla_module
from megakda.layers.kda import KimiDeltaAttention
from megakda.layers.mla import MultiLatentAttention
from megakda.layers.mla_context_parallel import latent_attention
from megakda.metrics.step_metrics import KdaTelemetry
from megakda.models.kimi_linear import transformer_config
from megakda.runtime.distributed import process_groups
from tests import jobs

HIDDEN, HEADS = 40, 3
TOKENS, BATCH = 70, 2  # more than one chunk of 64
LINEAR = dict(head_dim_k=16, head_dim_v=32, gate_rank=12, output_gate_rank=20)
MLA = dict(kv_lora_rank=28, qk_nope_head_dim=20, qk_shared_head_dim=6, v_head_dim=16)


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    """Process groups of one rank in this process."""
    config = compose(["runtime.threads=1"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}.items():
            patch.setenv(name, value)
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        with process_groups(config.parallel, config.runtime, torch.device("cpu")):
            yield


def core_config(*overrides: str) -> Any:
    config = compose(
        ["model.ffn=dense", f"model.hidden_size={HIDDEN}", f"model.num_heads={HEADS}", *overrides]
    )
    return transformer_config(config.model, config.parallel, "fp32")


def make(kind: type, settings: Any, *overrides: str) -> Any:
    """A layer with random parameters, every norm and gate away from its neutral value."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = kind(core_config(*overrides), 2, settings, HEADS, groups)
    generator = torch.Generator().manual_seed(0)
    for name, param in layer.named_parameters():
        values = torch.randn(param.shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.3 * values
        elif param.dim() == 2:
            values = values * 1.5 / math.sqrt(param.shape[1])
        param.data.copy_(values)
    return layer


def inputs() -> torch.Tensor:
    return torch.randn(TOKENS, BATCH, HIDDEN, generator=torch.Generator().manual_seed(1))


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Relative to the size of the whole."""
    assert found.shape == expected.shape
    error = (found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < 1e-5, f"{error:.1e}"


def weights(layer: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removesuffix(".weight"): param.detach().double()
        for name, param in layer.named_parameters()
    }


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x: torch.Tensor, base: float) -> torch.Tensor:
    """[S, b, heads, d]: the pair (i, i + d/2) of token t turns by t * base^(-2i/d)."""
    tokens, half = x.shape[0], x.shape[-1] // 2
    rates = base ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = (torch.arange(tokens, dtype=torch.float64)[:, None] * rates).view(tokens, 1, 1, half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat(
        [
            first * angle.cos() - second * angle.sin(),
            second * angle.cos() + first * angle.sin(),
        ],
        dim=-1,
    )


def plain_mla(layer: MultiLatentAttention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and the largest logit of each head."""
    mla, w, x = layer.mla, weights(layer), x.double()
    tokens, batch, _ = x.shape
    n, p, v_dim = mla.qk_nope_head_dim, mla.qk_shared_head_dim, mla.v_head_dim
    q = (x @ w["q_proj"].T).view(tokens, batch, HEADS, n + p)
    compressed = x @ w["kv_a_proj_with_mqa"].T
    latent, shared = compressed[..., : mla.kv_lora_rank], compressed[..., mla.kv_lora_rank :]
    latent = rms_norm(latent, w["kv_a_layernorm"], mla.kv_norm_eps)
    kv = (latent @ w["kv_b_proj"].T).view(tokens, batch, HEADS, n + v_dim)
    q_shared, shared = q[..., n:], shared.unsqueeze(2)
    if mla.rope:
        q_shared, shared = rotate(q_shared, mla.rope_base), rotate(shared, mla.rope_base)
    # One shared key for all heads
    scores = torch.einsum("qbhd,kbhd->bhqk", q[..., :n], kv[..., :n])
    scores = scores + torch.einsum("qbhd,kbd->bhqk", q_shared, shared.squeeze(2))
    scores = scores * (n + p) ** -0.5
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later, -math.inf)
    out = torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), kv[..., n:])
    out = out.reshape(tokens, batch, HEADS * v_dim) @ w["o_proj"].T
    return out, scores.amax((0, 2, 3))


MLA_VARIANTS = {
    "no_positions": MLAConfig(**MLA),
    "rope": MLAConfig(**MLA, rope=True, rope_base=50.0),
    "large_norm_eps": MLAConfig(**MLA, kv_norm_eps=0.5),
}


@pytest.mark.parametrize("mla", MLA_VARIANTS.values(), ids=MLA_VARIANTS)
def test_mla_is_the_formula(mla):
    layer = make(MultiLatentAttention, mla)
    out, bias = layer(inputs())
    assert bias is None
    assert_close(out.detach(), plain_mla(layer, inputs())[0])


def results(layer: MultiLatentAttention) -> list[torch.Tensor]:
    """The output, and gradients of the input and of all parameters."""
    x = inputs().requires_grad_()
    out, _ = layer(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    layer.zero_grad()
    (out * weights).sum().backward()
    return [out.detach(), *(t.grad for t in (x, *layer.parameters()) if t.grad is not None)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("variant", ["no_positions", "rope"])
def test_mla_records_its_largest_logits(variant, recompute):
    """Nothing else changes, and only training counts."""
    overrides = ["parallel.recompute=selective"] if recompute else []
    layer = make(MultiLatentAttention, MLA_VARIANTS[variant], *overrides)
    assert layer.recompute_core == recompute
    names = layer.state_dict().keys()
    before = results(layer)
    assert layer.max_logits is None

    layer.record_max_logits()
    assert layer.max_logits.dtype == torch.float32 and layer.max_logits.isneginf().all()
    layer.eval()
    validated = layer(inputs())[0]
    layer.train()
    with torch.no_grad():
        layer(inputs())
    assert layer.max_logits.isneginf().all()
    assert_close(validated.detach(), before[0].double())

    for _ in range(2):
        for ours, theirs in zip(results(layer), before, strict=True):
            assert_close(ours, theirs.double())
    expected = plain_mla(layer, inputs())[1]
    torch.testing.assert_close(layer.max_logits.double(), expected, rtol=1e-5, atol=0)
    assert layer.state_dict().keys() == names

    with torch.no_grad():
        layer.q_proj.weight *= -0.1  # a smaller maximum leaves the larger one
    smaller = plain_mla(layer, inputs())[1]
    assert (smaller < expected).all()
    results(layer)
    torch.testing.assert_close(layer.max_logits.double(), expected, rtol=1e-5, atol=0)
    layer.record_max_logits()
    results(layer)
    torch.testing.assert_close(layer.max_logits.double(), smaller, rtol=1e-5, atol=0)


def test_mla_records_nan():
    layer = make(MultiLatentAttention, MLA_VARIANTS["no_positions"])
    with torch.no_grad():
        layer.q_proj.weight[-1] = math.nan  # of the last head
    layer.record_max_logits()
    for _ in range(2):
        layer(inputs())
        assert layer.max_logits.isnan().tolist() == [False, False, True]
        with torch.no_grad():
            layer.q_proj.weight.nan_to_num_()


def test_recording_and_recomputation_run_one_operator(monkeypatch):
    """The pass without a graph rounds as the one with it, or gradients are of something else."""
    calls = []

    def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(kwargs["max_logit"])
        return latent_attention(*args, **kwargs)

    monkeypatch.setattr(mla_module, "latent_attention", attend)
    mla = MLA_VARIANTS["no_positions"]
    layer = make(MultiLatentAttention, mla, "parallel.recompute=selective")
    results(layer)
    assert not calls
    layer.record_max_logits()
    results(layer)
    without_graph, with_graph = calls
    assert with_graph is layer.max_logits and without_graph is not with_graph
    assert torch.equal(without_graph, with_graph)


def test_only_rope_knows_positions():
    """Equal tokens in another order: the last one's output changes with rope, and only then."""
    for name in ("no_positions", "rope"):
        layer = make(MultiLatentAttention, MLA_VARIANTS[name])
        x = inputs()
        swapped = x.clone()
        swapped[[3, 9]] = x[[9, 3]]
        difference = (layer(x)[0][-1] - layer(swapped)[0][-1]).abs().max()
        assert (difference > 1e-3) == (name == "rope")


def plain_gates(layer: KimiDeltaAttention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The decay g [b, S, H, K or 1] in log space and beta [b, S, H]."""
    linear, w, x = layer.linear, weights(layer), x.double().transpose(0, 1)
    raw = x @ w["f_a_proj"].T @ w["f_b_proj"].T if linear.mixer == "kda" else x @ w["a_proj"].T
    raw = (raw + w["dt_bias"]).unflatten(-1, (HEADS, -1))
    rate = w["A_log"].exp().view(HEADS, 1)
    if linear.gate == "bounded":
        g = linear.gate_lower_bound / (1 + torch.exp(-rate * raw))
    else:
        g = -rate * torch.log1p(torch.exp(raw))
    return g, 1 / (1 + torch.exp(-(x @ w["b_proj"].T)))


def plain_kda(layer: KimiDeltaAttention, x: torch.Tensor) -> torch.Tensor:
    linear, w = layer.linear, weights(layer)
    g, beta = plain_gates(layer, x)
    x = x.double().transpose(0, 1)

    def project(name: str) -> torch.Tensor:
        y = x @ w[f"{name}_proj"].T
        if linear.conv_kernel:
            taps = w[f"{name}_conv1d"]
            past = torch.cat([y.new_zeros(BATCH, taps.shape[1] - 1, y.shape[2]), y], dim=1)
            y = sum(taps[:, j] * past[:, j : j + TOKENS] for j in range(taps.shape[1]))
            y = y / (1 + torch.exp(-y))
        return y.unflatten(-1, (HEADS, -1))

    q, k, v = project("q"), project("k"), project("v")
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    out, _ = kda_recurrence(q, k, v, g, beta, scale=linear.head_dim_k**-0.5)
    out = rms_norm(out, w["o_norm"], linear.norm_eps)
    if linear.output_gate != "none":
        gate = (x @ w["g_a_proj"].T @ w["g_b_proj"].T).view(out.shape)
        openness = 1 / (1 + torch.exp(-gate))
        out = out * (gate * openness if linear.output_gate == "swish" else openness)
    return (out.flatten(2) @ w["o_proj"].T).transpose(0, 1)


KDA_VARIANTS = {
    "softplus": {},
    "bounded": dict(gate="bounded", gate_lower_bound=-3.0),
    "gdn": dict(mixer="gdn"),
    "gdn_bounded": dict(mixer="gdn", gate="bounded"),
    "swish_output_gate": dict(output_gate="swish"),
    "no_output_gate": dict(output_gate="none"),
    "no_conv": dict(conv_kernel=0),
    "two_taps_large_eps": dict(conv_kernel=2, norm_eps=0.1),
}


def make_kda(variant: str = "softplus", *overrides: str) -> KimiDeltaAttention:
    settings = LinearAttentionConfig(**LINEAR, **KDA_VARIANTS[variant])
    return make(KimiDeltaAttention, settings, *overrides)


@pytest.mark.parametrize("variant", KDA_VARIANTS)
def test_kda_is_the_formula(variant):
    layer = make_kda(variant)
    out, bias = layer(inputs())
    assert bias is None
    assert_close(out.detach(), plain_kda(layer, inputs()))


def test_kda_has_the_parameters_of_its_variant():
    def names(variant: str) -> set[str]:
        return {name.removesuffix(".weight") for name, _ in make_kda(variant).named_parameters()}

    everything = names("softplus")
    conv = {f"{x}_conv1d" for x in "qkv"}
    decay, gate = {"f_a_proj", "f_b_proj"}, {"g_a_proj", "g_b_proj"}
    rest = {*(f"{x}_proj" for x in "qkvbo"), "A_log", "dt_bias", "o_norm"}
    assert everything == rest | conv | decay | gate
    assert names("gdn") == everything - decay | {"a_proj"}
    assert names("no_output_gate") == everything - gate
    assert names("no_conv") == everything - conv


@pytest.mark.parametrize("mixer", ["kda", "gdn", "mla", "mla_rope"])
@pytest.mark.parametrize("changed", [1, 40, TOKENS - 1])
def test_later_tokens_leave_earlier_outputs_alone(mixer, changed):
    if mixer.startswith("mla"):
        variant = MLA_VARIANTS["rope" if mixer == "mla_rope" else "no_positions"]
        layer = make(MultiLatentAttention, variant)
    else:
        layer = make_kda("softplus" if mixer == "kda" else "gdn")
    x = inputs()
    other = x.clone()
    other[changed, 0] += 1.0
    before, after = layer(x)[0], layer(other)[0]
    torch.testing.assert_close(after[:changed], before[:changed], rtol=0, atol=1e-6)
    torch.testing.assert_close(after[:, 1], before[:, 1], rtol=0, atol=1e-6)  # other sequences
    # Everything from there on may change, the token itself most.
    assert (after[changed, 0] - before[changed, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("recompute", [False, True])
def test_telemetry_counts_each_forward_pass_once(recompute):
    overrides = ["parallel.recompute=selective"] if recompute else []
    layer = make_kda("softplus", *overrides)
    assert layer.recompute_core == recompute
    with torch.no_grad():
        layer.A_log[0], layer.A_log[1] = 3.0, -6.0  # heads that forget all, and nothing
    g, beta = plain_gates(layer, inputs())
    decay = g.exp()
    saturated = ((decay < 0.01) | (decay > 0.999)).double()
    expected = [float(t.mean()) for t in (decay, beta, saturated)]
    assert 0.2 < expected[2] < 0.8

    telemetry = KdaTelemetry([layer], num_layers=3)
    layer(inputs())[0].sum().backward()
    assert telemetry.collect() == {"decay_mean": {}, "beta_mean": {}, "gate_saturated": {}}
    telemetry.watch(True)
    with torch.no_grad():  # validation
        layer(inputs())
    assert layer.telemetry is None
    for calls in (1, 2):
        layer(inputs())[0].sum().backward()
        assert layer.telemetry.tolist() == pytest.approx([*(calls * e for e in expected), calls])
    found = telemetry.collect()
    for name, value in zip(("decay_mean", "beta_mean", "gate_saturated"), expected, strict=True):
        assert found[name] == {"2": pytest.approx(value)}
    telemetry.watch(False)
    layer(inputs())[0].sum().backward()
    assert layer.telemetry is None


def dtypes_after_a_step(corpus: str) -> dict[str, torch.dtype]:
    """Of every parameter and buffer of a model in bf16, by name."""
    with jobs.trainer(["precision=bf16"], corpus) as run:
        run.step(run._batches(run.datasets.train, 0))
        (chunk,) = run.chunks
        tensors = [*chunk.module.named_parameters(), *chunk.module.named_buffers()]
        return {name: tensor.dtype for name, tensor in tensors}


FP32 = ("A_log", "dt_bias", "router.weight", "expert_bias", "local_tokens_per_expert")


def test_what_a_bf16_model_keeps_in_fp32(ranks, corpus):
    """Decay rates and all that routing depends on; nothing else."""
    (found,) = ranks.run(1, dtypes_after_a_step, corpus)
    expected = {name: torch.float32 if name.endswith(FP32) else torch.bfloat16 for name in found}
    assert found == expected
    for suffix in FP32:
        assert sum(name.endswith(suffix) for name in found) == 3  # of 4 layers


@pytest.mark.parametrize("overrides", [[], ["model.linear.mixer=gdn"], ["model.ffn=dense"]])
def test_every_weight_is_announced_before_it_is_read(ranks, corpus, overrides):
    """Overlapped parameter gathering waits for a weight in its module's forward pre-hook."""
    assert ranks.run(1, modules_without_hook, overrides, corpus) == [[]]


def modules_without_hook(overrides, corpus):
    """Modules of the model that hold weights and whose forward pre-hook did not run in a step."""
    with jobs.trainer(overrides, corpus) as run:
        model, seen = run.chunks[0].module, set()
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: seen.add(name))
        run.step(run._batches(run.datasets.train, 0))
        return [
            name
            for name, module in model.named_modules()
            if list(module.parameters(recurse=False)) and name not in seen
        ]
