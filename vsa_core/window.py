"""Windows of Sliding Tile Attention, in plain integers: what a query tile sees along an axis, and what that costs.

Rule, per axis of n tiles and a window of w: half = w // 2, centre = clamp(q, half, n - 1 - half), and q sees k when
|centre - k| <= half (Zhang et al., arXiv 2502.04507; FastVideo's kernels and their FlexAttention reference). So a
window shifts inward at a border and keeps its size, an even window below n acts as w + 1, and one of n or more is
the whole axis.
"""
from __future__ import annotations

import math
import re
from fractions import Fraction

from .grid import Thw, TokenGrid
from .tiling import num_tiles

Share = tuple[float, float, float]
"""A window as fractions of the grid, (t, h, w), each above 0 and at most 1."""

SLACK = Fraction(1, 1000)
"""Part of a tile by which a window may fall short of a fraction: 0.667 of three tiles is two, not three."""


_BISECTIONS = 30


def check_window(window, axes: str = "thw") -> Thw:
    """The window as three whole tiles. Raises ValueError for anything else: found, wanted."""
    if not isinstance(window, (list, tuple)) or len(window) != 3:
        raise ValueError(f"window {window!r}: wanted three numbers of tiles, time, height, width")
    for axis, width in zip(axes, window, strict=True):
        if isinstance(width, bool) or not isinstance(width, int):
            raise ValueError(f"window {list(window)}: {axis} is {width!r}, wanted a whole number of tiles")
        if width < 1:
            raise ValueError(f"window {list(window)}: {axis} is {width}, wanted at least 1 tile")
    return tuple(window)


def check_share(share) -> Share:
    """The window as three fractions of the grid. Raises ValueError for anything else: found, wanted."""
    if not isinstance(share, (list, tuple)) or len(share) != 3:
        raise ValueError(f"window {share!r}: wanted three fractions of the grid, time, height, width")
    for axis, part in zip("thw", share, strict=True):
        if isinstance(part, bool) or not isinstance(part, (int, float)) or not 0 < part <= 1:
            raise ValueError(f"window {list(share)}: {axis} is {part!r}, wanted a fraction above 0 and at most 1")
    return tuple(float(part) for part in share)


def parse_window(text: str) -> Thw | Share:
    """The window that a user wrote: "3x3x5" in tiles, "1.0x0.5x0.3" as fractions of the grid.

    A number with a decimal point is a fraction, one without counts tiles; the three must be of one kind.
    Raises ValueError: found, wanted.
    """
    parts = [part.strip() for part in re.split(r"[x×,]", str(text))]
    if len(parts) != 3 or not all(re.fullmatch(r"-?\d+|-?\d*\.\d+|-?\d+\.", part) for part in parts):
        raise ValueError(f"window {text!r}: wanted time x height x width, in tiles such as 3x3x5 "
                         "or as fractions of the grid such as 1.0x0.5x0.5")
    decimal = ["." in part for part in parts]
    if any(decimal) and not all(decimal):
        raise ValueError(f"window {text!r} mixes tiles and fractions of the grid: "
                         "wanted all three whole (3x3x5) or all three with a decimal point (1.0x0.5x0.5)")
    return check_share([float(part) for part in parts]) if any(decimal) else check_window([int(p) for p in parts])


def effective_width(width: int, tiles: int) -> int:
    """Tiles that a query tile sees along an axis of `tiles` with a window of `width`."""
    return tiles if width >= tiles else 2 * (width // 2) + 1


def effective_window(window: Thw, tiles: Thw) -> Thw:
    """The window that the clamp rule makes of it on a grid of `tiles`: odd, or the whole axis."""
    return tuple(effective_width(width, n) for width, n in zip(window, tiles, strict=True))


def first_seen(width: int, tiles: int) -> list[int]:
    """For every query tile of an axis, the first of the `effective_width` tiles that it sees."""
    width = effective_width(width, tiles)
    return [max(0, min(q - width // 2, tiles - width)) for q in range(tiles)]


def window_of_share(share: Share, tiles: Thw) -> Thw:
    """The smallest effective window that covers the fractions of a grid of `tiles`, up to SLACK.

    Windows are odd or whole, so the fraction is rounded up: half of 10 tiles is 5, 0.4 of 10 (4 tiles) is 5 too.
    """
    share = check_share(share)
    return tuple(effective_width(max(1, math.ceil(Fraction(part).limit_denominator(10 ** 6) * n - SLACK)), n)
                 for part, n in zip(share, tiles, strict=True))


def share_of_window(window: Thw, tiles: Thw) -> Share:
    """The fractions of a grid of `tiles` that a window covers; `window_of_share` gives its effective window back."""
    return tuple(width / n for width, n in zip(effective_window(window, tiles), tiles, strict=True))


def window_density(grid: TokenGrid, tile_size: Thw, window: Thw) -> float:
    """Share of all query-key pairs of the sequence that are computed, exact: short tiles and other tokens counted."""
    video = grid.num_video_tokens
    seen_others = grid.num_other_tokens - len(grid.hidden)
    pairs = (math.prod(_axis_pairs(*axis) for axis in zip(grid.thw, tile_size, window, strict=True))
             + video * seen_others + grid.num_other_tokens * (video + seen_others))
    return pairs / (grid.num_tokens * (video + seen_others))


def window_of_density(grid: TokenGrid, tile_size: Thw, window: Thw, density: float) -> Thw:
    """The smallest window of the proportions of `window` that computes at least `density`; the whole grid at most."""
    tiles = num_tiles(grid.thw, tile_size)
    low, high = 0.0, float(max(tiles))              # times the window: at `high` every axis is whole

    def scaled(factor: float) -> Thw:
        return effective_window(tuple(max(1, round(factor * width)) for width in window), tiles)

    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        enough = window_density(grid, tile_size, scaled(middle)) >= density
        low, high = (low, middle) if enough else (middle, high)
    return scaled(high)


def window_tile_share(tiles: Thw, window: Thw) -> float:
    """Share of a grid's tiles that a query tile sees: the density of FastVideo's tables, which count tiles."""
    return math.prod(effective_window(window, tiles)) / math.prod(tiles)


def is_full(window: Thw, tiles: Thw) -> bool:
    """Whether every query tile sees the whole grid."""
    return all(width >= n for width, n in zip(window, tiles, strict=True))


def _axis_pairs(length: int, side: int, width: int) -> int:
    (tiles,) = num_tiles((length,), (side,))
    sizes = [min(side, length - first) for first in range(0, length, side)]
    seen = effective_width(width, tiles)
    return sum(size * sum(sizes[first:first + seen])
               for size, first in zip(sizes, first_seen(width, tiles), strict=True))
