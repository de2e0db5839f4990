"""Runs a model's layers on the meta device exactly as a CPU or a GPU would, but for the values.

Layers are the real ones, and so is autograd. What depends on the device is chosen here: a GPU's
operators are the Triton ones, whose wrappers allocate what they would on a GPU and whose kernels
are counted instead of launched; a CPU's are the PyTorch ones. Where values decide about sizes, in
the routing of tokens to experts, experts get equal shares.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from megakda.errors import ConfigError
from megakda.models.flops import linear_state_flops
from megakda.plan.recorder import ATTENTION, KDA, OTHER, Recorder

CPU, GPU = "cpu", "cuda"


def check_device(kind: str) -> None:
    """Whether `kind` can be planned for here.

    Raises:
        ConfigError: a GPU, without the package that its kernels are written in.
    """
    if kind == GPU and importlib.util.find_spec("triton") is None:
        raise ConfigError(
            "planning for a GPU runs the Triton operators' own allocations on the meta device and "
            "needs the triton package, though no GPU: pip install 'triton>=3.6'"
        )


@contextlib.contextmanager
def meta_device(kind: str, recorder: Recorder) -> Iterator[None]:
    """Within the block, tensors are made on the meta device and layers behave as on `kind`.

    Process groups have to be there (fake ones do).

    Args:
        kind: `CPU` or `GPU`.
        recorder: told of Triton kernels and of messages that the dispatcher does not see.
    """
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    # All of these have to be imported to be patched.
    from megakda.kernels import backend, tile_attention, tile_engines
    from megakda.kernels.kda import chunk_packed
    from megakda.layers import experts

    meta = torch.device("meta")

    def choose_backend(name: str | None, device: Any, known: Any = backend.BACKENDS) -> str:
        return name or ("triton" if kind == GPU else "torch")

    def engine_for(name: str | None, q: torch.Tensor) -> Any:
        # flash-attn need not be installed here; its kernels hold what torch's do.
        return tile_engines._CPU if kind == CPU else tile_engines._GPU

    def grouped(x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        if kind == CPU or x.dtype != torch.bfloat16:
            return experts_loop(x, weight, counts)
        offsets = torch.empty(len(counts), dtype=torch.int32, device=meta)
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)

    experts_loop = experts.grouped_linear
    with contextlib.ExitStack() as stack:

        def replace(target: Any, name: str, new: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, new))

        replace(torch.cuda, "current_device", lambda: meta)
        # There is no autocast on the meta device, and no code here turns it on.
        replace(torch, "autocast", lambda *args, **kwargs: contextlib.nullcontext())
        replace(F, "scaled_dot_product_attention", _attention(kind))
        replace(tile_attention, "engine_for", engine_for)
        replace(experts, "grouped_linear", grouped)
        replace(MoEAlltoAllTokenDispatcher, "preprocess", _equal_shares(recorder))
        replace(torch.distributed, "batch_isend_irecv", _sends(recorder))
        for module in _users_of(backend.choose_backend):
            replace(module, "choose_backend", choose_backend)
        if kind == CPU:
            replace(chunk_packed, "torch", _RealIntegers())
            recorder.mixed = True
            recorder.staged = ("all_gather", "reduce_scatter")
        if kind == GPU:
            for jit in _kernel_classes():
                replace(jit, "run", _counted(recorder))
        yield


def _users_of(function: Any) -> list[Any]:
    """Modules that have imported a function by its name."""
    name = function.__name__
    return [
        module
        for key, module in list(sys.modules.items())
        if key.startswith("megakda.") and module.__dict__.get(name) is function
    ]


def _attention(kind: str) -> Any:
    """`scaled_dot_product_attention` as torch would choose it, which it does by the device.

    A GPU's fused kernels save inputs, output and log-sum-exp; the memory-efficient one takes keys
    and values of different size, as MLA has. A CPU's takes equal sizes, or else the scores are
    laid out.
    """
    choose = F.scaled_dot_product_attention

    def attention(  # type: ignore[no-untyped-def]
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None
    ):
        if kind == GPU:
            assert attn_mask is None
            return torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, None, torch.is_grad_enabled(), 0.0, is_causal, scale=scale
            )[0]
        if query.shape[-1] == value.shape[-1]:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )[0]
        return choose(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)

    return attention


def _equal_shares(recorder: Recorder) -> Any:
    """The token dispatcher's preprocessing, every expert with its share of the tokens."""

    def preprocess(self: Any, routing_map: torch.Tensor) -> torch.Tensor:
        chosen = routing_map.size(0) * self.config.moe_router_topk
        shares = torch.tensor(
            [chosen // self.num_experts] * self.num_experts, dtype=torch.long, device="cpu"
        )
        shares[: chosen % self.num_experts] += 1
        self.num_out_tokens = recorder.selected = chosen
        # [expert-tensor x expert ranks, local experts]: what each of them sends to this rank
        received = shares.view(self.ep_size, -1)[self.ep_group.rank()]
        received = received.repeat(self.tp_size * self.ep_size, 1)
        if self.ep_size > 1 or self.tp_size > 1:
            self.input_splits = shares.view(self.ep_size, -1).sum(1).numpy()
            self.output_splits = received[: self.ep_size].sum(1).numpy()
            self.output_splits_tp = received.view(self.tp_size, -1).sum(1)
        if self.num_local_experts > 1:
            self.num_global_tokens_per_local_expert = received
        return received.sum(0)

    return preprocess


class _RealIntegers:
    """The module `torch`, for the operator for packed documents on a CPU: numbers of tokens, which
    it looks at, are real, and everything else is on the meta device."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(data: Any, device: Any = None) -> torch.Tensor:
        return torch.tensor(data, device="cpu")


def _sends(recorder: Recorder) -> Any:
    """`batch_isend_irecv` that counts what is sent."""

    def send(operations: list[Any]) -> list[Any]:
        for operation in operations:
            if operation.op is torch.distributed.isend:
                size = operation.tensor.numel() * operation.tensor.element_size()
                recorder.send("send", operation.group, size)
        return []

    return send


# ------------------------------------------------------------------ Triton


def _kernel_classes() -> list[Any]:
    """What `@triton.jit` makes: for a GPU, and where kernels are interpreted for tests."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    return [JITFunction, InterpretedFunction]


def _counted(recorder: Recorder) -> Any:
    """A kernel's `run` that counts it: every array it is given is read or written once."""

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        name = getattr(self, "__name__", None) or self.fn.__name__
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        tensors = [x for x in given.values() if isinstance(x, torch.Tensor)]
        size = sum(x.numel() * x.element_size() for x in tensors)
        if name.startswith("kda_") and "gate" not in name:
            recorder.kernel(KDA, _kda_flops(name, given), size)
        elif name == "tile_attention_kernel":
            queries, heads, wide = given["p_q"].shape
            # A tile is a row or a part of one, and sees no other row.
            pairs = heads * queries * given["p_k"].shape[0] // recorder.rows
            flops = 2 * pairs * (wide + given["p_v"].shape[-1])
            recorder.kernel(ATTENTION, flops // (2 if given["CAUSAL"] else 1), size)
        else:
            recorder.kernel(OTHER, 0, size)

    return run


def _kda_flops(name: str, given: dict[str, Any]) -> int:
    """Matrix products of one launch, term by term as `megakda.models.flops` counts them."""
    chunk, key = given.get("BT", 0), given["K"]
    value = given.get("W", given["V"]) if "V" in given else 0
    if name == "kda_intra_kernel":
        tokens = given["TOKENS"]
        per_token = (1 + given["HAS_Q"]) * chunk * key + chunk * chunk
    elif name == "kda_state_kernel":
        tokens = given["TOKENS"]
        per_token = (6 * key + chunk) * value if given["WRITE_O"] else 4 * key * value
    elif name == "kda_state_grad_kernel":
        tokens = given["TOKENS"]
        per_token = (6 * key + chunk) * value
    elif name == "kda_grad_kernel":
        batch, length = given["k"].shape[:2]
        tokens = batch * length
        per_token = 2 * linear_state_flops(key, value, chunk) - (6 * key + chunk) * value
    else:  # the fold, over ranges instead of tokens
        tokens = given["maps"].shape[0]
        per_token = 2 * key * key * value
    return tokens * given["HV"] * per_token
