"""Block-sparse attention whose scores are products of 8-bit integers: `block_sparse.py` on other operands.

Keys lose their mean over all tokens that queries may see, which no softmax notices and which takes off what all keys
share (SageAttention, arXiv 2410.02367), and become integers with a scale per block. Two passes over the keys, bound by
memory: sums, then integers, which lie where their keys lay.
"""
from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from ..spec import BLOCK
from . import block_sparse
from .block_sparse import integers

NUM_WARPS = 4


@triton.jit
def _keys(K, SIZES, TOKEN_ROWS, block, stride_ks, D: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr):
    """The keys of a block in float32, 0 where no query may see one; which may be seen, and their rows."""
    slot = tl.arange(0, BLOCK)
    dim = tl.arange(0, D)
    seen = slot < tl.load(SIZES + block)
    row = block * BLOCK + slot
    if GATHER:
        row = tl.load(TOKEN_ROWS + row).to(tl.int64)
        seen = seen & (row >= 0)
    keys = tl.load(K + row[:, None] * stride_ks + dim[None, :], mask=seen[:, None], other=0.0)
    return keys.to(tl.float32), seen, row


@triton.jit(do_not_specialize=["SIZES", "TOKEN_ROWS"])
def sum_keys(
    K, SUMS, SIZES, TOKEN_ROWS, stride_kb, stride_ks, stride_kh,
    D: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr,
):
    """Writes SUMS [B, H, blocks, D] over the finite keys of every block, contiguous; over (H, blocks, B)."""
    head = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    keys, _, _ = _keys(K + batch * stride_kb + head * stride_kh, SIZES, TOKEN_ROWS, block, stride_ks, D, BLOCK, GATHER)
    keys = tl.where(tl.abs(keys) < float("inf"), keys, 0.0)
    place = (batch * tl.num_programs(0) + head) * tl.num_programs(1) + block
    tl.store(SUMS + place * D + tl.arange(0, D), tl.sum(keys, 0))


@triton.jit(do_not_specialize=["SIZES", "TOKEN_ROWS", "tokens"])
def quantise_keys(
    K, INTEGERS, KEY_SCALES, KEY_MEAN, SIZES, TOKEN_ROWS, tokens, stride_kb, stride_ks, stride_kh,
    D: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr,
):
    """Writes INTEGERS int8 [B, H, tokens, D], where a key may be seen, and KEY_SCALES [B, H, blocks], contiguous; over
    (H, blocks, B).

    A block with a NaN has a scale of NaN, so that whoever reads the block has one too.
    """
    head = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    dim = tl.arange(0, D)
    k = K + batch * stride_kb + head * stride_kh
    keys, seen, row = _keys(k, SIZES, TOKEN_ROWS, block, stride_ks, D, BLOCK, GATHER)
    mean = tl.load(KEY_MEAN + (batch * tl.num_programs(0) + head) * D + dim)
    keys = tl.where(seen[:, None], keys - mean[None, :], 0.0)
    scale = tl.max(tl.max(tl.abs(keys), 1), 0) / 127.0 + 1e-7 + tl.sum(tl.sum(keys * 0.0, 1), 0)
    first = (batch * tl.num_programs(0) + head) * tokens
    tl.store(INTEGERS + (first + row)[:, None] * D + dim[None, :], integers(keys / scale), mask=seen[:, None])
    tl.store(KEY_SCALES + (batch * tl.num_programs(0) + head) * tl.num_programs(1) + block, scale)


def quantise(k, block_sizes, token_rows=None):
    """(integers int8 [B, S, H, D], scales [B, H, blocks], mean [B, H, D]) of keys [B, S, H, D], the latter two in
    float32. Where no query may see a key there is no integer."""
    batch, tokens, heads, dim = k.shape
    blocks = block_sizes.numel()
    sums = torch.empty((batch, heads, blocks, dim), dtype=torch.float32, device=k.device)
    found = torch.empty((batch, heads, tokens, dim), dtype=torch.int8, device=k.device)
    scales = torch.empty((batch, heads, blocks), dtype=torch.float32, device=k.device)
    shared = dict(D=dim, BLOCK=BLOCK, GATHER=token_rows is not None, num_warps=NUM_WARPS)
    with torch.cuda.device(k.device) if k.is_cuda else contextlib.nullcontext():
        sum_keys[(heads, blocks, batch)](k, sums, block_sizes, token_rows, *k.stride()[:3], **shared)
        mean = sums.sum(2) / block_sizes.sum().clamp(min=1)
        quantise_keys[(heads, blocks, batch)](k, found, scales, mean, block_sizes, token_rows, tokens,
                                              *k.stride()[:3], **shared)
    return found.transpose(1, 2), scales, mean


def run(q, k, v, indices, counts, block_sizes, scale, return_lse, token_rows=None, gate=None, coarse=None,
        blocks_per_tile=1, tile_grid=None, far=None, far_lse=None, *, out=None, lse=None):
    """Contract and shapes: `kernels.block_sparse_attention`, but for the rounding of q and k to 8 bits."""
    if q.numel() == 0 or k.numel() == 0:
        return block_sparse.run(q, k, v, indices, counts, block_sizes, scale, return_lse, token_rows, gate, coarse,
                                blocks_per_tile, tile_grid, far, far_lse, out=out, lse=lse)
    return block_sparse.run(q, k, v, indices, counts, block_sizes, scale, return_lse, token_rows, gate, coarse,
                            blocks_per_tile, tile_grid, far, far_lse, out=out, lse=lse,
                            int8=quantise(k, block_sizes, token_rows))
