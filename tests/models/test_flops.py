"""FLOPs per token, against the report's formulas and the parameter counts."""

import ast
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megakda.config.schema import LinearAttentionConfig, ModelConfig
from megakda.errors import ConfigError
from megakda.models.flops import (
    CHUNK,
    flops_per_token,
    full_attention_flops,
    linear_state_flops,
    mfu,
    peak_flops,
)
from megakda.models.params import count_parameters, linear_attention_parameters

REFERENCE = json.loads(
    (Path(__file__).parents[1] / "reference" / "kimi_linear_paper.json").read_text()
)
MODEL = ModelConfig(
    name="kimi_linear_48b",
    hidden_size=2304,
    num_layers=27,
    num_heads=32,
    vocab_size=163840,
    dense_ffn=9216,
)


def formula(name, **sizes):
    """Value of one of the reference file's formulas."""
    expression = ast.parse(REFERENCE["efficiency"][name].replace("^", "**"), mode="eval")
    return eval(compile(expression, name, "eval"), {"__builtins__": {}}, sizes)


@pytest.mark.parametrize("d", [16, 64, 128, 256])
@pytest.mark.parametrize("tokens", [64, 4096, 1 << 20])
def test_formulas_of_the_report(d, tokens):
    kda = formula("flops_per_head_kda", T=tokens, C=CHUNK, d=d)
    assert CHUNK == 64 and tokens * linear_state_flops(d, d) == kda
    full = formula("flops_per_head_full", T=tokens, d=d)
    assert tokens * full_attention_flops(d, d, tokens) == full


def test_key_and_value_sizes_enter_where_they_belong():
    # Products, at 2 FLOPs per multiply-add; those inside the chunk are triangular.
    key, value, chunk = 32, 48, 16
    with_state = 3 * (2 * key * value)
    inside = 2 * (2 * chunk * key) // 2 + (2 * chunk * value) // 2
    assert linear_state_flops(key, value, chunk) == with_state + inside + chunk**2
    assert full_attention_flops(192, 128, 1000) == (2 * 1000 * 192 + 2 * 1000 * 128) // 2


@pytest.mark.parametrize("mixer", ["kda", "gdn"])
@pytest.mark.parametrize("ffn", ["moe", "dense"])
def test_matrix_products_cost_two_flops_per_active_weight(mixer, ffn):
    model = replace(
        MODEL, ffn=ffn, linear=LinearAttentionConfig(mixer=mixer, head_dim_k=64, head_dim_v=96)
    )
    flops = flops_per_token(model, 4096).components
    products = sum(flops.values()) - flops["linear_state"] - flops["full_attention"]
    linear = linear_attention_parameters(model)
    no_product = sum(
        linear[name] for name in ("q_conv1d", "k_conv1d", "v_conv1d", "A_log", "dt_bias", "o_norm")
    )
    count = count_parameters(model)
    norms = count.components["norms"] + 7 * model.mla.kv_lora_rank
    assert products == 2 * (count.active - 20 * no_product - norms)


def test_48b_at_4096():
    count = flops_per_token(MODEL, 4096)
    assert count.context == 4096
    assert count.components["linear_state"] == 20 * 32 * 126_976
    assert count.components["full_attention"] == 7 * 32 * 4096 * (192 + 128)
    assert count.components["lm_head"] == 2 * 2304 * 163840
    assert count.forward == sum(count.components.values()) == 6_586_400_768
    assert count.training == 3 * count.forward


def test_only_full_attention_grows_with_the_context():
    short, long = flops_per_token(MODEL, 1024), flops_per_token(MODEL, 8192)
    grown = {name for name in short.components if long.components[name] != short.components[name]}
    assert grown == {"full_attention"}
    assert long.components["full_attention"] == 8 * short.components["full_attention"]
    assert flops_per_token(replace(MODEL, pattern="1:0"), 1024).components["full_attention"] == 0
    assert flops_per_token(replace(MODEL, pattern="0:1"), 1024).components["linear_state"] == 0


@pytest.mark.parametrize("context", [0, -1])
def test_context_must_be_positive(context):
    with pytest.raises(ConfigError, match="train.context"):
        flops_per_token(MODEL, context)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H800", 989.5),
        ("NVIDIA H800 PCIe", 756.5),
        ("NVIDIA B200", 2250),
    ],
)
def test_peaks_by_device_name(name, tera):
    assert peak_flops(name) == tera * 1e12


@pytest.mark.parametrize(
    "name",
    ["cpu", "", "NVIDIA GB200", "NVIDIA GH200 480GB", "Tesla V100-SXM2-32GB"]
    + ["NVIDIA H100 80GB HBM3 MIG 1g.10gb"],
)
def test_unknown_devices_have_no_peak(name):
    assert peak_flops(name) is None


def test_mfu():
    assert mfu(1e6, 2e10, devices=64, peak=1e15) == pytest.approx(0.3125)
    for devices, peak in ((0, 1e15), (1, 0.0), (1, float("nan"))):
        with pytest.raises(ConfigError, match="runtime.peak_tflops"):
            mfu(1e6, 2e10, devices, peak)


def test_counting_needs_no_torch():
    code = (
        "import sys; import megakda.models.flops; "
        "sys.exit(bool({'torch', 'megatron'} & {name.split('.')[0] for name in sys.modules}))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
