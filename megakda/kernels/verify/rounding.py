"""Rounding to bf16 and TF32, bit by bit as GPUs and torch do it, on numpy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


def bf16_to_float(bits: Array) -> Array:
    """float32 values of bf16 numbers kept as uint16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float_to_bf16(values: Array) -> Array:
    """uint16 bits of the bf16 numbers nearest to `values`, ties to even; NaN stays NaN."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.atleast_1d(values).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + (odd + np.uint32(0x7FFF))) >> np.uint32(16)).astype(np.uint16)
    rounded = rounded.reshape(values.shape)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def round_to_bf16(values: Array) -> Array:
    """float32 values, each rounded to bf16."""
    return bf16_to_float(float_to_bf16(values))


def truncate_to_tf32(values: Array) -> Array:
    """float32 values without the 13 fraction bits that tensor cores do not look at."""
    bits = np.atleast_1d(np.asarray(values, dtype=np.float32)).view(np.uint32)
    truncated = (bits & np.uint32(0xFFFFE000)).view(np.float32).reshape(np.shape(values))
    return np.where(np.isfinite(values), truncated, values)


def round_to_tf32(values: Array) -> Array:
    """float32 values, each rounded to TF32's 10 fraction bits, ties away from zero (cvt.rna)."""
    values = np.asarray(values, dtype=np.float32)
    bits = np.atleast_1d(values).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded.view(np.float32).reshape(values.shape), values)


def multiply_split(
    left: Array, right: Array, terms: int, rounding: Callable[[Array], Array]
) -> Array:
    """left @ right as tensor cores do it on fp32 operands that are split into rounded terms.

    Term n is the rounded remainder after terms 0 .. n-1; products of terms i and j with
    i + j < `terms` are added in fp32: one product for TF32, three for TF32x3, six for BF16x6.
    """
    lefts, rights = _split(left, terms, rounding), _split(right, terms, rounding)
    product = np.matmul(lefts[0], rights[0])
    for i in range(terms):
        for j in range(terms - i):
            if i + j > 0:
                product = product + np.matmul(lefts[i], rights[j])
    return product


def _split(values: Array, terms: int, rounding: Callable[[Array], Array]) -> list[Array]:
    parts = []
    for _ in range(terms):
        parts.append(rounding(values))
        values = values - parts[-1]
    return parts
