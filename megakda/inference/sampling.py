"""From logits to tokens: every request by its own settings and its own random numbers.

All rows are computed together, and yet what a row gives depends on nothing but itself: its logits,
its settings and one uniform number from its own generator. So a request with a seed repeats,
whatever else was in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megakda.inference.request import SamplingParams, TokenLogprob


def choose_tokens(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    uniforms: Sequence[float],
    seen: Sequence[torch.Tensor | None],
    vocabulary: int,
) -> list[int]:
    """One token per row.

    Args:
        logits: fp32 [N, V].
        params: of each row.
        uniforms: of each row a number in [0, 1); not used by greedy rows.
        seen: of each row the ids that its repetition penalty applies to, int64, or None.
        vocabulary: ids from here on are padding and never chosen.
    """
    logits = logits[:, :vocabulary]
    if any(ids is not None for ids in seen):
        logits = logits.clone()
    for n, (row, ids) in enumerate(zip(params, seen, strict=True)):
        if ids is not None:
            old = logits[n, ids]
            penalty = row.repetition_penalty
            logits[n, ids] = torch.where(old > 0, old / penalty, old * penalty)
    tokens = logits.argmax(-1)
    sampled = [n for n, row in enumerate(params) if row.temperature > 0]
    if sampled:
        index = torch.tensor(sampled, device=logits.device)
        chosen = [params[n] for n in sampled]
        tokens[index] = _draw(logits[index], chosen, [uniforms[n] for n in sampled])
    return tokens.tolist()


def _draw(
    logits: torch.Tensor, params: list[SamplingParams], uniforms: list[float]
) -> torch.Tensor:
    """Inverse transform sampling over the tokens that each row's filters leave; [n, V] -> [n]."""

    def column(values: Sequence[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64, device=logits.device).unsqueeze(1)

    # fp64, so that a rounding difference between batches moves no boundary by much.
    # The likeliest token at 0, so that no temperature is too small.
    shifted = logits.double() - logits.amax(-1, keepdim=True)
    scaled = shifted / column([row.temperature for row in params])
    values, order = scaled.sort(dim=-1, descending=True, stable=True)
    places = torch.arange(values.shape[1], device=values.device)
    # The likeliest token always stays. Each filter sees what those before it have left.
    k = column([min(row.top_k or places.numel(), places.numel()) for row in params])
    probs = values.masked_fill(places >= k, -torch.inf).softmax(-1)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(before >= column([row.top_p for row in params]), 0.0)
    least = column([row.min_p for row in params]) * probs[:, :1]
    probs = probs.masked_fill(probs < least, 0.0)
    # Summed in the order of ids: in that of the values, rounding that swaps two tokens which are
    # nearly equal would swap the whole of their shares.
    probs = torch.zeros_like(probs).scatter(1, order, probs)
    summed = probs.cumsum(-1)
    target = column(uniforms) * summed[:, -1:]
    place = torch.searchsorted(summed, target, right=True)
    last = values.shape[1] - 1 - (probs > 0).flip(-1).int().argmax(-1, keepdim=True)
    return torch.minimum(place, last).squeeze(1)  # a uniform just below 1 may round up


def token_logprobs(
    logits: torch.Tensor, tokens: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprob]:
    """Log-probabilities of `tokens` under the model, with each row's likeliest alternatives.

    Args:
        logits: fp32 [N, V], over the whole vocabulary, as in training.
        tokens: one per row.
        tops: how many alternatives each row wants.
    """
    if not tokens:
        return []
    logprobs = logits.log_softmax(-1)
    index = torch.tensor(tokens, device=logits.device).unsqueeze(1)
    own = logprobs.gather(1, index)
    ranks = ((logprobs > own).sum(-1) + 1).tolist()
    most = min(max(tops), logits.shape[1])
    values, ids = logprobs.topk(most, dim=-1) if most else (logprobs[:, :0], index[:, :0])
    return [
        TokenLogprob(token, value, rank, tuple(zip(top_ids[:n], top_values[:n], strict=True)))
        for token, value, rank, top_ids, top_values, n in zip(
            tokens,
            own.squeeze(1).tolist(),
            ranks,
            ids.tolist(),
            values.tolist(),
            tops,
            strict=True,
        )
    ]
