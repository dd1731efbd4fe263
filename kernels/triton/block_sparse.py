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
from .configs import config_for


@triton.jit
def _product(a, b, acc, INTERPRET: tl.constexpr):
    """acc + a @ b in float32. Triton's interpreter would multiply the bit patterns of bfloat16."""
    if INTERPRET:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@triton.jit(do_not_specialize=[
    "INDICES", "COUNTS", "SIZES",
    "stride_ib", "stride_ih", "stride_iq", "stride_ik", "stride_cb", "stride_ch", "stride_cq",
])
def block_sparse_forward(
    Q, K, V, OUT, LSE, INDICES, COUNTS, SIZES, scale_log2e,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_ib, stride_ih, stride_iq, stride_ik, stride_cb, stride_ch, stride_cq,
    D: tl.constexpr, BLOCK: tl.constexpr, RETURN_LSE: tl.constexpr, INTERPRET: tl.constexpr,
):
    """Writes OUT [B, Sq, H, D] and LSE [B, H, Sq], both contiguous; launched over (Sq / 64, H, B).

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

    q = Q + batch * stride_qb + head * stride_qh + row * BLOCK * stride_qs + slot[:, None] * stride_qs + dim[None, :]
    q_low = tl.load(q)
    if D > PANEL:
        q_high = tl.load(q + PANEL)
    k_head = K + batch * stride_kb + head * stride_kh
    v_head = V + batch * stride_vb + head * stride_vh
    k_offset = slot[None, :] * stride_ks + dim[:, None]
    v_offset = slot[:, None] * stride_vs + dim[None, :]
    listed = INDICES + batch * stride_ib + head * stride_ih + row * stride_iq
    count = tl.load(COUNTS + batch * stride_cb + head * stride_ch + row * stride_cq)

    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    acc_low = tl.zeros([BLOCK, PANEL], tl.float32)
    acc_high = tl.zeros([BLOCK, PANEL], tl.float32)
    block = tl.load(listed, mask=count > 0, other=0).to(tl.int64)
    size = tl.load(SIZES + block, mask=count > 0, other=0)
    for place in range(0, count):
        # One step early: looked up in its own step, a list entry would hold up the loads of K and V behind it.
        more = place + 1 < count
        next_block = tl.load(listed + (place + 1) * stride_ik, mask=more, other=0).to(tl.int64)
        next_size = tl.load(SIZES + next_block, mask=more, other=0)

        # Padding slots may hold NaN, which neither -inf in a score nor 0 in a weight would remove: read them as 0.
        k = k_head + block * BLOCK * stride_ks + k_offset
        k_low = tl.load(k, mask=slot[None, :] < size, other=0.0)
        scores = _product(q_low, k_low, tl.zeros([BLOCK, BLOCK], tl.float32), INTERPRET)
        if D > PANEL:
            k_high = tl.load(k + PANEL, mask=slot[None, :] < size, other=0.0)
            scores = _product(q_high, k_high, scores, INTERPRET)
        scores = scores * scale_log2e + tl.where(slot < size, 0.0, float("-inf"))[None, :]

        new_peak = tl.maximum(peak, tl.max(scores, 1))
        # While a row has seen no key its peak is -inf, and -inf - -inf is NaN.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(weights, 1)
        peak = new_peak

        weights = weights.to(V.dtype.element_ty)
        v = v_head + block * BLOCK * stride_vs + v_offset
        v_low = tl.load(v, mask=slot[:, None] < size, other=0.0)
        acc_low = _product(weights, v_low, acc_low * decay[:, None], INTERPRET)
        if D > PANEL:
            v_high = tl.load(v + PANEL, mask=slot[:, None] < size, other=0.0)
            acc_high = _product(weights, v_high, acc_high * decay[:, None], INTERPRET)
        block = next_block
        size = next_size

    slots = tl.num_programs(0) * BLOCK
    heads = tl.num_programs(1)
    inverse = 1.0 / tl.where(total == 0.0, 1.0, total)[:, None]
    first = (batch * slots + row * BLOCK) * heads + head
    out = OUT + first * D + slot[:, None] * (heads * D) + dim[None, :]
    tl.store(out, (acc_low * inverse).to(OUT.dtype.element_ty))
    if D > PANEL:
        tl.store(out + PANEL, (acc_high * inverse).to(OUT.dtype.element_ty))
    if RETURN_LSE:
        lse = (peak + tl.log2(total)) * 0.6931471805599453
        tl.store(LSE + (batch * heads + head) * slots + row * BLOCK + slot, lse)


INTERPRET = not isinstance(block_sparse_forward, triton.JITFunction)
PIPELINES = not triton.__version__.startswith("3.2.")
"""Triton 3.2 reports `operation scheduled before its operands` when it pipelines a loop that looks one step ahead."""


def run(q, k, v, indices, counts, block_sizes, scale, return_lse):
    """Contract and shapes: `kernels.block_sparse_attention`. Reads every operand through its strides, copies none."""
    batch, q_slots, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, q_slots), dtype=torch.float32, device=q.device) if return_lse else None
    if out.numel() == 0:
        return out, lse
    config = config_for(Call.of(q).capability, dim, q.dtype)
    if not PIPELINES:
        config = config._replace(num_stages=1)
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        block_sparse_forward[(q_slots // BLOCK, heads, batch)](
            q, k, v, out, lse, indices, counts, block_sizes, scale * math.log2(math.e),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *indices.stride(), *counts.stride(),
            D=dim, BLOCK=BLOCK, RETURN_LSE=return_lse, INTERPRET=INTERPRET,
            **config._asdict(),
        )
    return out, lse
