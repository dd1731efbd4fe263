"""Token rows that are the tiles of a grid, said in seven numbers, for kernels that can use it."""
from __future__ import annotations

import math
from typing import NamedTuple

BLOCK = 64
"""Token slots in one block: the granularity at which every kernel selects queries and keys."""


class TileGrid(NamedTuple):
    """A sequence of `prefix` tokens and then a grid, raster order, cut into tiles; the last along an axis may be cut.

    As `tile_grid` of `block_sparse_attention` it promises that the first blocks of `token_rows` are the tiles in
    raster order, each in `blocks_per_tile` blocks, and that lists name whole tiles, all blocks of a tile the same
    ones. A kernel may then lay the tokens of a tile out over its blocks in any order.
    """

    prefix: int
    t: int
    h: int
    w: int
    tile_t: int
    tile_h: int
    tile_w: int

    @property
    def thw(self) -> tuple[int, int, int]:
        return self[1:4]

    @property
    def tile(self) -> tuple[int, int, int]:
        return self[4:7]

    @property
    def tiles(self) -> tuple[int, int, int]:
        """Tiles along every axis."""
        return tuple(-(-length // side) for length, side in zip(self.thw, self.tile, strict=True))

    @property
    def blocks_per_tile(self) -> int:
        return -(-math.prod(self.tile) // BLOCK)

    @property
    def blocks(self) -> int:
        """Blocks of the grid; those of other tokens come after them."""
        return math.prod(self.tiles) * self.blocks_per_tile

    def why_invalid(self, tokens: int, blocks: int) -> tuple[str, str] | None:
        """(found, wanted) where this is no grid of a sequence of `tokens` in `blocks` blocks, else None."""
        volume = math.prod(self.tile)
        if min(self[1:]) < 1 or self.prefix < 0 or (volume > BLOCK and volume % BLOCK):
            return f"tile_grid {tuple(self)}", f"sides from 1 on, a tile of at most {BLOCK} tokens or a multiple of it"
        if self.prefix + math.prod(self.thw) > tokens or self.blocks > blocks:
            return (f"tile_grid {tuple(self)} of {self.prefix + math.prod(self.thw)} tokens in {self.blocks} blocks",
                    f"at most {tokens} tokens in {blocks} blocks")
        return None
