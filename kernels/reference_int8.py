"""The specification of attention whose scores are products of 8-bit integers, in plain torch.

Keys lose their mean over all tokens that queries may see and become integers with a scale per block; queries become
integers with a scale per row. A score is the product of both integers and scales, exactly; what the mean adds to all
scores of a row is added back, so that the LSE and a softmax that has begun are the true ones. The rest is `reference`.
Which integer it is, is decided in float32, as in a kernel: in float64 halves would fall elsewhere.
"""
from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .spec import BLOCK, KernelSpec

LARGEST, FLOOR = 127, 1e-7
"""Of an integer, and what is added to every scale: a block of zeros has one."""


def rounded(x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """x as the integers of these scales hold it, in a dtype. Half is rounded away from zero."""
    quotient = x / scales
    return (quotient.abs() + 0.5).floor_().clamp_(max=LARGEST).copysign_(quotient).to(dtype) * scales.to(dtype)


def keys_as_held(k: Tensor, block_sizes: Tensor, token_rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys [B, S, H, D] as their integers hold them, their mean taken off and 0 where no query may see them, and that
    mean, [B, 1, H, D]. A block with a NaN is NaN; the mean leaves it out."""
    blocks = block_sizes.numel()
    rows = torch.arange(k.shape[1], device=k.device) if token_rows is None else token_rows.long()
    place = torch.arange(BLOCK, device=k.device).expand(blocks, -1)
    seen = ((place < block_sizes[:, None]).flatten() & (rows >= 0))[:, None, None]
    slots = torch.where(seen, k.index_select(1, rows.clamp(min=0)), 0).float()
    mean = slots.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).sum(1, keepdim=True) / block_sizes.sum().clamp(min=1)
    slots = torch.where(seen, slots - mean, 0).unflatten(1, (blocks, BLOCK))               # [B, blocks, 64, H, D]
    scales = slots.abs().amax((2, 4), keepdim=True) / LARGEST + FLOOR
    held = torch.where(seen, rounded(slots, scales, k.dtype).flatten(1, 2), 0)
    return torch.zeros_like(k).index_copy_(1, rows[rows >= 0], held[:, rows >= 0]), mean.to(k.dtype)


def run(q, k, v, indices, counts, block_sizes, scale, return_lse, token_rows=None, gate=None, coarse=None,
        blocks_per_tile=1, tile_grid=None, far=None, far_lse=None, *, out=None, lse=None):
    """Contract and shapes: `kernels.block_sparse_attention`. Computes in float32 (float64 for float64)."""
    q_wide, k_wide, v_wide = (x.to(torch.promote_types(q.dtype, torch.float32)) for x in (q, k, v))
    keys, mean = keys_as_held(k_wide, block_sizes, token_rows)
    queries = rounded(q.float(), q.float().abs().amax(-1, keepdim=True) / LARGEST + FLOOR, q_wide.dtype)
    shared = (q_wide * mean).sum(-1, keepdim=True)

    def wider(x, last=0.0):
        """With one channel more: in it, queries and keys multiply to what all keys share."""
        return None if x is None else torch.cat([x, x.new_full((*x.shape[:-1], 1), last)], -1)

    found, found_lse = reference.run(
        torch.cat([queries, shared], -1), wider(keys, 1.0), wider(v_wide), indices, counts, block_sizes, scale,
        return_lse, token_rows, wider(gate), wider(coarse), blocks_per_tile, tile_grid, wider(far), far_lse, lse=lse)
    found = found[..., :-1].to(q.dtype)
    return (found.contiguous() if out is None else out.copy_(found)), found_lse


SPEC = KernelSpec(
    name="reference_int8",
    load=lambda: run,
    device_types=("cpu", "cuda", "rocm", "mps", "xpu"),
    auto_device_types=("cpu",),
    dtypes=(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    gathers=lambda grid: True,
    exact=False,
)
