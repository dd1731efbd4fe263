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


def run(q, k, v, indices, counts, block_sizes, scale, return_lse):
    """Contract and shapes: `kernels.block_sparse_attention`. Accumulates in float32 (float64 for float64)."""
    batch, q_slots, heads, dim = q.shape
    num_q = q_slots // BLOCK
    compute = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(q.shape)
    lse = q.new_full((batch, heads, q_slots), -torch.inf, dtype=torch.float32) if return_lse else None
    longest = int(counts.max()) if counts.numel() else 0
    if longest <= 0:
        return out, lse
    per_row = longest * BLOCK * 2 * (dim + BLOCK) * torch.finfo(compute).bits // 8
    step = max(1, _CHUNK_BYTES.get(q.device.type, _CHUNK_BYTES_ELSEWHERE) // per_row)
    ragged = int(counts.min()) < longest
    bias = _padding_bias(block_sizes, compute, empty_block=ragged)
    unlisted = block_sizes.numel()
    place = torch.arange(longest, device=q.device)
    for b in range(batch):
        for h in range(heads):
            keys, values = _blocks(k[b, :, h], bias, compute), _blocks(v[b, :, h], bias, compute)
            for first in range(0, num_q, step):
                rows = slice(first, min(first + step, num_q))
                slots = slice(first * BLOCK, rows.stop * BLOCK)
                picked = indices[b, h, rows, :longest]                      # [n, K]
                if ragged:
                    picked = torch.where(place < counts[b, h, rows, None], picked, unlisted)
                picked = picked.flatten().long()
                offset = None if bias is None else bias[picked].view(rows.stop - first, 1, longest * BLOCK)
                queries = q[b, slots, h].to(compute).mul(scale).view(-1, BLOCK, dim)
                rows_out, rows_lse = _softmax_attention(
                    queries, _gather(keys, picked, queries), _gather(values, picked, queries), offset)
                out[b, slots, h] = rows_out.flatten(0, 1).to(q.dtype)
                if lse is not None:
                    lse[b, h, slots] = rows_lse.flatten().to(torch.float32)
    return out, lse


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


def _softmax_attention(queries, keys, values, offset):
    """queries: [n, 64, D] scaled; keys, values: [n, L, D]; offset: [n, 1, L] or None -> [n, 64, D], [n, 64, 1]"""
    if offset is None:
        scores = torch.bmm(queries, keys.transpose(1, 2))
    else:
        scores = torch.baddbmm(offset, queries, keys.transpose(1, 2))
    peak = scores.amax(-1, keepdim=True)
    if offset is not None:
        peak.masked_fill_(peak == -torch.inf, 0)
    weights = scores.sub_(peak).exp_()
    total = weights.sum(-1, keepdim=True)
    return torch.bmm(weights, values).div_(torch.where(total == 0, 1, total)), peak + total.log()


SPEC = KernelSpec(
    name="reference",
    load=lambda: run,
    device_types=("cpu", "cuda", "rocm", "mps", "xpu"),
    auto_device_types=("cpu",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
)
