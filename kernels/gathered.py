"""Calls whose q, k and v lie in the order of the sequence: what they must look like, and who has to make copies.

Slot s of the blocks is row `token_rows[s]` of q, k, v and out, -1 for padding. A kernel that gathers these rows
itself (`KernelSpec.gathers`) moves every token once; for all others `on_copies` lays the blocks out in memory.
"""
from __future__ import annotations

import torch

from .spec import BLOCK
from .tile_grid import TileGrid

_CHUNK_BYTES = 64 << 20
"""Bound on the coarse rows that `on_copies` holds at once."""


def why_invalid(q, k, v, indices, counts, block_sizes, token_rows, gate, coarse, blocks_per_tile, tile_grid,
                far=None):
    """(found, wanted) for the first operand that does not fit the others, or None. Looks at no tensor's values."""
    if token_rows.ndim != 1 or token_rows.numel() % BLOCK or not token_rows.is_contiguous():
        return f"token_rows {list(token_rows.shape)}", f"[slots], contiguous, a multiple of {BLOCK}"
    if k.shape != q.shape or v.shape != q.shape:
        return f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}", "one shape, with token_rows"
    blocks, (batch, _, heads, dim) = token_rows.numel() // BLOCK, q.shape
    if indices.ndim != 4 or tuple(indices.shape[:2]) != (batch, heads) or indices.shape[2] > blocks:
        return f"indices {list(indices.shape)}", f"[{batch}, {heads}, at most {blocks}, K]"
    if counts.shape != indices.shape[:3]:
        return f"counts {list(counts.shape)}", f"{list(indices.shape[:3])}"
    if tuple(block_sizes.shape) != (blocks,):
        return f"block_sizes {list(block_sizes.shape)}", f"[{blocks}]"
    if tile_grid is not None:
        if len(tile_grid) != len(TileGrid._fields):
            return f"tile_grid {list(tile_grid)}", f"({', '.join(TileGrid._fields)})"
        grid = TileGrid(*tile_grid)
        if invalid := grid.why_invalid(q.shape[1], blocks):
            return invalid
        if (coarse is not None or far is not None) and grid.blocks_per_tile != blocks_per_tile:
            return f"blocks_per_tile {blocks_per_tile}", f"tile_grid's {grid.blocks_per_tile}"
    if (gate is None) != (coarse is None):
        return f"{'coarse without gate' if gate is None else 'gate without coarse'}", "both or none"
    if gate is None:
        return None
    if gate.shape != q.shape or gate.dtype != q.dtype or gate.device != q.device:
        return (f"gate {list(gate.shape)} in {gate.dtype} on {gate.device}",
                f"{list(q.shape)} in {q.dtype} on {q.device}")
    if gate.stride(3) != 1 and dim > 1:
        return f"gate with head_dim stride {gate.stride(3)}", "head_dim contiguous (stride 1)"
    wide = torch.promote_types(q.dtype, torch.float32)
    if coarse.ndim != 4 or (*coarse.shape[:2], coarse.shape[3]) != (batch, heads, dim) or coarse.dtype != wide:
        return f"coarse {list(coarse.shape)} in {coarse.dtype}", f"[{batch}, {heads}, tiles, {dim}] in {wide}"
    if coarse.stride(3) != 1 and dim > 1:
        return f"coarse with head_dim stride {coarse.stride(3)}", "head_dim contiguous (stride 1)"
    if coarse.device != q.device:
        return f"coarse on {coarse.device}", f"q's {q.device}"
    if blocks_per_tile < 1 or coarse.shape[2] * blocks_per_tile > blocks or coarse.shape[2] < 1:
        return f"{coarse.shape[2]} tiles of {blocks_per_tile} blocks", f"1 to {blocks} blocks in all"
    return None


def on_copies(run, q, k, v, indices, counts, block_sizes, scale, return_lse, token_rows=None, gate=None, coarse=None,
              blocks_per_tile=1, tile_grid=None, far=None, far_lse=None):
    """`run` of a kernel that gathers, from that of one that does not. Without token_rows it is that kernel's own."""
    start = {} if far is None else dict(blocks_per_tile=blocks_per_tile, far=far, far_lse=far_lse)
    if token_rows is None:
        return run(q, k, v, indices, counts, block_sizes, scale, return_lse, **start)
    (batch, tokens, heads, _), listed, blocks = q.shape, indices.shape[2], block_sizes.numel()
    rows = token_rows.clamp(min=0)
    q, k, v = (x.index_select(1, rows) for x in (q, k, v))
    out, lse = run(q[:, :listed * BLOCK], k, v, indices, counts, block_sizes, scale, return_lse, **start)
    if listed < blocks:
        every = torch.arange(blocks, dtype=torch.int32, device=q.device).expand(batch, heads, blocks - listed, blocks)
        lengths = torch.full((1, 1, 1), blocks, dtype=torch.int32, device=q.device).expand(every.shape[:3])
        dense = run(q[:, listed * BLOCK:], k, v, every, lengths, block_sizes, scale, return_lse)
        out = torch.cat([out, dense[0]], dim=1)
        lse = torch.cat([lse, dense[1]], dim=2) if return_lse else None
    del q, k, v
    slot = torch.arange(token_rows.numel(), device=token_rows.device)
    place = torch.where(token_rows < 0, tokens, token_rows).long()       # the row `tokens` collects the padding
    slot = slot.new_zeros(tokens + 1).scatter_(0, place, slot)[:tokens]
    out = out.index_select(1, slot)
    if coarse is not None:
        _add_coarse(out, gate, coarse, slot // (BLOCK * blocks_per_tile))
    return out, lse.index_select(2, slot) if return_lse else None


def _add_coarse(out, gate, coarse, tile):
    """out += gate * coarse of the token's tile, where it has one.   out, gate: [B, S, H, D];  tile: [S]"""
    batch, tokens, heads, dim = out.shape
    means, has_tile = coarse.transpose(1, 2), (tile < coarse.shape[2])[None, :, None, None]
    step = max(1, _CHUNK_BYTES // (batch * heads * dim * coarse.element_size()))
    for first in range(0, tokens, step):
        part = slice(first, first + step)
        added = means.index_select(1, tile[part].clamp(max=coarse.shape[2] - 1)).mul_(gate[:, part])
        out[:, part] += torch.where(has_tile[:, part], added, 0).to(out.dtype)
