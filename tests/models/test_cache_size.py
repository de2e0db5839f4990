"""The closed form against what the generator allocates, and the report's saving."""

from __future__ import annotations

import pytest

from megakda.config import compose
from megakda.inference.engine import Engine, EngineSettings
from megakda.models.cache_size import cache_size
from tests.inference.models import random_model


@pytest.mark.parametrize(
    "overrides",
    [[], ["model.linear.mixer=gdn"], ["model.linear.conv_kernel=0"], ["precision=bf16"]],
)
def test_the_caches_have_the_size_of_the_formula(overrides):
    with random_model(overrides) as model:
        settings = EngineSettings(max_sequences=3, max_context=64, prefix_slots=2, page_size=16)
        states, latents = Engine(model, settings).cache_bytes()
        size = cache_size(model.config, model.precision)
    assert states == 5 * size.states
    assert latents == 3 * 64 * size.per_token


def test_a_million_tokens_of_the_48b_models():
    """Of 27 layers 7 keep latents: 576 numbers of 2 bytes per token each."""
    sizes = {
        name: cache_size(compose([f"model={name}"]).model, "bf16")
        for name in ("kimi_linear_48b", "mla_48b")
    }
    hybrid, whole = sizes["kimi_linear_48b"], sizes["mla_48b"]
    assert (hybrid.per_token, whole.per_token) == (7 * 576 * 2, 27 * 576 * 2)
    assert hybrid.states == 20 * (32 * 128 * 128 * 4 + 3 * 3 * 4096 * 2)
    saved = 1 - hybrid.total(2**20) / whole.total(2**20)
    assert 0.735 < saved < 0.75  # the report's "up to 75 %"
