"""Means of the tokens of every tile, of up to three tensors in one launch.

Bound by memory: every token is read once, 2*D bytes at a time, and a mean is written for 64 of them. Heads are the
fastest axis of the launch, because a token's heads lie side by side in memory.
"""
from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

from ..spec import BLOCK

NUM_WARPS = 4


@triton.jit
def _rows(x, row, stride_s, dim):
    """The rows of x that `row` names, in float32; -1 names a row of zeros."""
    return tl.load(x + row[:, None] * stride_s + dim[None, :], mask=row[:, None] >= 0, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["TOKEN_ROWS", "blocks_per_tile"])
def tile_means_forward(
    X, Y, Z, MEANS, TOKEN_ROWS, stride_xb, stride_xs, stride_xh, stride_yb, stride_ys, stride_yh,
    stride_zb, stride_zs, stride_zh, blocks_per_tile,
    D: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
):
    """Writes MEANS [PARTS, B, H, N, D], contiguous; over (H, N, B). Of Y and Z the first PARTS - 1 are read.

    Sums 16 running rows, so that threads exchange numbers once, at the end.
    """
    STEP: tl.constexpr = 16
    head = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    dim = tl.arange(0, D)
    step = tl.arange(0, STEP)
    x = X + batch * stride_xb + head * stride_xh
    y = Y + batch * stride_yb + head * stride_yh
    z = Z + batch * stride_zb + head * stride_zh
    x_sum = tl.zeros([STEP, D], tl.float32)
    y_sum = tl.zeros([STEP, D], tl.float32)
    z_sum = tl.zeros([STEP, D], tl.float32)
    found = tl.zeros([STEP], tl.int32)
    for block in range(0, blocks_per_tile):
        slots = TOKEN_ROWS + (tile * blocks_per_tile + block) * BLOCK + step
        for first in tl.static_range(0, BLOCK, STEP):
            row = tl.load(slots + first).to(tl.int64)
            found += (row >= 0).to(tl.int32)
            x_sum += _rows(x, row, stride_xs, dim)
            if PARTS > 1:
                y_sum += _rows(y, row, stride_ys, dim)
            if PARTS > 2:
                z_sum += _rows(z, row, stride_zs, dim)

    tokens = tl.maximum(tl.sum(found, 0), 1).to(tl.float32)
    part = tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * tl.num_programs(2) * D
    means = MEANS + ((batch * tl.num_programs(0) + head) * tl.num_programs(1) + tile) * D + dim
    tl.store(means, tl.sum(x_sum, 0) / tokens)
    if PARTS > 1:
        tl.store(means + part, tl.sum(y_sum, 0) / tokens)
    if PARTS > 2:
        tl.store(means + 2 * part, tl.sum(z_sum, 0) / tokens)


def run(parts, token_rows, tiles, blocks_per_tile, *, out=None):
    """Contract and shapes: `kernels.tile_means`. Reads every tensor through its strides, copies none."""
    first, last = parts[0], parts[-1]
    second = parts[1] if len(parts) > 1 else last
    batch, _, heads, dim = first.shape
    means = out
    if means is None:
        means = torch.empty((len(parts), batch, heads, tiles, dim), dtype=torch.float32, device=first.device)
    if means.numel() == 0:
        return means
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        tile_means_forward[(heads, tiles, batch)](
            first, second, last, means, token_rows, *first.stride()[:3], *second.stride()[:3], *last.stride()[:3],
            blocks_per_tile, D=dim, BLOCK=BLOCK, PARTS=len(parts), num_warps=NUM_WARPS)
    return means
