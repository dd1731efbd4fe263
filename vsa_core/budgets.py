"""Budgets: which share of the tiles every head keeps, at every step and layer. Holds at any size of clip.

Heads differ far more than the tiles of one head: some look at a few places, others everywhere. `budget_search`
measures what each can live with, `strategy_files` reads and writes the result.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from .grid import TokenGrid
from .head_table import HeadTable


def check_kept(share) -> float:
    """A share of the tiles, above 0 and at most 1. Raises ValueError for anything else: found, wanted."""
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.0 < share <= 1.0:
        raise ValueError(f"share {share!r}: wanted a number above 0 and at most 1")
    return float(share)


def tiles_kept(share: float, tiles: int) -> int:
    """Tiles that a share of so many is: rounded up, at least one. The decimal counts that was written."""
    return max(1, min(tiles, math.ceil(Fraction(str(share)) * tiles)))


def share_density(share: float, grid: TokenGrid, tiles: int) -> float:
    """Share of query-key pairs that a head computes, as if its tiles were all of one size.

    Tokens that are not video are read by everyone, and read everything; hidden ones are read by nobody.
    """
    video, others, unseen = grid.num_video_tokens, grid.num_other_tokens, len(grid.hidden)
    seen = video + others - unseen
    keys = tiles_kept(share, tiles) / tiles * video + others - unseen
    return (video * keys + others * seen) / ((video + others) * seen)


@dataclass(frozen=True)
class Budgets(HeadTable):
    """choices[assignment[step][layer][head]] is the share of the tiles that a query tile of a head reads; 1 is dense.

    far_field: whether they were measured with the far field, so that they hold with it only.
    """

    far_field: bool = False

    check_choice = staticmethod(check_kept)
    kind = "budget"

    @property
    def shares(self) -> tuple[float, ...]:
        return self.choices

    def kept(self, step: int, layer: int, tiles: int) -> tuple[int, ...]:
        """Tiles that every head keeps, of so many, at one of its own steps.   Errors: as indexing has them."""
        return tuple(tiles_kept(self.choices[place], tiles) for place in self.assignment[step][layer])

    @property
    def mean_share(self) -> float:
        """Of the tiles, over all heads, layers and steps."""
        return sum(share * uses for share, uses in self.uses.items()) / sum(self.use_counts)
