"""The tiles of a grid as boxes that one copy brings: the kernel's parameter that says where every block lies.

A tile of at most 64 tokens is one box. A larger one is cut into boxes of 64, whose sides divide the tile's.
"""
from __future__ import annotations

import ctypes
import math
from functools import lru_cache

from ..spec import BLOCK
from ..tile_grid import TileGrid

LARGEST_COORDINATE = 1023
"""The place of a box has 10 bits along every axis."""


class Boxes(ctypes.Structure):
    """`struct Boxes` of the source."""

    _fields_ = [("blocks", ctypes.c_int), ("prefix", ctypes.c_int), ("rows", ctypes.c_int), ("parts", ctypes.c_int),
                *((name, ctypes.c_int * 3) for name in ("grid", "tiles", "tile", "cuts", "box")),
                ("masks", ctypes.c_uint64 * 8)]


class Coarse(ctypes.Structure):
    """`struct Coarse` of the source. `means` null: no coarse branch."""

    _fields_ = [("gate", ctypes.c_void_p), ("means", ctypes.c_void_p),
                *((name, ctypes.c_longlong) for name in ("gate_row", "gate_head", "mean_head", "mean_tile")),
                ("tiles", ctypes.c_int), ("blocks_per_tile", ctypes.c_int)]


class Start(ctypes.Structure):
    """`struct Start` of the source. `lse` null and no tile: every softmax begins with nothing."""

    _fields_ = [("means", ctypes.c_void_p), ("lse", ctypes.c_void_p),
                *((name, ctypes.c_longlong) for name in (
                    "mean_batch", "mean_head", "mean_tile", "lse_batch", "lse_head", "lse_tile")),
                ("tiles", ctypes.c_int), ("blocks_per_tile", ctypes.c_int)]


NO_BOXES = Boxes(0, 0, 1, 1, *((1, 1, 1),) * 5)
"""Every block lies packed. The kernel divides by the sides all the same."""


def takes(grid: TileGrid | None) -> bool:
    """Whether the kernel reads such tokens where they lie: cut tiles, too, must end before the largest coordinate."""
    return grid is not None and all(
        count * side <= LARGEST_COORDINATE for count, side in zip(grid.tiles, grid.tile, strict=True))


def box_of(tile: tuple[int, int, int]) -> tuple[int, int, int]:
    """The box that a tile is cut into: the tile itself, or 64 tokens of it, as long as possible along w, then h."""
    if math.prod(tile) <= BLOCK:
        return tuple(tile)
    sides, left = [], BLOCK
    for side in reversed(tile):
        sides.append(math.gcd(side, left))
        left //= sides[-1]
    return tuple(reversed(sides))


@lru_cache(maxsize=32)
def boxes_of(grid: TileGrid) -> Boxes:
    """The kernel's parameter for a grid. Shared: not to be changed."""
    box = box_of(grid.tile)
    cuts = [side // part for side, part in zip(grid.tile, box, strict=True)]
    inside = [[part, length % part or part] for length, part in zip(grid.thw, box, strict=True)]
    masks = [_mask(box, [inside[axis][cut >> 2 - axis & 1] for axis in range(3)]) for cut in range(8)]
    return Boxes(grid.blocks, grid.prefix, math.prod(box), math.prod(cuts), *(
        (ctypes.c_int * 3)(*sides) for sides in (grid.thw, grid.tiles, grid.tile, cuts, box)),
        (ctypes.c_uint64 * 8)(*masks))


def _mask(box, inside) -> int:
    """Bit i: the i-th token of a box, raster order, is inside, which so many along every axis are."""
    places = ((t, h, w) for t in range(box[0]) for h in range(box[1]) for w in range(box[2]))
    return sum(1 << slot for slot, place in enumerate(places) if all(p < n for p, n in zip(place, inside, strict=True)))
