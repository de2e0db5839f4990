"""The generator beside `transformers`' on exported models: the same text."""

from __future__ import annotations

import pytest
import torch

from megakda.checkpoint.hf_export import export_hf
from tests.checkpoint import hf_jobs
from tests.inference.models import random_prompts

# A shape of the model and how many tokens to continue for.
SHAPES = {
    "hybrid": (256, []),
    "deep-groups": (
        96,
        [
            "model.num_layers=9",
            "model.num_heads=8",
            "model.moe.num_groups=2",
            "model.moe.top_groups=1",
        ],
    ),
    "dense": (96, ["model.num_heads=2", "model.ffn=dense", "model.num_layers=5"]),
    "latent-queries": (96, ["model.mla.q_lora_rank=24"]),
    "rotary": (96, ["model.pattern=0:1", "model.mla.rope=true"]),
}


def answers(folder: str, prompts: list[list[int]], tokens: int) -> list[list[int]]:
    """Greedy continuations by the engine, of a run's or an exported folder."""
    import megakda.runtime
    from megakda.inference.engine import Engine, EngineSettings
    from megakda.inference.loading import open_model
    from megakda.inference.request import SamplingParams

    with open_model(folder, device=megakda.runtime.install()) as model:
        engine = Engine(model, EngineSettings(max_context=tokens + 64))
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        return [answer.tokens for answer in engine.generate(prompts, params)]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_continuations_are_identical(ranks, tmp_path, shape):
    import transformers

    tokens, overrides = SHAPES[shape]
    run, folder = tmp_path / "run", tmp_path / "exported"
    ranks.run(1, hf_jobs.save, [*overrides, "model.vocab_size=257"], str(run))
    export_hf(run, folder)
    prompts = random_prompts([3, 40], seed=4)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        # No end of document: it is a token like others, as with ignore_eos.
        settings = {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
        model.generation_config.eos_token_id = None
        out = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **settings)
        expected.append(out[0, len(prompt) :].tolist())
    assert len(set(expected[0])) > 4  # no repetition of one token, which any model could agree on
    assert answers(str(run), prompts, tokens) == expected
    assert answers(str(folder), prompts, tokens) == expected
