"""The specification of a kernel, in plain torch: gathers only the selected keys, on any device.

Not a toy on a CPU, where it beats dense attention at useful sparsities (`make bench`). On a GPU the gathers
cost more than dense attention saves, so `auto` leaves it alone there.
"""
from __future__ import annotations

import torch

from .spec import BLOCK, KernelSpec

_CHUNK_BYTES = {"cpu": 8 << 20}
"""Bound on gathered keys, values and scores held at once: what a CPU's caches hold."""
_CHUNK_BYTES_ELSEWHERE = 256 << 20


def run(q, k, v, indices, counts, block_sizes, scale, return_lse, token_rows=None, gate=None, coarse=None,
        blocks_per_tile=1, tile_grid=None, far=None, far_lse=None, *, out=None, lse=None):
    """Contract and shapes: `kernels.block_sparse_attention`. Accumulates in float32 (float64 for float64)."""
    batch, tokens, heads, dim = q.shape
    compute = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(q.shape) if out is None else out
    if return_lse and lse is None:
        lse = q.new_empty((batch, heads, tokens), dtype=torch.float32)
    listed = indices.shape[2]
    longest = int(counts.max()) if counts.numel() else 0
    ragged = longest > 0 and int(counts.min()) < longest
    bias = _padding_bias(block_sizes, compute, empty_block=ragged)
    slots = None if token_rows is None else token_rows.clamp(min=0).long()
    for b in range(batch):
        for h in range(heads):
            queries, keys, values = (x[b, :, h] if slots is None else x[b, :, h].index_select(0, slots)
                                     for x in (q, k, v))
            keys, values = _blocks(keys, bias, compute), _blocks(values, bias, compute)
            head_out = queries.new_zeros(queries.shape, dtype=compute)
            head_lse = queries.new_full(queries.shape[:1], -torch.inf, dtype=compute)
            if far is not None:
                _start(head_out, head_lse, far[b, h], far_lse[b, h], blocks_per_tile * BLOCK)
            parts = [(slice(0, listed), indices[b, h, :, :longest], counts[b, h] if ragged else None)]
            if listed * BLOCK < len(queries):
                every = torch.arange(block_sizes.numel(), device=q.device)
                rest = slice(listed, len(queries) // BLOCK)
                parts.append((rest, every.expand(rest.stop - listed, -1), None))
            for rows, lists, lengths in parts:
                part = slice(rows.start * BLOCK, rows.stop * BLOCK)
                _attend(queries[part], keys, values, lists, lengths, bias, scale, head_out[part], head_lse[part],
                        started=far is not None and rows.start == 0)
            if coarse is not None:
                _add_coarse(head_out, gate[b, :, h].index_select(0, slots), coarse[b, h], blocks_per_tile * BLOCK)
            if slots is None:
                out[b, :, h] = head_out.to(q.dtype)
            else:
                is_token = token_rows >= 0
                out[b, slots[is_token], h] = head_out[is_token].to(q.dtype)
                head_lse = head_lse.new_empty(tokens).index_copy_(0, slots[is_token], head_lse[is_token])
            if lse is not None:
                lse[b, h] = head_lse.to(torch.float32)
    return out, lse


def _start(out, lse, far, far_lse, slots):
    """Into out [S, D] and lse [S] of one head what its queries have seen already.   far: [N, D];  slots per tile"""
    rows = far.shape[0] * slots
    out[:rows].unflatten(0, (-1, slots)).copy_(torch.where(far_lse == -torch.inf, 0, far.T).T[:, None])
    lse[:rows].unflatten(0, (-1, slots)).copy_(far_lse[:, None])


def _attend(queries, keys, values, lists, lengths, bias, scale, out, lse, started):
    """One head's query blocks over their lists, into out [n*64, D] and lse [n*64], which hold 0 and -inf or, with
    `started`, what was seen before.

    queries: [n*64, D];  keys, values: [blocks, 64, D];  lists: [n, K];  lengths: [n], or None where all are K.
    """
    longest, dim = lists.shape[1], queries.shape[1]
    if longest == 0:
        return
    compute = keys.dtype
    per_row = longest * BLOCK * 2 * (dim + BLOCK) * torch.finfo(compute).bits // 8
    step = max(1, _CHUNK_BYTES.get(queries.device.type, _CHUNK_BYTES_ELSEWHERE) // per_row)
    place = torch.arange(longest, device=queries.device)
    for first in range(0, len(lists), step):
        picked = lists[first:first + step]                                  # [n, K]
        if lengths is not None:
            picked = torch.where(place < lengths[first:first + step, None], picked, len(keys) - 1)
        rows = len(picked)
        slots = slice(first * BLOCK, (first + rows) * BLOCK)
        picked = picked.flatten().long()
        offset = None if bias is None else bias[picked].view(rows, 1, longest * BLOCK)
        scaled = queries[slots].to(compute).mul(scale).view(-1, BLOCK, dim)
        start = (out[slots].view(-1, BLOCK, dim), lse[slots].view(-1, BLOCK, 1)) if started else None
        rows_out, rows_lse = _softmax_attention(
            scaled, _gather(keys, picked, scaled), _gather(values, picked, scaled), offset, start)
        out[slots], lse[slots] = rows_out.flatten(0, 1), rows_lse.flatten()


def _add_coarse(out, gate, coarse, slots):
    """out += gate * coarse of the slot's tile, for one head.   out, gate: [S, D];  coarse: [N, D];  slots per tile"""
    video = out[:coarse.shape[0] * slots].unflatten(0, (-1, slots))
    video.addcmul_(gate[:coarse.shape[0] * slots].unflatten(0, (-1, slots)).to(out.dtype),
                   coarse[:, None].to(out.dtype))


def _padding_bias(block_sizes, dtype, empty_block):
    """[Nkv, 64]: 0 for a valid key, -inf for padding; None when every block is full.

    empty_block: with one more block, all padding, for the places behind the end of a list.
    """
    if empty_block:
        block_sizes = torch.nn.functional.pad(block_sizes, (0, 1))
    valid = torch.arange(BLOCK, device=block_sizes.device) < block_sizes[:, None]
    if bool(valid.all()):
        return None
    return torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill_(~valid, -torch.inf)


def _blocks(x, bias, dtype):
    """One head's keys or values as contiguous blocks, padding zeroed.   [S, D] -> [blocks of bias, 64, D]"""
    blocks = x.to(dtype).reshape(-1, BLOCK, x.shape[-1])
    if bias is None:
        return blocks.contiguous()
    if len(bias) > len(blocks):
        blocks = torch.cat([blocks, blocks.new_zeros(1, BLOCK, x.shape[-1])])
    return torch.where((bias == 0)[..., None], blocks, 0)


def _gather(blocks, picked, queries):
    """[Nkv, 64, D], [n*K] -> [n, K*64, D]"""
    return blocks.index_select(0, picked).view(queries.shape[0], -1, blocks.shape[-1])


def _softmax_attention(queries, keys, values, offset, start=None):
    """queries: [n, 64, D] scaled; keys, values: [n, L, D]; offset: [n, 1, L] or None -> [n, 64, D], [n, 64, 1]

    start: a result of the same shapes over other keys, to be included, or None.
    """
    if offset is None:
        scores = torch.bmm(queries, keys.transpose(1, 2))
    else:
        scores = torch.baddbmm(offset, queries, keys.transpose(1, 2))
    peak = scores.amax(-1, keepdim=True)
    if start is not None:
        peak = torch.maximum(peak, start[1])
    if offset is not None:
        peak.masked_fill_(peak == -torch.inf, 0)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.bmm(weights, values)
    if start is not None:
        mass = (start[1] - peak).exp_()
        out.addcmul_(mass, start[0])
        total += mass
    return out.div_(torch.where(total == 0, 1, total)), peak + total.log()


SPEC = KernelSpec(
    name="reference",
    load=lambda: run,
    device_types=("cpu", "cuda", "rocm", "mps", "xpu"),
    auto_device_types=("cpu",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    gathers=lambda grid: True,
)
