"""The typed schema of the recipe tree.

One dataclass per group under ``recipes/``. Hydra checks names and types while it composes;
`megakda.config.validate` then checks values against each other. A field's ``choices`` metadata
lists its legal values.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING


def _choice(default: str, *others: str) -> Any:
    return field(default=default, metadata={"choices": (default, *others)})


@dataclass
class LinearAttentionConfig:
    """The linear token mixer: KDA (channel-wise decay) or Gated DeltaNet (one decay per head)."""

    mixer: str = _choice("kda", "gdn")
    head_dim_k: int = 128
    head_dim_v: int = 128
    conv_kernel: int = 4  # taps of the causal short convolution on q, k and v; 0 switches it off
    gate: str = _choice("softplus", "bounded")
    gate_lower_bound: float = -5.0  # of the bounded gate, per step in log space, in [-5, 0)
    gate_rank: int = 128  # hidden -> rank -> heads * head_dim_k
    output_gate: str = _choice("sigmoid", "swish", "none")
    output_gate_rank: int = 128
    norm_eps: float = 1e-5


@dataclass
class MLAConfig:
    """Multi-head latent attention (Kimi Linear: no query compression, no positions)."""

    q_lora_rank: int | None = None  # width of a latent that queries are made from; null: none
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_shared_head_dim: int = 64  # one key part shared by all heads; rotated only with rope=true
    v_head_dim: int = 128
    kv_norm_eps: float = 1e-6  # of the latents' norms, of queries too
    rope: bool = False
    rope_base: float = 10000.0


@dataclass
class MoEConfig:
    """Sigmoid-scored mixture of experts with auxiliary-loss-free balancing."""

    num_experts: int = 256
    top_k: int = 8
    expert_ffn: int = 1024
    num_shared_experts: int = 1
    first_dense_layers: int = 1
    routed_scaling_factor: float = 2.446
    num_groups: int = 1  # groups of experts, for group-limited routing; 1: none
    top_groups: int = 1  # groups that a token may choose its experts from
    router_dtype: str = _choice("fp32", "fp64")  # of logits and scores; the weights stay fp32
    bias_update_rate: float = 1e-3


@dataclass
class ModelConfig:
    """Architecture. Nothing here depends on how the model is laid out over ranks."""

    name: str = MISSING
    hidden_size: int = MISSING
    num_layers: int = MISSING
    num_heads: int = MISSING
    vocab_size: int = MISSING
    pattern: Any = "3:1"  # linear:full, or one of "linear"/"full" per layer
    last_layer_full: bool = (
        True  # as in the 48B model; no effect where the pattern has no full layer
    )
    ffn: str = _choice("moe", "dense")
    dense_ffn: int = MISSING
    norm_eps: float = 1e-5
    init_std: float = 0.02
    linear: LinearAttentionConfig = field(default_factory=LinearAttentionConfig)
    mla: MLAConfig = field(default_factory=MLAConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)


@dataclass
class ParallelConfig:
    """How the model and the batch are laid out over ranks. Data parallel is what is left over."""

    tensor: int = 1
    sequence: bool = True  # sequence parallelism inside tensor-parallel groups; ignored at tensor=1
    pipeline: int = 1
    virtual_pipeline: int = 1  # model chunks per pipeline rank (interleaved 1F1B)
    pipeline_layers: list[int] | None = None  # layers per chunk, in model order; null: equal shares
    context: int = 1  # ranks that share each sequence
    context_mode: str = _choice(
        "state",  # of KDA; state: ranks exchange what their tokens do to the state;
        "heads",  # heads: all-to-all of tokens for heads;
        "two_level",  # two_level: heads among neighbours, states between groups of them
    )
    context_heads: int | None = None  # with two_level: ranks that exchange heads, as of one node
    context_layout: str = _choice(
        "zigzag",  # zigzag: a rank holds two segments of a sequence, one from each end, which
        "contiguous",  # balances causal attention; contiguous: it holds one
    )
    context_attention: str = _choice(
        "all_gather",  # of MLA; all_gather: the latents of all ranks at once; ring: from rank to
        "ring",  # rank, with less memory
    )
    expert: int = 1
    expert_tensor: int = 1
    distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    recompute: str = _choice("none", "full", "selective")
    recompute_head_groups: int = 0  # with full: KDA on its own, in so many groups of heads; 0: not
    recompute_modules: list[str] = field(
        default_factory=lambda: ["core_attn", "layernorm", "mlp", "moe"]
    )


@dataclass
class DataConfig:
    """Which tokens to train on. `paths` are prefixes of .bin/.idx pairs."""

    name: str = MISSING
    paths: list[str] = field(default_factory=list)
    weights: list[float] | None = None  # one per path; null: in proportion to the tokens
    split: list[float] = field(default_factory=lambda: [98.0, 2.0, 0.0])  # train, valid, test
    tokenizer: str = "byte"  # byte | hf:DIR | tiktoken:FILE
    prepare: str = _choice(
        "none",  # make the data set first if it is not there; stdlib: of the source text of
        "stdlib",  # Python's standard library; stdlib_chat: of questions about it, which its
        "stdlib_chat",  # docstrings answer
    )
    packing: str = _choice(
        "none",  # none: a stream cut every train.context tokens, across documents;
        "documents",  # documents: rows of whole documents, each with its own start, shuffled;
        "best_fit",  # best_fit: each in the row that it fills best, for the least padding
    )
    overlong: str = _choice(
        "split",  # of packed documents longer than train.context; split: parts of that length;
        "carry",  # carry: the first part fills what is left of a row (packing=documents only)
    )
    loss: str = _choice(
        "all",  # which tokens are trained on; answers: those of answers in conversations, which
        "answers",  # tools/preprocess_data.py --chat has marked (with packing alone)
    )
    cache: str | None = None  # index files; null: beside the first path
    num_workers: int = 0


@dataclass
class MuonConfig:
    """Of the matrices, where optim.name=muon; everything else gets AdamW."""

    momentum: float = 0.95
    nesterov: bool = True
    newton_schulz_steps: int = 5
    update_rms: float = 0.2  # an update is scaled by update_rms * sqrt(max(rows, columns))
    heads_per_matrix: int = 0  # cuts matrices with a row block per head into groups; 0: whole
    dtype: str = _choice("auto", "fp32", "bf16")  # of Newton-Schulz; auto: bf16 on a GPU, else fp32


@dataclass
class OptimConfig:
    name: str = _choice("adamw", "muon")
    lr: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    qk_clip: float | None = None  # tau: bound of MLA's attention logits, by QK-Clip; null: none
    muon: MuonConfig = field(default_factory=MuonConfig)


@dataclass
class ScheduleConfig:
    """Learning rate over steps: linear warmup, then `style` down to `min_lr`; or `stages`."""

    stages: list[Any] | None = None  # in order, see docs/schedules.md; the rest is then not read
    style: str = _choice("wsd", "cosine", "linear", "constant")
    warmup_steps: int = 20
    decay_steps: int = 0  # of WSD: the length of the final decay
    decay_shape: str = _choice("linear", "cosine", "exponential", "minus_sqrt")
    min_lr: float = 0.0


@dataclass
class GuardConfig:
    """What to do with a bad step: skip it, count it, and stop after too many in a row."""

    max_bad_steps: int = 10  # in a row; then training stops with an error
    spike_sigmas: float = 0.0  # skip when loss > mean + sigmas * std of the window; 0: never
    spike_window: int = 128


@dataclass
class CheckpointConfig:
    keep_last: int = 2
    keep_every: int = 0  # keep every checkpoint whose step divides by this for ever; 0: none
    async_save: bool = False


@dataclass
class TrainConfig:
    steps: int | None = 100  # null: what train.tokens come to, or as many as the stages take
    tokens: float | None = None  # the budget, padding included; null: none
    seed: int = 1234
    context: int = 4096  # tokens per sequence
    global_batch: int = 8  # sequences per optimizer step, over all ranks
    micro_batch: int = 1  # sequences per rank and forward pass
    out: str = "runs/${model.name}"
    save_every: int = 0  # steps, and where a stage of schedule.stages ends; 0: only at the end
    eval_every: int = 0  # steps; 0: only at the end
    eval_batches: int = 4  # global batches per validation; 0: no validation
    resume: str = "auto"  # auto | none | a checkpoint folder
    weights: str | None = None  # run or checkpoint whose weights to begin with; null: random ones
    guard: GuardConfig = field(default_factory=GuardConfig)


@dataclass
class LoggingConfig:
    every: int = 1  # steps between rows of metrics.jsonl
    telemetry_every: int = 10  # steps between KDA telemetry rows; 0: never
    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str = "megakda"
    wandb_name: str | None = None


@dataclass
class RuntimeConfig:
    device: str = _choice("auto", "cpu", "cuda")
    backend: str = _choice("torch", "transformer_engine")  # whose AdamW
    attention: str = _choice("torch", "flash_attn")  # kernels of packed and context-parallel MLA
    timeout_minutes: float = 30.0  # of collectives
    threads: int | None = None  # CPU threads per rank; null: cores / local ranks
    peak_tflops: float | None = (
        None  # per device, for MFU; null: from the device's name, else no MFU
    )


@dataclass
class ScaleConfig:
    """Divides a run down, to try a recipe on a few ranks (`megakda/config/scale.py` says how)."""

    steps: int | None = None  # in all, shared by the stages as in the recipe; null: nothing scales
    ranks: int = 1  # that the layout is for
    layers: int = 1  # at least; whole periods of model.pattern and what the model has beyond them
    width: int = 1  # divides model.hidden_size and the widths of feed-forwards
    heads: int = 1  # divides model.num_heads
    head_dim: int = 1  # divides sizes of keys and values, and ranks of latents and gates
    experts: int = 1  # divides model.moe.num_experts
    context: int = 4096  # tokens of the longest sequences; those of other stages in proportion
    batch: int = 8  # sequences of the largest batch; those of other stages in proportion


@dataclass
class Config:
    """The whole tree."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    precision: str = _choice("fp32", "bf16")
