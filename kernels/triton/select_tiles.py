"""The k best key tiles of every query tile: scores, exact top-k and ascending lists, in two kernels.

A row of 2,000 scores for each of 64 query tiles would need 512 KB next to the compute units, so the scores of some
heads go to a buffer that an L2 cache about holds (`SCORE_BYTES`) and a second kernel reads them from there; heads
that do not fit go into further pairs of launches. Everything else stays in registers.

Scores are products in true float32: TF32 keeps 10 bits, which swaps tiles. The second kernel gives every row to as
few warps as can hold it: a sum within a warp needs no barrier. It finds the k-th largest score by bisection over
float32's bit patterns, made monotonic (at most 32 counts of the row, fewer when a cut that leaves exactly k comes
first), fills up from equal scores in the order of their index, and writes the lists that `block_sparse.py` reads.
"""
from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

SCORE_BYTES = 64 << 20
"""Bound on the scores held at once. The L2 cache has 50 MB on an H100 and 72 MB on an RTX 4090."""
SCORE_TILE = 64
SCORE_OPTIONS = {"DEPTH": 32, "num_warps": 4, "num_stages": 3}
"""Without spills on every card, three programs on a multiprocessor."""
_ALIGN = 16


@triton.jit(do_not_specialize=["queries", "keys"])
def score_tiles(
    QUERY_MEANS, KEY_MEANS, SCORES, scale, queries, keys, stride_s,
    D: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):
    """SCORES [heads, queries, stride_s] = scale * QUERY_MEANS @ KEY_MEANS.T, all contiguous.

    Launched over (cdiv(keys, TILE), cdiv(queries, TILE), heads). Columns from `keys` on are not written.
    """
    head = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * TILE + tl.arange(0, TILE)
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH)
    query = QUERY_MEANS + (head * queries + row)[:, None] * D + depth[None, :]
    key = KEY_MEANS + (head * keys + column)[None, :] * D + depth[:, None]
    scores = tl.zeros([TILE, TILE], tl.float32)
    for first in range(0, D, DEPTH):
        a = tl.load(query + first, mask=row[:, None] < queries, other=0.0)
        b = tl.load(key + first, mask=column[None, :] < keys, other=0.0)
        scores = tl.dot(a, b, scores, input_precision="ieee")
    out = SCORES + (head * queries + row)[:, None] * stride_s + column[None, :]
    tl.store(out, scores * scale, mask=(row[:, None] < queries) & (column[None, :] < keys))


@triton.jit(do_not_specialize=["keys", "kept", "blocks_per_tile", "always"])
def select_rows(
    SCORES, INDICES, stride_s, keys, kept, blocks_per_tile, always, ROW: tl.constexpr,
):
    """INDICES [heads, queries * m, kept * m + always] of SCORES [heads, queries, stride_s]; over (queries, heads).

    m = blocks_per_tile. Every list names the m blocks of each kept tile and then the `always` blocks after the last
    tile. 1 <= kept <= keys <= ROW.
    """
    query = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    column = tl.arange(0, ROW)
    score = tl.load(SCORES + query * stride_s + column, mask=column < keys, other=0.0)
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)                          # -0 is 0
    bits = score.to(tl.int32, bitcast=True)
    # As integers, negative floats run backwards: turn them round. What is no tile comes last.
    order = tl.where(column < keys, bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x80000000)

    low = tl.min(tl.where(column < keys, order, 0x7FFFFFFF), 0).to(tl.int64)
    high = tl.max(order, 0).to(tl.int64)
    while low < high:
        middle = (low + high + 1) >> 1
        found = tl.sum((order >= middle.to(tl.int32)).to(tl.int32), 0)
        high = tl.where(found == kept, middle, tl.where(found < kept, middle - 1, high))
        low = tl.where(found >= kept, middle, low)

    cut = low.to(tl.int32)
    above = (order > cut).to(tl.int32)
    level = (order == cut).to(tl.int32)
    room = kept - tl.sum(above, 0)
    before = tl.cumsum(above * 65536 + level, 0) - (above * 65536 + level)
    level_before = before & 0xFFFF
    is_kept = (above == 1) | ((level == 1) & (level_before < room))
    place = (before >> 16) + tl.minimum(level_before, room)

    length = kept * blocks_per_tile + always
    tail = tl.arange(0, 32)
    for copy in range(0, blocks_per_tile):
        listed = INDICES + (query * blocks_per_tile + copy) * length
        for inner in range(0, blocks_per_tile):
            tl.store(listed + place * blocks_per_tile + inner, column * blocks_per_tile + inner, mask=is_kept)
        for first in range(0, always, 32):
            tl.store(listed + kept * blocks_per_tile + first + tail, keys * blocks_per_tile + first + tail,
                     mask=first + tail < always)


def row_options(keys: int) -> dict[str, int]:
    """ROW and num_warps of `select_rows` for rows of `keys` scores: few, so that new lengths compile little."""
    row = max(512, triton.next_power_of_2(keys))
    return {"ROW": row, "num_warps": max(1, row // 1024)}


def run(query_means, key_means, k, scale, blocks_per_tile, always, *, out=None):
    """Contract and shapes: `kernels.select_tiles`."""
    batch, heads, queries, dim = query_means.shape
    keys = key_means.shape[2]
    indices = out
    if indices is None:
        indices = torch.empty((batch, heads, queries * blocks_per_tile, k * blocks_per_tile + always),
                              dtype=torch.int32, device=query_means.device)
    if indices.numel() == 0:
        return indices
    query_means, key_means, lists = (x.contiguous().flatten(0, 1) for x in (query_means, key_means, indices))
    stride = triton.cdiv(keys, _ALIGN) * _ALIGN
    at_once = max(1, min(batch * heads, SCORE_BYTES // (queries * stride * 4)))
    scores = torch.empty((at_once, queries, stride), dtype=torch.float32, device=query_means.device)
    with torch.cuda.device(scores.device) if scores.is_cuda else contextlib.nullcontext():
        for first in range(0, batch * heads, at_once):
            part = slice(first, first + at_once)
            count = len(lists[part])
            score_tiles[(triton.cdiv(keys, SCORE_TILE), triton.cdiv(queries, SCORE_TILE), count)](
                query_means[part], key_means[part], scores, scale, queries, keys, stride,
                D=dim, TILE=SCORE_TILE, **SCORE_OPTIONS)
            select_rows[(queries, count)](
                scores, lists[part], stride, keys, k, blocks_per_tile, always,
                **row_options(keys))
    return indices
