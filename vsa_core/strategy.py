"""A mask strategy: the window of every head, at every step and layer. Held as fractions of the grid.

`strategy_files` reads and writes it.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from .grid import Thw, TokenGrid
from .tiling import num_tiles
from .window import Share, check_share, share_of_window, window_density, window_of_share

Assignment = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class Strategy:
    """windows[assignment[step][layer][head]] is a head's window as fractions of the grid."""

    windows: tuple[Share, ...]
    assignment: Assignment
    grid: Thw | None = None
    """Token grid that it was made on, as far as known."""
    tile: Thw | None = None
    model: str = ""

    def __post_init__(self):
        shares = tuple(check_share(share) for share in self.windows)
        table = tuple(tuple(map(tuple, layers)) for layers in self.assignment)
        if not table or not table[0] or not table[0][0]:
            raise ValueError("strategy without steps, layers or heads: wanted at least one of each")
        layers, heads = len(table[0]), len(table[0][0])
        for step, rows in enumerate(table):
            if len(rows) != layers:
                raise ValueError(f"strategy: step {step} has {len(rows)} layers, wanted {layers} as in step 0")
            for layer, row in enumerate(rows):
                if len(row) != heads:
                    raise ValueError(f"strategy: step {step}, layer {layer} has {len(row)} heads, wanted {heads}")
                for head, place in enumerate(row):
                    if type(place) is not int or not 0 <= place < len(shares):
                        raise ValueError(f"strategy: step {step}, layer {layer}, head {head} has window number "
                                         f"{place!r}, wanted 0 to {len(shares) - 1}")
        object.__setattr__(self, "windows", shares)
        object.__setattr__(self, "assignment", table)

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

    @property
    def steps(self) -> int:
        return len(self.assignment)

    @property
    def layers(self) -> int:
        return len(self.assignment[0])

    @property
    def heads(self) -> int:
        return len(self.assignment[0][0])

    def require(self, layers: int | None, heads: int) -> None:
        """Raise ValueError, naming both sides, unless the strategy fits a model. layers None: unknown, not compared."""
        if heads != self.heads or layers not in (None, self.layers):
            made_for = f" ({self.model})" if self.model else ""
            found = f"{heads} heads" if layers is None else f"{layers} layers of {heads} heads"
            raise ValueError(f"the strategy was made for {self.layers} layers of {self.heads} heads{made_for}, this "
                             f"model has {found}: layers and heads cannot be converted. Search one for this model")

    def step_of(self, step: int, steps: int) -> int:
        """The strategy's step for step `step` of a schedule of `steps`: the one at the same fraction of it."""
        if not 0 <= step < steps:
            raise ValueError(f"step {step} of {steps}: wanted 0 to {steps - 1}")
        return (2 * step + 1) * self.steps // (2 * steps)

    def resampled(self, steps: int) -> Strategy:
        """The strategy for a schedule of another length; layers and heads stay."""
        return replace(self, assignment=tuple(self.assignment[self.step_of(step, steps)] for step in range(steps)))

    def sta_param(self, tiles: Thw, steps: int | None = None) -> list[list[tuple[Thw, ...]]]:
        """Windows in tiles as [step][layer][head], for a grid of `tiles` and a schedule of `steps` (None: its own)."""
        sizes = [window_of_share(share, tiles) for share in self.windows]
        rows = {row: tuple(sizes[place] for place in row) for layers in self.assignment for row in layers}
        table = [[rows[row] for row in layers] for layers in self.assignment]
        return table if steps is None else [table[self.step_of(step, steps)] for step in range(steps)]

    def density(self, grid: TokenGrid, tile_size: Thw) -> float:
        """Share of query-key pairs computed, exact, averaged over steps, layers and heads."""
        tiles = num_tiles(grid.thw, tile_size)
        each = [window_density(grid, tile_size, window_of_share(share, tiles)) for share in self.windows]
        return sum(cost * count for cost, count in zip(each, self._uses, strict=True)) / sum(self._uses)

    @cached_property
    def _uses(self) -> list[int]:
        uses = [0] * len(self.windows)
        for layers in self.assignment:
            for row in layers:
                for place in row:
                    uses[place] += 1
        return uses

    @property
    def uses(self) -> dict[Share, int]:
        """How many heads of all steps and layers have each window."""
        return dict(zip(self.windows, self._uses, strict=True))
