"""From tile means to the lists of key blocks that a kernel reads."""
from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import select_tiles
from ..kernels.reference_tiles import select_top_tiles, tile_lists_to_blocks

__all__ = ["HeadGroups", "block_means", "select_top_tiles", "tile_lists_to_blocks"]


def block_means(x: Tensor, sizes: Tensor, slots: int) -> Tensor:
    """Mean of the valid tokens of every run of `slots` slots, in float32 (float64 for float64).

    x: [B, N*slots, H, D], padding slots zero;  sizes: [N] valid tokens.  -> [B, H, N, D]
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    sums = x.unflatten(1, (-1, slots)).sum(2, dtype=dtype)               # [B, N, H, D]
    return (sums / sizes.to(dtype)[:, None, None]).transpose(1, 2)


class HeadGroups:
    """Heads that keep different numbers of tiles, grouped by them: one selection for each number."""

    def __init__(self, kept: tuple[int, ...], device: torch.device):
        """kept: tiles that every head keeps."""
        self.kept = torch.tensor(kept, dtype=torch.int32, device=device)
        self.most, self.mean = max(kept), sum(kept) / len(kept)
        self.groups = [(k, torch.tensor([head for head, own in enumerate(kept) if own == k], device=device))
                       for k in sorted(set(kept))]

    def lists(self, query_means: Tensor, key_means: Tensor, scale: float, blocks_per_tile: int, always: int,
              backend: str) -> tuple[Tensor, Tensor]:
        """`kernels.select_tiles` with a k of its own for every head, and the counts that the rows then have.

        -> indices int32 [B, H, Nq*m, most*m + always], zeros behind the end of a list, and counts int32 [B, H, Nq*m]
        """
        batch, heads, rows, _ = query_means.shape
        m = blocks_per_tile
        indices = torch.zeros(batch, heads, rows * m, self.most * m + always, dtype=torch.int32,
                              device=query_means.device)
        for k, own in self.groups:
            found = select_tiles(query_means.index_select(1, own), key_means.index_select(1, own), k, scale, m, always,
                                 backend)
            indices[..., :k * m + always].index_copy_(1, own, found)
        counts = (self.kept * m + always)[None, :, None].expand(batch, heads, rows * m)
        return indices, counts

    def tiles(self, indices: Tensor, blocks_per_tile: int) -> Tensor:
        """The kept tiles of such lists, int32 [B, H, Nq, most], -1 behind the end of a list."""
        found = indices[:, :, ::blocks_per_tile, :self.most * blocks_per_tile:blocks_per_tile] // blocks_per_tile
        place = torch.arange(self.most, dtype=torch.int32, device=indices.device)
        return torch.where(place < self.kept[:, None, None], found, -1)
