"""Forward pass over a selection of key blocks: one program per (batch, head, block of 64 queries).

Online softmax (Milakov & Gimelshein, arXiv 1805.02867) in base 2, accumulated in float32. Nothing that changes
with the sequence length is a constant of the kernel, so a length that was never seen before compiles nothing.
"""
from __future__ import annotations

import contextlib
import math

import torch
import triton
import triton.language as tl

from ..spec import BLOCK, Call
from .configs import Config, config_for, int8_config_for
from .quantise import Quantised, integers


@triton.jit
def _product(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a @ b in float32. Triton's interpreter would multiply the bit patterns of bfloat16."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit
def _weighted(weights, values, acc, decay, HALF: tl.constexpr, INTERPRET: tl.constexpr):
    """acc * decay + weights @ values. HALF: the products of a block are summed in float16, and blocks in float32."""
    if HALF:
        return acc * decay[:, None] + tl.dot(weights, values, out_dtype=tl.float16).to(tl.float32)
    else:
        return _product(weights, values, acc * decay[:, None], INTERPRET)


@triton.jit
def _listed_block(listed, stride_ik, place, count, dense, GATHER: tl.constexpr):
    """The key block at a place of the list, where there is one. A dense query block's list names every block.

    In 32 bits, which offsets into K and V outgrow: the loop is short of registers.
    """
    if GATHER:
        block = tl.load(listed + place * stride_ik, mask=(place < count) & (dense == 0), other=0)
        block = tl.where(dense & (place < count), place, block)
    else:
        block = tl.load(listed + place * stride_ik, mask=place < count, other=0)
    return block


@triton.jit(do_not_specialize=[
    "INDICES", "COUNTS", "SIZES", "TOKEN_ROWS", "COARSE", "FAR", "FAR_LSE",
    "stride_ib", "stride_ih", "stride_iq", "stride_ik", "stride_cb", "stride_ch", "stride_cq",
    "stride_mb", "stride_mh", "stride_mn", "lists", "tokens", "tiles", "blocks_per_tile",
    "stride_fb", "stride_fh", "stride_fn", "stride_lb", "stride_lh", "stride_ln", "far_tiles", "key_blocks",
])
def block_sparse_forward(
    Q, K, V, OUT, LSE, INDICES, COUNTS, SIZES, TOKEN_ROWS, GATE, COARSE, FAR, FAR_LSE, KEY_SCALES, KEY_MEAN,
    EXPONENTS, scale_log2e,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ib, stride_ih, stride_iq, stride_ik, stride_cb, stride_ch, stride_cq,
    stride_gb, stride_gs, stride_gh, stride_mb, stride_mh, stride_mn, lists, tokens, tiles, blocks_per_tile,
    stride_fb, stride_fh, stride_fn, stride_lb, stride_lh, stride_ln, far_tiles, key_blocks,
    D: tl.constexpr, BLOCK: tl.constexpr, RETURN_LSE: tl.constexpr, GATHER: tl.constexpr, COMBINE: tl.constexpr,
    START: tl.constexpr, INT8: tl.constexpr, HALF: tl.constexpr, INTERPRET: tl.constexpr,
):
    """Writes OUT [B, Sq, H, D] and LSE [B, H, Sq], both contiguous; launched over (Sq / 64, H, B).

    GATHER: Q, K, V, OUT and LSE hold `tokens` rows each, and slot s of the blocks is their row TOKEN_ROWS[s];
    launched over (slots / 64, H, B). The first `lists` query blocks have a list, those behind them are dense.
    COMBINE: adds GATE times the row of COARSE [B, H, tiles, D] that belongs to the query block.
    START: the softmax starts from the query block's row of FAR [B, H, far_tiles, D] and FAR_LSE [B, H, far_tiles].
    INT8: K holds the integers of `quantise.py`, in the order of the keys, KEY_SCALES [B, H, key_blocks] their
    scales and KEY_MEAN [B, H, D] what was taken off; queries become integers here, with a scale per row.
    HALF: with INT8; V is float16, and 64 weights times values are summed in float16. So that they fit, EXPONENTS [B, H]
    says by how many powers of two V has been lowered (where OUT is of another type) or the weights are to be.

    Head-major order: programs that run together share one head's keys and values, so these stay in the L2 cache.
    head_dim 128 goes through in two panels of 64: for a [64, 128] product Triton spreads the warps of an
    mma.sync card over the columns and sends the weights through shared memory; for [64, 64] they stay in registers.
    """
    PANEL: tl.constexpr = 64
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    slot = tl.arange(0, BLOCK)
    dim = tl.arange(0, PANEL)
    dense = False
    if GATHER:
        # Dense query blocks have the most to read: they start first.
        row = (row + lists) % tl.num_programs(0)
        dense = row >= lists

    q = Q + batch * stride_qb + head * stride_qh
    if GATHER:
        q_row = tl.load(TOKEN_ROWS + row * BLOCK + slot).to(tl.int64)
        is_row = q_row >= 0
        q += q_row[:, None] * stride_qs + dim[None, :]
        q_low = tl.load(q, mask=is_row[:, None], other=0.0)
        if D > PANEL:
            q_high = tl.load(q + PANEL, mask=is_row[:, None], other=0.0)
    else:
        q_row = slot
        is_row = slot < BLOCK
        q += row * BLOCK * stride_qs + slot[:, None] * stride_qs + dim[None, :]
        q_low = tl.load(q)
        if D > PANEL:
            q_high = tl.load(q + PANEL)
    if INT8:
        wide = q_low.to(tl.float32)
        mean = KEY_MEAN + (batch * tl.num_programs(1) + head) * D + dim
        largest = tl.max(tl.abs(wide), 1)
        odd = tl.sum(wide * 0.0, 1)                        # NaN where the row holds NaN or infinity: it stays there
        shared = tl.sum(wide * tl.load(mean)[None, :], 1)  # the part of a score that all keys of the row share
        if D > PANEL:
            wide_high = q_high.to(tl.float32)
            largest = tl.maximum(largest, tl.max(tl.abs(wide_high), 1))
            odd += tl.sum(wide_high * 0.0, 1)
            shared += tl.sum(wide_high * tl.load(mean + PANEL)[None, :], 1)
        row_scale = largest / 127.0 + 1e-7 + odd
        q_low = integers(wide / row_scale[:, None])
        if D > PANEL:
            q_high = integers(wide_high / row_scale[:, None])
        row_scale *= scale_log2e
        shared *= scale_log2e
        lowered = 0.0
        if HALF:
            exponents = EXPONENTS + batch * tl.num_programs(1) + head
            if V.dtype.element_ty == OUT.dtype.element_ty:
                lowered = tl.load(exponents)
        key_scales = KEY_SCALES + (batch * tl.num_programs(1) + head) * key_blocks
    k_head = K + batch * stride_kb + head * stride_kh
    v_head = V + batch * stride_vb + head * stride_vh
    k_offset = slot[None, :] * stride_ks + dim[:, None]
    v_offset = slot[:, None] * stride_vs + dim[None, :]
    listed = INDICES + batch * stride_ib + head * stride_ih + row * stride_iq
    count = COUNTS + batch * stride_cb + head * stride_ch + row * stride_cq
    if GATHER:
        count = tl.load(count, mask=(dense == 0), other=0)
        count = tl.where(dense, tl.num_programs(0), count)
    else:
        count = tl.load(count)

    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc_low = tl.zeros([BLOCK, PANEL], tl.float32)
    acc_high = tl.zeros([BLOCK, PANEL], tl.float32)
    if START:
        far_tile = row // blocks_per_tile
        # As vectors, for the reason given at `has_tile`.
        seen = FAR_LSE + batch * stride_lb + head * stride_lh + (far_tile + tl.zeros([BLOCK], tl.int64)) * stride_ln
        peak = tl.load(seen, mask=far_tile + tl.zeros([BLOCK], tl.int64) < far_tiles, other=float("-inf"))
        peak = peak * 1.4426950408889634
        if INT8:
            peak -= shared
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
        if HALF:
            total *= tl.exp2(-lowered)
        seen = FAR_LSE + batch * stride_lb + head * stride_lh + (far_tile + tl.zeros([PANEL], tl.int64)) * stride_ln
        has_far = far_tile + tl.zeros([PANEL], tl.int64) < far_tiles
        has_far = has_far & (tl.load(seen, mask=has_far, other=float("-inf")) != float("-inf"))
        far = FAR + batch * stride_fb + head * stride_fh + far_tile * stride_fn + dim
        far_low = tl.load(far, mask=has_far, other=0.0)
        if HALF:
            exponent = tl.load(exponents)
            far_low *= tl.exp2(-exponent)
        acc_low += far_low[None, :]
        if D > PANEL:
            far_high = tl.load(far + PANEL, mask=has_far, other=0.0)
            if HALF:
                far_high *= tl.exp2(-exponent)
            acc_high += far_high[None, :]
    block = _listed_block(listed, stride_ik, 0, count, dense, GATHER)
    size = tl.load(SIZES + block, mask=count > 0, other=0)
    if INT8:
        key_scale = tl.load(key_scales + block, mask=count > 0, other=0.0)
    if GATHER:
        kv_row = tl.load(TOKEN_ROWS + block * BLOCK + slot)
        block = _listed_block(listed, stride_ik, 1, count, dense, GATHER)
    for place in range(0, count):
        # One step early: looked up in its own step, a list entry would hold up the loads of K and V behind it.
        # With token rows in between, the entry is looked up two steps early and its rows one.
        if GATHER:
            next_size = tl.load(SIZES + block, mask=place + 1 < count, other=0)
            next_row = tl.load(TOKEN_ROWS + block * BLOCK + slot)
            next_block = _listed_block(listed, stride_ik, place + 2, count, dense, GATHER)
            if INT8:
                next_scale = tl.load(key_scales + block, mask=place + 1 < count, other=0.0)
            k = k_head + kv_row.to(tl.int64)[None, :] * stride_ks + dim[:, None]
            v = v_head + kv_row.to(tl.int64)[:, None] * stride_vs + dim[None, :]
        else:
            next_block = _listed_block(listed, stride_ik, place + 1, count, dense, GATHER)
            next_size = tl.load(SIZES + next_block, mask=place + 1 < count, other=0)
            k = k_head + block.to(tl.int64) * BLOCK * stride_ks + k_offset
            v = v_head + block.to(tl.int64) * BLOCK * stride_vs + v_offset
            if INT8:
                next_scale = tl.load(key_scales + next_block, mask=place + 1 < count, other=0.0)

        # Padding slots may hold NaN, which neither -inf in a score nor 0 in a weight would remove: read them as 0.
        k_low = tl.load(k, mask=slot[None, :] < size, other=0)
        if INT8:
            products = tl.dot(q_low, k_low, out_dtype=tl.int32)
            if D > PANEL:
                k_high = tl.load(k + PANEL, mask=slot[None, :] < size, other=0)
                products = tl.dot(q_high, k_high, products, out_dtype=tl.int32)
            scores = products.to(tl.float32) * (row_scale * key_scale)[:, None]
            scores += tl.where(slot < size, 0.0, float("-inf"))[None, :]
        else:
            scores = _product(q_low, k_low, tl.zeros([BLOCK, BLOCK], tl.float32), INTERPRET)
            if D > PANEL:
                k_high = tl.load(k + PANEL, mask=slot[None, :] < size, other=0)
                scores = _product(q_high, k_high, scores, INTERPRET)
            scores = scores * scale_log2e + tl.where(slot < size, 0.0, float("-inf"))[None, :]

        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # While a row has seen no key its peak is -inf, and -inf - -inf is NaN.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        decay = tl.exp2(peak - shift)
        if HALF:
            shift += lowered
        weights = tl.exp2(scores - shift[:, None])
        total = total * decay + tl.sum(weights, 1)
        peak = new_peak

        weights = weights.to(V.dtype.element_ty)
        v_low = tl.load(v, mask=slot[:, None] < size, other=0.0)
        acc_low = _weighted(weights, v_low, acc_low, decay, HALF, INTERPRET)
        if D > PANEL:
            v_high = tl.load(v + PANEL, mask=slot[:, None] < size, other=0.0)
            acc_high = _weighted(weights, v_high, acc_high, decay, HALF, INTERPRET)
        block = next_block
        size = next_size
        if GATHER:
            kv_row = next_row
        if INT8:
            key_scale = next_scale

    if INT8 and GATHER:
        # Read once more: kept since the beginning, they would take registers that the loop needs.
        q_row = tl.load(TOKEN_ROWS + row * BLOCK + slot, volatile=True).to(tl.int64)
        is_row = q_row >= 0
    heads = tl.num_programs(1)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]
    if HALF:
        if V.dtype.element_ty != OUT.dtype.element_ty:
            inverse *= tl.exp2(exponent if START else tl.load(exponents))
    out_low = acc_low * inverse
    out_high = acc_high * inverse
    if COMBINE:
        tile = row // blocks_per_tile
        # As a vector: broadcast from a scalar, Triton 3.9's interpreter has an int64 there, which is no mask to it.
        has_tile = tile + tl.zeros([PANEL], tl.int64) < tiles
        coarse = COARSE + batch * stride_mb + head * stride_mh + tile * stride_mn + dim
        gate = GATE + batch * stride_gb + head * stride_gh + q_row[:, None] * stride_gs + dim[None, :]
        mean_low = tl.load(coarse, mask=has_tile, other=0.0)
        out_low += tl.load(gate, mask=is_row[:, None] & has_tile[None, :], other=0.0).to(tl.float32) * mean_low[None, :]
        if D > PANEL:
            mean_high = tl.load(coarse + PANEL, mask=has_tile, other=0.0)
            gate_high = tl.load(gate + PANEL, mask=is_row[:, None] & has_tile[None, :], other=0.0)
            out_high += gate_high.to(tl.float32) * mean_high[None, :]

    if GATHER:
        out = OUT + ((batch * tokens + q_row) * heads + head)[:, None] * D + dim[None, :]
    else:
        first = (batch * tokens + row * BLOCK) * heads + head
        out = OUT + first * D + slot[:, None] * (heads * D) + dim[None, :]
    tl.store(out, out_low.to(OUT.dtype.element_ty), mask=is_row[:, None])
    if D > PANEL:
        tl.store(out + PANEL, out_high.to(OUT.dtype.element_ty), mask=is_row[:, None])
    if RETURN_LSE:
        lse = LSE + (batch * heads + head) * tokens + (q_row if GATHER else row * BLOCK + slot)
        if INT8:
            peak += shared + lowered
        tl.store(lse, (peak + tl.log2(total)) * 0.6931471805599453, mask=is_row)


INTERPRET = not isinstance(block_sparse_forward, triton.JITFunction)
PIPELINES = not triton.__version__.startswith("3.2.")
"""Triton 3.2 reports `operation scheduled before its operands` when it pipelines a loop that looks one step ahead."""


def run(q, k, v, indices, counts, block_sizes, scale, return_lse, token_rows=None, gate=None, coarse=None,
        blocks_per_tile=1, tile_grid=None, far=None, far_lse=None, *, out=None, lse=None,
        config: Config | None = None, int8: Quantised | None = None):
    """Contract and shapes: `kernels.block_sparse_attention`. Reads every operand through its strides, copies none.

    config: launch options to measure, taken as they are, in place of the table's for this card.
    int8: what `quantise.quantise` makes of keys and values; k and v are not read then.
    """
    batch, tokens, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if return_lse and lse is None:
        lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if config is None:
        config = (config_for if int8 is None else int8_config_for)(Call.of(q).capability, dim, q.dtype)
        config = config if PIPELINES else config._replace(num_stages=1)
    slots = tokens if token_rows is None else token_rows.numel()
    none = (0, 0, 0)
    k, v, key_scales, key_mean, exponents = Quantised(k, v) if int8 is None else int8
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        block_sparse_forward[(slots // BLOCK, heads, batch)](
            q, k, v, out, lse, indices, counts, block_sizes, token_rows, gate, coarse, far, far_lse,
            key_scales, key_mean, exponents, scale * math.log2(math.e),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *indices.stride(), *counts.stride(),
            *(none if gate is None else gate.stride()[:3]), *(none if coarse is None else coarse.stride()[:3]),
            indices.shape[2], tokens, 0 if coarse is None else coarse.shape[2], blocks_per_tile,
            *(none if far is None else far.stride()[:3]), *(none if far is None else far_lse.stride()),
            0 if far is None else far.shape[2], block_sizes.numel(),
            D=dim, BLOCK=BLOCK, RETURN_LSE=return_lse, GATHER=token_rows is not None, COMBINE=gate is not None,
            START=far is not None, INT8=int8 is not None, HALF=exponents is not None, INTERPRET=INTERPRET,
            **config._asdict(),
        )
    return out, lse
