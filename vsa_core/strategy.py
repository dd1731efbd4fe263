"""A mask strategy: the window of every head, at every step and layer. Held as fractions of the grid.

`strategy_files` reads and writes it.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .grid import Thw, TokenGrid
from .head_table import HeadTable
from .tiling import num_tiles
from .window import Share, check_share, share_of_window, window_density, window_of_share


@dataclass(frozen=True)
class Strategy(HeadTable):
    """windows[assignment[step][layer][head]] is a head's window as fractions of the grid."""

    check_choice = staticmethod(check_share)
    kind = "window"

    @property
    def windows(self) -> tuple[Share, ...]:
        return self.choices

    @classmethod
    def of_windows(cls, windows: Sequence[Sequence[Sequence[Thw]]], tiles: Thw, grid: Thw | None = None,
                   tile: Thw | None = None, model: str = "") -> Strategy:
        """The strategy of windows in tiles, [step][layer][head], on a grid of `tiles`."""
        places: dict[Share, int] = {}
        shares = {window: share_of_window(window, tiles)
                  for window in {tuple(w) for rows in windows for row in rows for w in row}}
        table = tuple(tuple(tuple(places.setdefault(shares[tuple(w)], len(places)) for w in row) for row in rows)
                      for rows in windows)
        return cls(tuple(places), table, grid, tile, model)

    def sta_param(self, tiles: Thw, steps: int | None = None) -> list[list[tuple[Thw, ...]]]:
        """Windows in tiles as [step][layer][head], for a grid of `tiles` and a schedule of `steps` (None: its own)."""
        sizes = [window_of_share(share, tiles) for share in self.choices]
        rows = {row: tuple(sizes[place] for place in row) for layers in self.assignment for row in layers}
        table = [[rows[row] for row in layers] for layers in self.assignment]
        return table if steps is None else [table[self.step_of(step, steps)] for step in range(steps)]

    def density(self, grid: TokenGrid, tile_size: Thw) -> float:
        """Share of query-key pairs computed, exact, averaged over steps, layers and heads."""
        tiles = num_tiles(grid.thw, tile_size)
        each = [window_density(grid, tile_size, window_of_share(share, tiles)) for share in self.choices]
        return sum(cost * count for cost, count in zip(each, self.use_counts, strict=True)) / sum(self.use_counts)
