"""One forward pass of new tokens through this rank's part of the model, and its caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)

from megakda.layers.cached import CachedTokens, LatentCache, LayerCache, LinearCache, NewTokens
from megakda.layers.kda import KimiDeltaAttention
from megakda.layers.linear import ready_weight
from megakda.layers.mla import MultiLatentAttention
from megakda.models.sharding import ModelChunk


class ModelRunner:
    """The model on this rank with room for the past of several sequences. Calls are collective.

    Args:
        chunk: this rank's pipeline stage, in eval mode.
        rows: of the pools of states.
        pages: of the pools of latents. page_size: tokens of each.
    """

    def __init__(self, chunk: ModelChunk, rows: int, pages: int, page_size: int):
        self.chunk, self.page_size = chunk, page_size
        self.device = torch.device(torch.cuda.current_device())
        self.caches: dict[int, LayerCache] = {}
        with torch.inference_mode(False):  # what is made in it cannot be written outside of it
            for layer in chunk.decoder.layers:
                mixer = layer.self_attention
                if isinstance(mixer, KimiDeltaAttention):
                    self.caches[layer.layer_number] = mixer.make_cache(rows)
                else:
                    assert isinstance(mixer, MultiLatentAttention)
                    self.caches[layer.layer_number] = mixer.make_cache(pages, page_size)

    @torch.no_grad()
    def forward(
        self, sequences: list[NewTokens], tokens: Sequence[int], wanted: Sequence[int]
    ) -> torch.Tensor | None:
        """Computes new tokens and brings the caches up to date.

        Args:
            sequences: those with one new token first.
            tokens: ids of all new tokens, sequence by sequence.
            wanted: which of them to return logits of.

        Returns:
            On the last pipeline stage the logits, fp32 [len(wanted), vocabulary]; else None.
        """
        chunk = self.chunk
        new = CachedTokens(sequences, self.caches, self.page_size, self.device)
        assert len(tokens) == new.tokens
        config = chunk.config
        # Sequence parallelism shares the tokens out evenly.
        parts = config.tensor_model_parallel_size if config.sequence_parallel else 1
        padding = -len(tokens) % parts
        hidden = None
        if chunk.pre_process:
            ids = torch.tensor([[*tokens, *[0] * padding]]).to(self.device, non_blocking=True)
            hidden = chunk.embedding(ids, torch.zeros_like(ids))
        else:
            shape = ((len(tokens) + padding) // parts, 1, config.hidden_size)
            received = torch.empty(shape, dtype=config.pipeline_dtype, device=self.device)
            torch.distributed.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
            chunk.set_input_tensor(received)
        hidden = chunk.decoder(hidden, attention_mask=None, packed_seq_params=new)
        if not chunk.post_process:
            torch.distributed.send(
                hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank()
            )
            return None
        if config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden)
        index = torch.tensor(wanted, dtype=torch.int64).to(self.device)
        logits = F.linear(hidden[index, 0], ready_weight(chunk.output_layer))
        return gather_from_tensor_model_parallel_region(logits).float()

    def clear(self, row: int) -> None:
        """Row `row` of the states becomes that of a sequence without tokens."""
        for cache in self.caches.values():
            if isinstance(cache, LinearCache):
                cache.clear(row)

    def copy_row(self, source: int, target: int) -> None:
        """Copies the states of one row to another."""
        for cache in self.caches.values():
            if isinstance(cache, LinearCache):
                cache.copy(source, target)

    def copy_page(self, source: int, target: int) -> None:
        """Copies the latents of one page to another."""
        for cache in self.caches.values():
            if isinstance(cache, LatentCache):
                cache.copy_page(source, target)

    def bytes(self) -> tuple[int, int]:
        """Bytes of all states and of all latents on this rank."""
        states = sum(
            tensor.nbytes
            for cache in self.caches.values()
            if isinstance(cache, LinearCache)
            for tensor in (cache.state, *cache.convolutions)
        )
        latents = sum(
            cache.latents.nbytes for cache in self.caches.values() if isinstance(cache, LatentCache)
        )
        return states, latents
