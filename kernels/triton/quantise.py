"""Keys as 8-bit integers and values in float16, for scores and sums that tensor cores compute faster.

Keys lose their mean over all tokens that queries may see, which no softmax notices and which takes off what all keys
share (SageAttention, arXiv 2410.02367), and become integers with a scale per block. Values are brought below 512 in
magnitude by a power of two, or stay as they are and the power is told, so that the sum of 64 of them with weights up to
1 is below the largest float16. Two passes bound by memory: sums and largest values, then the results, which lie where
the keys and values lay.
"""
from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..spec import BLOCK

NUM_WARPS = 4
BELOW = 9
"""The power of two that values stay below: 64 * 2 ** 9 is half of the largest float16."""


class Quantised(NamedTuple):
    """What attention reads in place of keys and values."""

    keys: torch.Tensor
    """int8 [B, S, H, D]; as they came without scales."""
    values: torch.Tensor
    """[B, S, H, D]: as they came, or in float16 and lowered by the exponents."""
    scales: torch.Tensor | None = None
    """Of the keys, float32 [B, H, blocks]."""
    mean: torch.Tensor | None = None
    """What was taken off the keys, float32 [B, H, D]."""
    exponents: torch.Tensor | None = None
    """float32 [B, H], for sums in float16; None: in float32."""


@triton.jit
def integers(x):
    """Rounded half away from zero, as int8: for |x| below 127.5."""
    return (x + tl.where(x < 0, -0.5, 0.5)).to(tl.int8)


@triton.jit
def _rows_of(SIZES, TOKEN_ROWS, block, BLOCK: tl.constexpr, GATHER: tl.constexpr):
    """The rows of a block, and which of them a query may see."""
    slot = tl.arange(0, BLOCK)
    seen = slot < tl.load(SIZES + block)
    row = block * BLOCK + slot
    if GATHER:
        row = tl.load(TOKEN_ROWS + row).to(tl.int64)
        seen = seen & (row >= 0)
    return row, seen


@triton.jit(do_not_specialize=["SIZES", "TOKEN_ROWS"])
def sum_keys(
    K, V, SUMS, LARGEST, SIZES, TOKEN_ROWS, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr, HALF: tl.constexpr,
):
    """Writes SUMS [B, H, blocks, D] over the finite keys of every block, contiguous; over (H, blocks, B).

    HALF: and LARGEST [B, H, blocks], the largest magnitude of the finite values.
    """
    head = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    dim = tl.arange(0, D)
    row, seen = _rows_of(SIZES, TOKEN_ROWS, block, BLOCK, GATHER)
    place = (batch * tl.num_programs(0) + head) * tl.num_programs(1) + block
    k = K + batch * stride_kb + head * stride_kh + row[:, None] * stride_ks + dim[None, :]
    keys = tl.load(k, mask=seen[:, None], other=0.0).to(tl.float32)
    tl.store(SUMS + place * D + dim, tl.sum(tl.where(tl.abs(keys) < float("inf"), keys, 0.0), 0))
    if HALF:
        v = V + batch * stride_vb + head * stride_vh + row[:, None] * stride_vs + dim[None, :]
        size = tl.abs(tl.load(v, mask=seen[:, None], other=0.0).to(tl.float32))
        tl.store(LARGEST + place, tl.max(tl.max(tl.where(size < float("inf"), size, 0.0), 1), 0))


@triton.jit(do_not_specialize=["SIZES", "TOKEN_ROWS", "tokens"])
def quantise_keys(
    K, V, INTEGERS, HALVES, KEY_SCALES, KEY_MEAN, EXPONENTS, SIZES, TOKEN_ROWS, tokens,
    stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    D: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr, COPY: tl.constexpr,
):
    """Writes INTEGERS int8 [B, H, tokens, D], where a key may be seen, and KEY_SCALES [B, H, blocks], contiguous; over
    (H, blocks, B). A block with a NaN has a scale of NaN, so that whoever reads the block has one too.

    COPY: and HALVES float16 [B, H, tokens, D], values lowered by EXPONENTS [B, H].
    """
    head = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    dim = tl.arange(0, D)
    row, seen = _rows_of(SIZES, TOKEN_ROWS, block, BLOCK, GATHER)
    one = batch * tl.num_programs(0) + head
    to = (one * tokens + row)[:, None] * D + dim[None, :]
    k = K + batch * stride_kb + head * stride_kh + row[:, None] * stride_ks + dim[None, :]
    keys = tl.load(k, mask=seen[:, None], other=0.0).to(tl.float32)
    keys = tl.where(seen[:, None], keys - tl.load(KEY_MEAN + one * D + dim)[None, :], 0.0)
    scale = tl.max(tl.max(tl.abs(keys), 1), 0) / 127.0 + 1e-7 + tl.sum(tl.sum(keys * 0.0, 1), 0)
    tl.store(INTEGERS + to, integers(keys / scale), mask=seen[:, None])
    tl.store(KEY_SCALES + one * tl.num_programs(1) + block, scale)
    if COPY:
        v = V + batch * stride_vb + head * stride_vh + row[:, None] * stride_vs + dim[None, :]
        values = tl.load(v, mask=seen[:, None], other=0.0).to(tl.float32) * tl.exp2(-tl.load(EXPONENTS + one))
        tl.store(HALVES + to, values.to(tl.float16), mask=seen[:, None])


def quantise(k, v, block_sizes, token_rows=None, half_sums=False) -> Quantised:
    """Keys and values [B, S, H, D] as attention with integer scores reads them. What no query may see is not written.

    half_sums: for sums in float16. Values of another type are copied then; those of float16 stay, and weights are to
    be lowered by the exponents, which are 0 unless values are large.
    """
    batch, tokens, heads, dim = k.shape
    blocks, device = block_sizes.numel(), k.device
    copy = half_sums and v.dtype != torch.float16
    held = torch.empty((batch, heads, tokens, dim), dtype=torch.int8, device=device)
    scales = torch.empty((batch, heads, blocks), dtype=torch.float32, device=device)
    sums = torch.empty((batch, heads, blocks, dim), dtype=torch.float32, device=device)
    largest = torch.empty_like(scales) if half_sums else None
    halves = torch.empty(held.shape, dtype=torch.float16, device=device) if copy else None
    shared = dict(D=dim, BLOCK=BLOCK, GATHER=token_rows is not None, num_warps=NUM_WARPS)
    strides = *k.stride()[:3], *v.stride()[:3]
    with torch.cuda.device(device) if k.is_cuda else contextlib.nullcontext():
        sum_keys[(heads, blocks, batch)](k, v, sums, largest, block_sizes, token_rows, *strides, **shared,
                                         HALF=half_sums)
        mean = sums.sum(2) / block_sizes.sum().clamp(min=1)
        exponents = _exponents(largest, copy) if half_sums else None
        quantise_keys[(heads, blocks, batch)](k, v, held, halves, scales, mean, exponents, block_sizes, token_rows,
                                              tokens, *strides, **shared, COPY=copy)
    return Quantised(held.transpose(1, 2), halves.transpose(1, 2) if copy else v, scales, mean, exponents)


def _exponents(largest, copied: bool):
    """float32 [B, H] from the largest values [B, H, blocks]: what brings them below 2 ** `BELOW`. Weights, which copied
    values leave as they are, are never raised."""
    return (torch.frexp(largest.amax(2))[1].float() - BELOW).clamp(min=-100 if copied else 0)
