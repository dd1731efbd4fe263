"""What a query block has already seen when its list begins: operands `far` and `far_lse`, checked.

An online softmax that starts with peak far_lse, sum 1 and result far instead of -inf, 0 and 0 goes on as if the keys
behind them had come first (Milakov & Gimelshein, arXiv 1805.02867). No kernel learns what they were.
"""
from __future__ import annotations

import torch


def why_invalid(q, query_blocks, far, far_lse, blocks_per_tile):
    """(found, wanted) for the first operand that does not fit the others, or None. Looks at no tensor's values.

    query_blocks: those that have a list.
    """
    if (far is None) != (far_lse is None):
        return f"{'far_lse without far' if far is None else 'far without far_lse'}", "both or none"
    if far is None:
        return None
    batch, _, heads, dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    if far.ndim != 4 or (*far.shape[:2], far.shape[3]) != (batch, heads, dim) or far.dtype != wide:
        return f"far {list(far.shape)} in {far.dtype}", f"[{batch}, {heads}, tiles, {dim}] in {wide}"
    if far_lse.shape != far.shape[:3] or far_lse.dtype != wide:
        return f"far_lse {list(far_lse.shape)} in {far_lse.dtype}", f"{list(far.shape[:3])} in {wide}"
    if far.stride(3) != 1 and dim > 1:
        return f"far with head_dim stride {far.stride(3)}", "head_dim contiguous (stride 1)"
    for name, x in (("far", far), ("far_lse", far_lse)):
        if x.device != q.device:
            return f"{name} on {x.device}", f"q's {q.device}"
    tiles = far.shape[2]
    if blocks_per_tile < 1 or tiles < 1 or tiles * blocks_per_tile > query_blocks:
        return (f"far of {tiles} tiles of {blocks_per_tile} blocks",
                f"1 to {query_blocks} blocks in all, those that have a list")
    return None
