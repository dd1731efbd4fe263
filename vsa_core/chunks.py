"""A clip cut into the chunks of VMoBA: runs of frames, columns through all frames, or boxes.

FastVideo, fastvideo-kernel/python/fastvideo_kernel/vmoba.py at 2f3d4074. Wider than upstream: any grid, where the last
chunk along an axis may be short, and tokens that are not video.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import BLOCK, tile_means
from .grid import Thw, TokenGrid
from .layout import TileLayout, get_reverse_tile_partition_indices, get_tile_partition_indices

ChunkSize = float | tuple[int, int] | tuple[int, int, int]
"""Frames, which may be a fraction; or height x width through all frames; or time x height x width."""
AXES = ("time", "height", "width")


def check_chunk_size(size, name: str = "chunk size") -> ChunkSize:
    """The size with a tuple for a list. Raises ValueError unless it has one, two or three positive sides."""
    sides = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size,)
    if not 1 <= len(sides) <= 3 or any(isinstance(n, bool) or not isinstance(n, (int, float)) for n in sides):
        raise ValueError(f"{name} {size!r}: wanted frames, or height and width, or time, height and width")
    if any(not 0 < n < math.inf or (len(sides) > 1 and n != int(n)) for n in sides):
        raise ValueError(f"{name} {size!r}: wanted numbers above 0" + (", and whole ones" if len(sides) > 1 else ""))
    return sides[0] if len(sides) == 1 else tuple(int(n) for n in sides)


def run_length(frames: float, thw: Thw) -> int:
    """Tokens of a chunk of so many frames: int(frames * h * w), at least 1."""
    return max(1, int(frames * thw[1] * thw[2]))


def box_of(size: ChunkSize, thw: Thw) -> Thw:
    """The chunk as a box of tokens (t, h, w) of a grid, for the two kinds that are one."""
    box = (thw[0], *size) if len(size) == 2 else size
    return tuple(min(side, length) for side, length in zip(box, thw, strict=True))


def chunk_length(size: ChunkSize, thw: Thw) -> int:
    """Tokens of a whole chunk. Raises ValueError, as upstream does, for a box that does not divide the grid."""
    if not isinstance(size, tuple):
        return run_length(size, thw)
    sides = (thw[0], *size) if len(size) == 2 else size
    for axis, side, length in zip(AXES, sides, thw, strict=True):
        if length % side:
            raise ValueError(f"chunks of {side} along {axis}: found {length} tokens there, wanted a multiple of {side}")
    return math.prod(sides)


def process_moba_input(x: Tensor, patch_resolution: Sequence[int], chunk_size: ChunkSize) -> tuple[Tensor, int]:
    """Tokens chunk after chunk, and the tokens of a chunk.   x: [B, t*h*w, ...] in raster order -> the same shape

    Frames stay in raster order. Raises ValueError for a size that is none, or a box that does not divide the grid.
    """
    thw, size = tuple(patch_resolution), check_chunk_size(chunk_size)
    length = chunk_length(size, thw)
    if not isinstance(size, tuple):
        return x, length
    return x.index_select(1, get_tile_partition_indices(thw, box_of(size, thw), x.device)), length


def process_moba_output(x: Tensor, patch_resolution: Sequence[int], chunk_size: ChunkSize) -> Tensor:
    """Undo `process_moba_input`."""
    thw, size = tuple(patch_resolution), check_chunk_size(chunk_size)
    chunk_length(size, thw)
    if not isinstance(size, tuple):
        return x
    return x.index_select(1, get_reverse_tile_partition_indices(thw, box_of(size, thw), x.device))


@dataclass(frozen=True)
class Chunks:
    """A sequence in C chunks, each of `per_chunk` blocks of 64 slots, of which a short chunk leaves the last empty."""

    layout: TileLayout
    own: Tensor
    """int64 [video tokens], the chunk of every token in raster order."""
    blocks: Tensor
    """int32 [C], blocks of a chunk that hold tokens."""
    own_indices: Tensor
    """int32 [C * per_chunk, K], for every block of queries the blocks of its chunk, then those that are not video."""
    own_counts: Tensor
    """int32 [C * per_chunk], 0 for a block without tokens."""
    box: Thw | None
    """None: runs of tokens in raster order."""

    @classmethod
    def of(cls, grid: TokenGrid, size: ChunkSize, device: torch.device) -> Chunks:
        """The chunks of a grid. Those at its far edges may be short, and one that is larger than the grid is all."""
        size = check_chunk_size(size)
        if isinstance(size, tuple):
            box, tile, cut = box_of(size, grid.thw), box_of(size, grid.thw), grid
        else:
            box, tokens = None, grid.num_video_tokens
            tile = (1, 1, min(run_length(size, grid.thw), tokens))
            cut = TokenGrid((1, 1, tokens), grid.prefix, grid.suffix, grid.hidden)
        layout = TileLayout.of_grid(cut, tile, device, any_volume=True, cache_tile_buf=False)
        per_chunk, others = layout.blocks_per_tile, layout.num_other_blocks
        blocks = (layout.variable_block_sizes + (BLOCK - 1)) // BLOCK
        chunk = torch.arange(len(blocks), dtype=torch.int32, device=device)[:, None]
        place = torch.arange(per_chunk + others, dtype=torch.int32, device=device)
        lists = torch.where(place < blocks[:, None], chunk * per_chunk + place,
                            (len(blocks) * per_chunk + place - blocks[:, None]).clamp(max=len(blocks) * per_chunk
                                                                                      + max(others, 1) - 1))
        sizes = layout.kernel_block_sizes[:len(blocks) * per_chunk]
        counts = torch.where(sizes > 0, (blocks + others).repeat_interleave(per_chunk), 0)
        video = slice(grid.prefix, grid.prefix + grid.num_video_tokens)
        return cls(layout, layout.untile_combined_index[video] // layout.slots_per_tile, blocks,
                   lists.repeat_interleave(per_chunk, 0), counts.to(torch.int32), box)

    @property
    def number(self) -> int:
        """C."""
        return len(self.blocks)

    @property
    def per_chunk(self) -> int:
        """Blocks of 64 slots that every chunk takes."""
        return self.layout.blocks_per_tile

    @property
    def video(self) -> slice:
        """The rows of the sequence that are video."""
        prefix = self.layout.grid.prefix
        return slice(prefix, prefix + self.layout.grid.num_video_tokens)

    @property
    def video_slots(self) -> int:
        return self.layout.num_video_slots

    @property
    def video_sizes(self) -> Tensor:
        """int32 [C * per_chunk], tokens in every block of the chunks."""
        return self.layout.kernel_block_sizes[:self.number * self.per_chunk]

    def means(self, key: Tensor, backend: str) -> Tensor:
        """The mean key of every chunk.   [B, S, H, D] -> float32 [B, H, C, D] (float64 for float64)"""
        return tile_means((key,), self.layout.token_rows, self.number, self.per_chunk, backend)[0]
