"""Cutting a token grid into 3-D tiles: shapes and counts, in plain integers."""
from __future__ import annotations

import itertools
import math
import re

from ..kernels import BLOCK
from .grid import Thw

MAX_SIDE_RATIO = 2
"""How far from a cube `auto_tile_size` may go. A long thin tile saves slots and loses locality."""


def parse_tile_size(text: str) -> Thw:
    """The tile that "4x4x4" (time, height, width) names.

    Raises ValueError for anything but three positive sides whose product is a multiple of 64.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[x×,]\s*(\d+)\s*[x×,]\s*(\d+)\s*", str(text))
    if not match:
        raise ValueError(f"tile_size {text!r}: wanted time x height x width, such as 4x4x4, or auto")
    tile = tuple(int(side) for side in match.groups())
    volume = math.prod(tile)
    if volume == 0 or volume % BLOCK:
        raise ValueError(f"tile_size {text!r} holds {volume} tokens: wanted a multiple of {BLOCK}, "
                         "such as 4x4x4, 2x4x8 (64), 4x4x8 (128) or 4x8x8 (256)")
    return tile


def num_tiles(thw: Thw, tile: Thw) -> Thw:
    """Tiles along every axis; the last one may be cut short by the grid's edge."""
    return tuple(-(-length // side) for length, side in zip(thw, tile, strict=True))


def tile_slots(tile: Thw) -> int:
    """Slots that one tile occupies: its volume rounded up to a multiple of 64."""
    return -(-math.prod(tile) // BLOCK) * BLOCK


def auto_tile_size(thw: Thw) -> Thw:
    """The compact tile of at most 64 tokens that covers the grid with the fewest blocks of 64 slots.

    Compact: no side is more than twice a side that the grid's edge does not stop from growing.
    At 21x30x52 it is 3x5x4, 546 blocks, where 4x4x4 takes 624 because every axis is cut at the edge.
    """
    sides = [range(1, min(length, BLOCK) + 1) for length in thw]
    tiles = (tile for tile in itertools.product(*sides) if math.prod(tile) <= BLOCK)

    def cost(tile: Thw):
        ratio = _side_ratio(thw, tile)
        return (ratio > MAX_SIDE_RATIO, math.prod(num_tiles(thw, tile)), ratio, tile)

    return min(tiles, key=cost)


def _side_ratio(thw: Thw, tile: Thw) -> float:
    free = [side for side, length in zip(tile, thw, strict=True) if side < length]
    return max(tile) / min(free) if free else 1.0
