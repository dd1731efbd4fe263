"""The slots that tokens take in a method's tensors: tile after tile, then the tokens that are not video.

Every tile owns a whole number of blocks of 64 slots, its valid tokens first. Of the other tokens those that queries
may see come first; the hidden ones lie where a block's padding does, so every kernel masks them as keys.
Names: FastVideo, attention/backends/video_sparse_attn.py at 2f3d4074.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels import TileGrid
from .grid import Thw, TokenGrid
from .tiling import BLOCK, num_tiles, tile_slots


def get_tile_partition_indices(dit_seq_shape: Thw, tile_size: Thw, device: torch.device) -> Tensor:
    """Raster index of every token, in tile order: tiles by (t, h, w), raster order inside each. int64 [t*h*w]"""
    raster = torch.arange(math.prod(dit_seq_shape), device=device).view(*dit_seq_shape)
    tile_of, place = [], []
    for axis, (length, side) in enumerate(zip(dit_seq_shape, tile_size, strict=True)):
        coordinate = torch.arange(length, device=device).view([-1 if a == axis else 1 for a in range(3)])
        tile_of.append(coordinate // side)
        place.append(coordinate % side)
    counts = num_tiles(dit_seq_shape, tile_size)
    tile = (tile_of[0] * counts[1] + tile_of[1]) * counts[2] + tile_of[2]
    inner = (place[0] * tile_size[1] + place[1]) * tile_size[2] + place[2]
    return raster.flatten()[(tile * math.prod(tile_size) + inner).flatten().argsort()]


def get_reverse_tile_partition_indices(dit_seq_shape: Thw, tile_size: Thw, device: torch.device) -> Tensor:
    """Place in tile order of every token in raster order. int64 [t*h*w]"""
    return torch.argsort(get_tile_partition_indices(dit_seq_shape, tile_size, device))


@lru_cache(maxsize=10)
def construct_variable_block_sizes(
    dit_seq_shape: Thw, num_tiles: Thw, device: torch.device, tile_size: Thw = (4, 4, 4),
) -> Tensor:
    """Tokens in every tile; only the last tile along an axis may be short. int32 [prod(num_tiles)]

    Cached as upstream is, so read only. A last tile that would hold nothing counts as a whole one, as there.
    """
    per_axis = []
    with torch.inference_mode(False):       # the cache outlives the mode of whoever asks first
        for length, count, side in zip(dit_seq_shape, num_tiles, tile_size, strict=True):
            sizes = torch.full((count,), side, dtype=torch.int32, device=device)
            last = length - (count - 1) * side
            sizes[-1] = last if last > 0 else side
            per_axis.append(sizes)
        t, h, w = per_axis
        return (t[:, None, None] * h[None, :, None] * w[None, None, :]).flatten()


def get_non_pad_index(variable_block_sizes: Tensor, max_block_size: int) -> Tensor:
    """Slots that hold a token, ascending: the first `size` of every run of `max_block_size` slots. int64"""
    slot = torch.arange(max_block_size, device=variable_block_sizes.device)
    return (slot < variable_block_sizes[:, None]).flatten().nonzero().flatten()


@dataclass
class TileLayout:
    """One token grid cut into tiles. N = prod(num_tiles); S = padded_seq_length slots."""

    dit_seq_shape: list[int]
    num_tiles: list[int]
    total_seq_length: int
    """Tokens in the sequence, those that are not video included."""
    tile_partition_indices: Tensor
    """int64 [total_seq_length], sequence index of every token in slot order."""
    reverse_tile_partition_indices: Tensor
    """int64 [total_seq_length], its inverse."""
    variable_block_sizes: Tensor
    """int32 [N], tokens in every tile."""
    non_pad_index: Tensor
    """int64 [total_seq_length], slots that hold a token, ascending."""
    tile_size: Thw
    grid: TokenGrid
    untile_combined_index: Tensor
    """int64 [total_seq_length], slot of every token in sequence order: one gather removes padding and order."""
    kernel_block_sizes: Tensor
    """int32 [S/64], tokens in every block of 64 slots that queries may see."""
    token_rows: Tensor
    """int32 [S], sequence index of the token in every slot, -1 for padding: what a kernel that gathers reads."""
    cache_tile_buf: bool = field(default=True, kw_only=True)
    """Whether tile() reuses one buffer. Off where several results of tile() must live at once."""
    tile_buf: Tensor | None = field(default=None, kw_only=True)

    @property
    def tile_grid(self) -> TileGrid:
        """What `token_rows` holds, for a kernel that reads tiles as boxes."""
        return TileGrid(self.grid.prefix, *self.grid.thw, *self.tile_size)

    @property
    def slots_per_tile(self) -> int:
        return tile_slots(self.tile_size)

    @property
    def blocks_per_tile(self) -> int:
        return self.slots_per_tile // BLOCK

    @property
    def num_video_slots(self) -> int:
        return math.prod(self.num_tiles) * self.slots_per_tile

    @property
    def padded_seq_length(self) -> int:
        return self.kernel_block_sizes.shape[0] * BLOCK

    @property
    def num_other_blocks(self) -> int:
        """Blocks behind the last tile, which hold the tokens that are not video."""
        return (self.padded_seq_length - self.num_video_slots) // BLOCK

    @classmethod
    def of_grid(cls, grid: TokenGrid, tile_size: Thw, device: torch.device, any_volume: bool = False, **fields):
        """The layout of a grid, with the other fields of a subclass. Raises ValueError for a tile that is none.

        tile_size: any whose volume is a multiple of 64 or at most 64. any_volume: any at all; then a tile may end
        inside a block, and `tile_grid` is not for a kernel that reads tiles as boxes.
        """
        volume = math.prod(tile_size)
        if len(tile_size) != 3 or min(tile_size) < 1 or (volume > BLOCK and volume % BLOCK and not any_volume):
            raise ValueError(f"tile {'x'.join(map(str, tile_size))} holds {volume} tokens: "
                             f"wanted at most {BLOCK} or a multiple of {BLOCK}")
        device = torch.device(device)
        tiles = num_tiles(grid.thw, tile_size)
        slots = tile_slots(tile_size)
        sizes = construct_variable_block_sizes(tuple(grid.thw), tiles, device, tuple(tile_size))
        per_block = [(sizes - first).clamp(0, BLOCK) for first in range(0, slots, BLOCK)]
        block_sizes = torch.stack(per_block, dim=1).flatten()
        partition = get_tile_partition_indices(grid.thw, tile_size, device) + grid.prefix
        non_pad = get_non_pad_index(sizes, slots)
        if others := grid.num_other_tokens:
            hidden = set(grid.hidden)
            order = [*(i for i in range(others) if i not in hidden), *grid.hidden]
            place = torch.tensor([i if i < grid.prefix else i + grid.num_video_tokens for i in order], device=device)
            partition = torch.cat([partition, place])
            first_slot = math.prod(tiles) * slots
            non_pad = torch.cat([non_pad, torch.arange(first_slot, first_slot + others, device=device)])
            seen = others - len(hidden)
            extra = [max(0, min(BLOCK, seen - first)) for first in range(0, others, BLOCK)]
            block_sizes = torch.cat([block_sizes, torch.tensor(extra, dtype=torch.int32, device=device)])
        reverse = torch.argsort(partition)
        rows = torch.full((block_sizes.shape[0] * BLOCK,), -1, dtype=torch.int32, device=device)
        rows[non_pad] = partition.to(torch.int32)
        return cls(
            dit_seq_shape=list(grid.thw), num_tiles=list(tiles), total_seq_length=grid.num_tokens,
            tile_partition_indices=partition, reverse_tile_partition_indices=reverse, variable_block_sizes=sizes,
            non_pad_index=non_pad, tile_size=tuple(tile_size), grid=grid, untile_combined_index=non_pad[reverse],
            kernel_block_sizes=block_sizes, token_rows=rows, **fields)


def to_slots(parts: tuple[Tensor, ...], layout: TileLayout) -> Tensor:
    """Tokens in slot order, padding slots zero, the parts stacked on the batch axis without a stacked copy.

    parts: [B, total_seq_length, H, D] each -> [sum of B, S, H, D], which is layout.tile_buf and valid until the next
    call with the same layout, unless layout.cache_tile_buf is False. Raises ValueError for another length.
    """
    first = parts[0]
    if any(x.shape[1] != layout.total_seq_length for x in parts):
        raise ValueError(f"tile: found sequences of {[x.shape[1] for x in parts]} tokens, "
                         f"wanted {layout.total_seq_length}")
    shape = (sum(x.shape[0] for x in parts), layout.padded_seq_length, *first.shape[2:])
    buf = layout.tile_buf if layout.cache_tile_buf else None
    if buf is None or buf.shape != shape or buf.dtype != first.dtype or buf.device != first.device:
        buf = torch.zeros(shape, dtype=first.dtype, device=first.device)
        if layout.cache_tile_buf:
            layout.tile_buf = buf
    row = 0
    for x in parts:
        buf[row:row + x.shape[0]].index_copy_(1, layout.untile_combined_index, x)
        row += x.shape[0]
    return buf


def to_sequence(x: Tensor, layout: TileLayout) -> Tensor:
    """Tokens back in sequence order, padding dropped.   x: [B, S, H, D] -> [B, total_seq_length, H, D]"""
    return x.index_select(1, layout.untile_combined_index)
