"""The problems that kernels of tile means and of tile selections have to solve on the user's card before use."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference_tiles
from .guarded import Guarded
from .spec import BLOCK, Call, KernelSpec

MEANS_TOLERANCE = 1e-5
"""Largest difference of a mean of about 1 from float64; sums are float32."""


@dataclass(frozen=True)
class MeansProblem:
    """Means of cut, full and empty tiles of some tensors; a token of no tile is NaN."""

    shows: str
    parts: int
    tiles: int
    blocks_per_tile: int = 1
    batch: int = 1
    heads: int = 2

    def prepare(self, spec: KernelSpec, call: Call, device: torch.device, multiprocessors: int) -> PreparedTiles:
        generator = torch.Generator().manual_seed(len(self.shows))
        slots = self.tiles * self.blocks_per_tile * BLOCK
        rows = torch.full((slots,), -1, dtype=torch.int32)
        order = torch.randperm(slots, generator=generator).int() + 1       # row 0 lies in no tile
        counts = torch.randint(0, slots // self.tiles + 1, (self.tiles,), generator=generator).tolist()
        counts[0], counts[-1] = slots // self.tiles, 1
        for tile, count in enumerate(counts):
            first = tile * slots // self.tiles
            rows[first:first + count] = order[first:first + count]
        shape = (self.batch, slots + 1, self.heads, call.head_dim)
        parts = [torch.randn(shape, generator=generator).to(call.dtype) for _ in range(self.parts)]
        for x in parts:
            x[:, 0] = torch.nan
        guarded = [Guarded(x, device) for x in (*parts, rows)]
        parts, rows = [guard.tensor for guard in guarded[:-1]], guarded[-1].tensor
        wanted = reference_tiles.tile_means([x.double() for x in parts], rows, self.tiles, self.blocks_per_tile)
        return PreparedTiles(self, (parts, rows, self.tiles, self.blocks_per_tile), guarded, wanted, torch.float32)

    def sentence(self, found: Tensor, wanted: Tensor) -> tuple[float, str | None]:
        worst = (found.double() - wanted).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max().item()
        return worst, None if worst <= MEANS_TOLERANCE else f"means off by {worst:.1e}, allowed {MEANS_TOLERANCE:.0e}"


@dataclass(frozen=True)
class SelectionProblem:
    """Lists from scores that are exact in float32 and tie often; one key is NaN."""

    shows: str
    queries: int
    keys: int
    kept: int
    blocks_per_tile: int = 1
    always: int = 0
    heads: int = 2

    def prepare(self, spec: KernelSpec, call: Call, device: torch.device, multiprocessors: int) -> PreparedTiles:
        generator = torch.Generator().manual_seed(len(self.shows))
        means = [torch.randint(-2, 3, (1, self.heads, n, call.head_dim), generator=generator).to(call.dtype)
                 for n in (self.queries, self.keys)]
        means[1][..., 8:] = 0
        means[1][:, -1, self.keys // 2] = torch.nan
        guarded = [Guarded(x, device) for x in means]
        operands = (*(guard.tensor for guard in guarded), self.kept, 0.5, self.blocks_per_tile, self.always)
        return PreparedTiles(self, operands, guarded, reference_tiles.select_tiles(*operands), torch.int32)

    def sentence(self, found: Tensor, wanted: Tensor) -> tuple[float, str | None]:
        rows = int((found != wanted).any(-1).sum())
        return float(rows), None if rows == 0 else f"{rows} of {wanted[..., 0].numel()} lists are other ones"


@dataclass(frozen=True)
class PreparedTiles:
    """A problem on a device, ready to be given to a kernel."""

    problem: MeansProblem | SelectionProblem
    operands: tuple
    guarded: list[Guarded]
    wanted: Tensor
    dtype: torch.dtype

    def attempt(self, run: Callable) -> tuple[tuple[Tensor, ...], str | None]:
        """What a kernel answers, and what it did that it must not."""
        output = Guarded.output(self.wanted.shape, self.dtype, self.wanted.device)
        found = run(*self.operands, out=output.tensor)
        if found.data_ptr() != output.tensor.data_ptr():
            return (found,), "the result is not where it was to be written"
        if not output.bands_are_whole():
            return (found,), "memory beside the result was written to"
        if not all(guard.is_unchanged() for guard in self.guarded):
            return (found,), "an operand or memory beside one was written to"
        return (found,), None

    def error(self, found: tuple[Tensor, ...]) -> tuple[float, str | None]:
        return self.problem.sentence(found[0], self.wanted)


MEANS_PROBLEMS = (
    MeansProblem("one tensor", 1, 3),
    MeansProblem("two tensors in a batch", 2, 4, batch=2),
    MeansProblem("three tensors in tiles of two blocks", 3, 3, 2),
    MeansProblem("more work than the card has multiprocessors", 3, 40, heads=8),
)

SELECTION_PROBLEMS = (
    SelectionProblem("one tile", 1, 1, 1),
    SelectionProblem("blocks of a tile and blocks that are always read", 40, 300, 40, 2, 3),
    SelectionProblem("all tiles", 5, 70, 70, always=40),
    SelectionProblem("rows for two warps' registers", 20, 1000, 1),
    SelectionProblem("rows of a long clip", 20, 1440, 144),
    SelectionProblem("the longest rows", 10, 4096, 410),
    SelectionProblem("more work than the card has multiprocessors", 300, 77, 8, heads=4),
)
