"""What the copy engine has to know about q, k and v: sizes, strides and box of a rank-5 tensor map."""
from __future__ import annotations

from typing import NamedTuple

import torch

from ..spec import BLOCK
from ..tile_grid import TileGrid

PANEL_COLUMNS = 64
"""Elements in the 128 bytes that the swizzle covers; head_dim 128 is two panels, which lie behind each other."""
STRIDE_UNIT = 16
"""Bytes: the address and every stride but the innermost are multiples of it (driver API, cuTensorMapEncodeTiled)."""
LARGEST_STRIDE = 1 << 40
LARGEST_SIZE = 1 << 32


class Layout(NamedTuple):
    """Dimensions innermost first."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    """In bytes, of all dimensions but the innermost, which is contiguous."""
    box: tuple[int, ...]
    """What one copy moves."""
    row_bytes: int
    """Of one token and head: what a miss in the L2 cache may bring at once, as no copy wants the next head's."""


def packed_layout(x: torch.Tensor) -> Layout:
    """Blocks that lie one after the other in x [B, S, H, D], D contiguous and a multiple of 64.

    Dimensions: columns of a panel, slot, panel, head, batch. A copy moves a block, panel after panel.
    """
    (batch, slots, heads, dim), size = x.shape, x.element_size()
    panels, panel_bytes = dim // PANEL_COLUMNS, PANEL_COLUMNS * size
    steps = (_bytes(x, 1), panel_bytes, _bytes(x, 2), _bytes(x, 0))
    return Layout((PANEL_COLUMNS, slots, panels, heads, batch), steps, (PANEL_COLUMNS, BLOCK, panels, 1, 1),
                  dim * size)


def box_layout(x: torch.Tensor, grid: TileGrid, box: tuple[int, int, int]) -> Layout:
    """The grid in x [1, S, H, D], seen from its first token. Dimensions: columns, w, h, t, head.

    A copy moves one panel of a box; tokens outside the grid arrive as zeros.
    """
    row = x.stride(1) * x.element_size()
    steps = (row, grid.w * row, grid.h * grid.w * row, _bytes(x, 2))
    return Layout((x.shape[3], *reversed(grid.thw), x.shape[2]), steps, (PANEL_COLUMNS, *reversed(box), 1),
                  x.shape[3] * x.element_size())


def _bytes(x: torch.Tensor, axis: int) -> int:
    """From one index to the next, or where there is but one a step that is never taken."""
    return (x.stride(axis) if x.shape[axis] > 1 else PANEL_COLUMNS) * x.element_size()


def fits(x: torch.Tensor, described: Layout) -> bool:
    """Whether the copy engine can read every batch of `x` [B, S, H, D] where it lies."""
    strides = (*described.strides, _bytes(x, 0))
    return (x.stride(3) == 1 and x.data_ptr() % STRIDE_UNIT == 0
            and all(0 < stride < LARGEST_STRIDE and stride % STRIDE_UNIT == 0 for stride in strides)
            and all(0 < size <= LARGEST_SIZE for size in described.sizes))
