"""The part of a chunk that needs no state: decay factors and scores, for many chunks at once.

`megakda/kernels/kda/README.md` derives the formulas; `chunk_torch.py` carries the state from chunk
to chunk.

Letters in shapes:
    K key size   V value size   C tokens of a chunk   M chunks
    s tokens of a block while blocks are merged in pairs: 1, 2, 4, ... C/2   P = M*C/2s such pairs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Chunks:
    """Decay factors of M chunks.

    With b_i = beta_i k_i (zero without the delta rule), D(i, j) the product of exp(g) over the
    tokens after j up to and including i, start before the first token of the chunk and end its last
    token:

    q, k: [M, C, K].
    beta: [M, C, 1].
    decay: [M, C, K], exp(g).
    rows: [M, C, 2, K], q_i * D(i, start) and b_i * D(i, start).
    columns: [M, C, K], k_j * D(end, j).
    total: [M, K], D(end, start).
    """

    q: torch.Tensor
    k: torch.Tensor
    beta: torch.Tensor
    decay: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    total: torch.Tensor


@dataclass
class Pairs:
    """Pairs of blocks of s tokens, just before they are merged.

    rows: [P, 2s, K], q_i and b_i of the right blocks, alternating, times the decay from their
        block's start up to and including token i.
    columns: [P, s, K], k_j of the left blocks, times the decay from after token j to their block's
        end.
    left_total, right_total: [P, 1, K], decay over a whole block.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    left_total: torch.Tensor
    right_total: torch.Tensor


class Scores:
    """What the tokens of a chunk read of each other.

    q: [M, C, C], sum_d q_id k_jd D_d(i, j) for j <= i, zero above the diagonal.
    inverse: [M, C, C], (I + A)^-1 with A_ij = sum_d b_id k_jd D_d(i, j) for j < i; complete once
        the last pairs are merged.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor) -> None:
        chunks, chunk, _ = k.shape
        self.q = k.new_zeros(chunks, chunk, chunk)
        torch.diagonal(self.q, dim1=1, dim2=2).copy_((q * k).sum(-1))
        self.inverse = k.new_ones(chunks * chunk, 1, 1)  # of blocks of one token

    def merge(self, pairs: Pairs) -> None:
        """Adds rows against columns, and merges the inverses of the blocks: the inverse of
        [[L, 0], [X, R]] is [[L^-1, 0], [-R^-1 X L^-1, R^-1]].
        """
        s = pairs.columns.shape[1]
        block = torch.bmm(pairs.rows, pairs.columns.mT).view(-1, s, 2, s)
        _lower_left(self.q, s).copy_(block[:, :, 0].unflatten(0, (len(self.q), -1)))
        left, right = self.inverse.view(-1, 2, s, s).unbind(1)
        corner = torch.bmm(right, torch.bmm(block[:, :, 1], left))
        self.inverse = corner.new_zeros(len(corner), 2 * s, 2 * s)
        self.inverse[:, :s, :s] = left
        self.inverse[:, s:, s:] = right
        torch.neg(corner, out=self.inverse[:, s:, :s])


def decay_factors(
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    delta_rule: bool,
    scores: Scores | None,
    merged: list[Pairs] | None,
) -> Chunks:
    """q, k, g [M, C, K], beta [M, C, 1] -> the decay factors; g is overwritten.

    D(i, j) is never formed for pairs of tokens, and never as a quotient. Blocks are merged in
    pairs: for i in the right block and j in the left one, D(i, j) = (product from the right block's
    start up to i) * (product from after j to the left block's end), both at most 1. The products
    are built by the same merging, with q, b and k multiplied in from the start, so nothing is
    subtracted, nothing overflows, and a decay too strong for the number format becomes the zero it
    stands for.

    On the way, `scores` are filled, and copies of the pairs are appended to `merged` for
    `scores_backward`, smallest first; each where given.
    """
    chunks, chunk, key_dim = k.shape
    decay = g.exp_()
    rows = k.new_empty(chunks, chunk, 2, key_dim)
    torch.mul(q, decay, out=rows[:, :, 0])
    torch.mul(k * beta if delta_rule else torch.zeros_like(k), decay, out=rows[:, :, 1])
    columns = k.clone()
    total = decay.view(-1, key_dim)
    s = 1
    while s < chunk:
        left_total, right_total = total.view(-1, 2, 1, key_dim).unbind(1)
        pairs = Pairs(_right(rows, s), _left(columns, s), left_total, right_total)
        if merged is not None:
            copies = pairs.rows.clone(), pairs.columns.clone()
            merged.append(Pairs(*copies, left_total, right_total))
        if scores is not None:
            scores.merge(pairs)
        pairs.rows.mul_(left_total)
        pairs.columns.mul_(right_total)
        total = (left_total * right_total).squeeze(1)
        s *= 2
    return Chunks(q, k, beta, decay, rows, columns, total.view(chunks, key_dim))


def decay_factors_backward(
    chunks: Chunks,
    merged: list[Pairs],
    dy: torch.Tensor,
    v_new: torch.Tensor,
    drows: torch.Tensor,
    dcolumns: torch.Tensor,
    dtotal: torch.Tensor,
    delta_rule: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients through the scores and the decay factors; overwrites drows and dcolumns.

    Each dL/dg_t is the sum, over all products that contain exp(g_t), of product * its gradient.
    Such terms are collected per token, `dprefix` for products that end at a token and `dsuffix` for
    products that begin after one, and shared out while blocks are split in halves again. The terms
    of a token with itself, which do not depend on the decay, never enter: taking them in and
    subtracting them, as the shorter q*dq - k*dk formula does, costs all digits of dg where the
    decay is strong.

    Args:
        chunks: from `decay_factors`.
        merged: from `decay_factors`.
        dy: [M, C, 2, V]; the gradients of the scores of q and of b are dy @ v_new^T.
        v_new: [M, C, V].
        drows: [M, C, 2, K], gradient of rows; without what comes through the scores, as the others.
        dcolumns: [M, C, K].
        dtotal: [M, K].
        delta_rule: as in `decay_factors`.

    Returns:
        dq, dk, dg [M, C, K] and dbeta [M, C, 1].
    """
    key_dim = dcolumns.shape[-1]
    rows, columns = chunks.rows, chunks.columns
    dprefix = rows[:, :, 0] * drows[:, :, 0]
    dprefix.addcmul_(rows[:, :, 1], drows[:, :, 1])
    dprefix[:, -1].addcmul_(dtotal, chunks.total)
    dsuffix = columns * dcolumns

    for pairs in reversed(merged):
        s = pairs.columns.shape[1]
        # A product over (start .. i in the right block) holds all of the left block, one over
        # (after j in the left block .. end) all of the right block.
        dprefix_left, dprefix_right = dprefix.view(-1, 2, s, key_dim).unbind(1)
        dsuffix_left = _left(dsuffix, s)
        dprefix_left[:, -1].add_(dprefix_right.sum(1))
        dprefix_right[:, -1].add_(dsuffix_left.sum(1))
        # What comes through the scores of this pair, and from beyond it through the merge.
        dblock = torch.bmm(_right(dy, s), _left(v_new, s).mT)
        dpair_rows = _bmm(dblock, pairs.columns)
        dpair_columns = _bmm(dblock.mT, pairs.rows)
        for dx, dpair, total in (
            (_right(drows, s), dpair_rows, pairs.left_total),
            (_left(dcolumns, s), dpair_columns, pairs.right_total),
        ):
            torch.addcmul(dpair, dx, total, out=dx)
        for row, drow in zip(
            pairs.rows.view(-1, s, 2, key_dim).unbind(2),
            dpair_rows.view(-1, s, 2, key_dim).unbind(2),
            strict=True,
        ):
            dprefix_right.addcmul_(row, drow)
        dsuffix_left.addcmul_(pairs.columns, dpair_columns)

    dq, db = drows.mul_(chunks.decay.unsqueeze(2)).unbind(2)
    diagonal = (dy[:, :, 0] * v_new).sum(-1, keepdim=True)
    dq.addcmul_(diagonal, chunks.k)
    dk = dcolumns.addcmul_(diagonal, chunks.q)
    if not delta_rule:
        return dq, dk, dprefix, torch.zeros_like(chunks.beta)
    dk.addcmul_(db, chunks.beta)
    return dq, dk, dprefix, (db * chunks.k).sum(-1, keepdim=True)


def _left(x: torch.Tensor, s: int) -> torch.Tensor:
    """The first of each pair of s-token blocks: view [M, C, D] -> [P, s, D]."""
    return x.view(-1, 2, s, x.shape[-1])[:, 0]


def _right(rows: torch.Tensor, s: int) -> torch.Tensor:
    """The second of each pair of s-token blocks: view [M, C, 2, D] -> [P, 2s, D]."""
    return rows.view(-1, 2, 2 * s, rows.shape[-1])[:, 1]


def _lower_left(scores: torch.Tensor, s: int) -> torch.Tensor:
    """Right rows against left columns of each pair: view [M, C, C] -> [M, C/2s, s, s]."""
    pairs = scores.shape[1] // (2 * s)
    blocks = scores.unflatten(2, (pairs, 2, s)).unflatten(1, (pairs, 2, s))
    # [M, pair, half, row, pair, half, column]: right half of the rows, left half of the columns
    return blocks[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)


def _bmm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [X, I, J] @ b [X, J, D]. For J <= 2 torch's CPU bmm runs a scalar loop, so that is
    written as sums of products."""
    if a.shape[2] > 2:
        return torch.bmm(a, b)
    out = a[:, :, :1] * b[:, :1]
    for j in range(1, a.shape[2]):
        out.addcmul_(a[:, :, j : j + 1], b[:, j : j + 1])
    return out
