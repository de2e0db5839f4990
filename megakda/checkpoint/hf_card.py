"""The model card of an exported folder."""

from __future__ import annotations

from typing import Any

from megakda import __version__
from megakda.checkpoint.hf_map import family
from megakda.config.schema import Config, ModelConfig
from megakda.config.stages import StageSettings, read_stages, summary
from megakda.models.params import count_layers, count_parameters

_BF16 = [
    'With `dtype="auto"` transformers loads all weights in bf16, also `A_log` and the routing',
    "biases, which are fp32 in these files: its logits are those of the run to bf16 precision",
    "only.",
    "",
]


def model_card(
    name: str,
    model: ModelConfig,
    manifest: dict[str, Any],
    config: Config | None,
    context: int,
    dtype: str,
) -> str:
    """README.md: what the model is, how it was trained as far as is known, how to load it.

    Args:
        name: of the folder.
        manifest: the checkpoint's.
        config: the run's; None where it is not known.
        context: tokens that the model is meant for.
        dtype: of the bulk of the weights.
    """
    count, layers = count_parameters(model), count_layers(model)
    mixers = {"KDA": layers["linear"], "MLA": layers["full"]}
    forwards = {"dense": layers["dense"], "mixture of experts": layers["moe"]}
    facts = {
        "architecture": f"{family(model)}, trained as `{model.name}`",
        "parameters": f"{count.total:,}, {count.active:,} active per token without the embedding",
        "layers": _counted(mixers) + "; feed-forwards: " + _counted(forwards),
        "hidden size, heads": f"{model.hidden_size:,}, {model.num_heads}",
        "vocabulary": f"{model.vocab_size:,}",
        "context": f"{context:,} tokens",
        "weights": dtype,
    }
    if layers["moe"]:
        moe = model.moe
        facts["experts"] = (
            f"{moe.num_experts} of width {moe.expert_ffn}, {moe.top_k} per token, "
            f"{moe.num_shared_experts} shared"
        )
    step = manifest.get("step", 0)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        f"tags: [{family(model)}, megakda]",
        "---",
        "",
        f"# {name}",
        "",
        f"Exported by megakda {__version__} from a checkpoint after step {step:,}.",
        "",
        *_table(facts),
        "",
        "## Training",
        "",
        *_table(_training(manifest, config)),
        "",
        "## Loading",
        "",
        "With transformers 5.23, whose logits megakda's tests compare with its own:",
        "",
        "    from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'    model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")',
        f'    tokenizer = AutoTokenizer.from_pretrained("{name}")',
        "",
        *(_BF16 if dtype == "bfloat16" else []),
        "With vLLM, in a release that knows this architecture (not tried by megakda's tests):",
        "",
        f"    vllm serve {name} --max-model-len {context}",
        "",
        "With megakda: `python tools/generate.py FOLDER`, or `tools/import_hf.py` to train on.",
    ]
    return "\n".join(lines) + "\n"


def _training(manifest: dict[str, Any], config: Config | None) -> dict[str, str]:
    """What is known of the training."""
    facts = {
        "steps": f"{manifest.get('step', 0):,}",
        "tokens": f"{manifest.get('tokens_seen', 0):,}",
        "precision": str(manifest.get("precision", "not known")),
        "tokenizer": str(manifest.get("tokenizer", {}).get("spec", "not known")).split(":")[0],
    }
    layout = {key: n for key, n in manifest.get("parallel", {}).items() if type(n) is int and n > 1}
    facts["layout"] = ", ".join(f"{key} {n}" for key, n in layout.items()) or "one rank"
    if "huggingface" in manifest:
        facts["origin"] = f"imported from {manifest['huggingface']['name']}"
    elif config is not None:
        optim, train = config.optim, config.train
        facts |= {
            "batch": ", then ".join(dict.fromkeys(map(_batch, read_stages(config)))),
            "optimizer": f"{optim.name}, learning rate {optim.lr:g}, betas {optim.beta1:g} and "
            f"{optim.beta2:g}, weight decay {optim.weight_decay:g}, clipped at {optim.clip_grad:g}",
            "schedule": summary(config),
            "seed": str(train.seed),
        }
    return facts


def _batch(stage: StageSettings) -> str:
    first, last = stage.batch
    grows = f"{first:,} to " if first < last else ""
    return f"{grows}{last:,} sequences of {stage.context:,} tokens"


def _counted(parts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in parts.items() if count)


def _table(facts: dict[str, str]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())]
