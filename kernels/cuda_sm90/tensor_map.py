"""What the copy engine has to know about q, k and v: sizes, strides and box of a rank-5 tensor map."""
from __future__ import annotations

from typing import NamedTuple

import torch

from ..spec import BLOCK

PANEL_COLUMNS = 64
"""Elements in the 128 bytes that the swizzle covers; head_dim 128 is two panels, which lie behind each other."""
STRIDE_UNIT = 16
"""Bytes: the address and every stride but the innermost are multiples of it (driver API, cuTensorMapEncodeTiled)."""
LARGEST_STRIDE = 1 << 40
LARGEST_SIZE = 1 << 32


class Layout(NamedTuple):
    """Dimensions innermost first: columns of a panel, slot, panel, head, batch."""

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    """In bytes, of all dimensions but the innermost, which is contiguous."""
    box: tuple[int, ...]
    """What one copy moves: a block, panel after panel, 128 bytes per row."""


def layout(shape, strides, element_size: int = 2) -> Layout:
    """The layout of a tensor [B, S, H, D] with these element strides; D is contiguous and a multiple of 64."""
    batch, slots, heads, dim = shape
    panels = dim // PANEL_COLUMNS
    panel_bytes = PANEL_COLUMNS * element_size

    def step(size: int, stride: int) -> int:
        return stride * element_size if size > 1 else panel_bytes      # nothing is ever stepped over

    return Layout(
        (PANEL_COLUMNS, slots, panels, heads, batch),
        (step(slots, strides[1]), panel_bytes, step(heads, strides[2]), step(batch, strides[0])),
        (PANEL_COLUMNS, BLOCK, panels, 1, 1))


def fits(x: torch.Tensor) -> bool:
    """Whether the copy engine can read `x` [B, S, H, D] where it lies."""
    found = layout(x.shape, x.stride(), x.element_size())
    return (x.stride(3) == 1 and x.data_ptr() % STRIDE_UNIT == 0
            and all(0 < stride < LARGEST_STRIDE and stride % STRIDE_UNIT == 0 for stride in found.strides)
            and all(0 < size <= LARGEST_SIZE for size in found.sizes))
