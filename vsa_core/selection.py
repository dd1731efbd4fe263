"""From tile means to the lists of key blocks that a kernel reads."""
from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.reference_tiles import select_top_tiles, tile_lists_to_blocks

__all__ = ["block_means", "select_top_tiles", "tile_lists_to_blocks"]


def block_means(x: Tensor, sizes: Tensor, slots: int) -> Tensor:
    """Mean of the valid tokens of every run of `slots` slots, in float32 (float64 for float64).

    x: [B, N*slots, H, D], padding slots zero;  sizes: [N] valid tokens.  -> [B, H, N, D]
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = x.unflatten(1, (-1, slots)).sum(2, dtype=dtype)               # [B, N, H, D]
    return (sums / sizes.to(dtype)[:, None, None]).transpose(1, 2)
