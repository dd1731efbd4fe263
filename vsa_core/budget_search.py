"""Measuring, inside a dense sampling, how many tiles every head can live with: the source of `budgets`.

Per-head budgets won over every better estimate of which tiles to keep in the field's comparisons; that they come from
measured output errors is HEART's idea (arXiv 2605.14513). Here one dense sampling of the user's own clip is measured.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import Span
from .backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadata
from .budgets import Budgets, check_kept, share_density, tiles_kept
from .choosing import Measurements
from .grid import Thw, TokenGrid
from .mass import sampled_masses

CANDIDATE_SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.5)
MASS_ROWS = 64
"""Tokens of a call by which it is told what a head's lists hold."""
_CHUNK_BYTES = 64 << 20
"""Bound on the differences held at once."""


class Trial(NamedTuple):
    """What trying every share in one call has given."""

    squared_errors: Tensor
    """float64 [C, H], over the clip's tokens and the batch."""
    squared_norms: Tensor
    """float64 [H]"""
    masses: Tensor
    """float64 [C, H], share of the attention on the kept tiles and the tokens that are not video."""
    milliseconds: list[float]
    """Of every share, all heads together."""


def try_shares(
    q: Tensor, k: Tensor, v: Tensor, dense: Tensor, attn_metadata: VideoSparseAttentionMetadata,
    shares: Sequence[float], far_field: bool, scale: float | None = None, backend: str = "auto", seed: int = 0,
) -> Trial:
    """Run one call with every share of the tiles in all heads, and compare with its dense result.

    q, k, v and dense: [B, tokens, H, D] in sequence order. Tokens that are not video are left out of the errors: their
    queries are dense anyway. Masses are exact, of MASS_ROWS tokens of every head. Waits for the device, for the times.
    """
    md, grid = attn_metadata, attn_metadata.grid
    tiles, heads = md.variable_block_sizes.shape[0], q.shape[2]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    video = slice(grid.prefix, grid.prefix + grid.num_video_tokens)
    held, others, asking = sampled_masses(q, k, md, scale, MASS_ROWS, seed)
    first_block = asking * md.blocks_per_tile
    errors = torch.zeros(len(shares), heads, dtype=torch.float64, device=q.device)
    masses, spans = torch.zeros_like(errors), []
    for place, share in enumerate(shares):
        impl = VideoSparseAttentionImpl(heads, q.shape[3], softmax_scale=scale, backend=backend, far_field=far_field)
        impl.kept_by_head = (tiles_kept(share, tiles),) * heads
        lists = []
        impl.on_lists = lambda own, indices, counts, layout, told=lists: told.append(indices)
        span = Span(q.device)
        out = impl.attend_readable(q, k, v, md)
        span.end()
        spans.append(span)
        for part in _parts(video, q):
            errors[place] += _squares(out[:, part], dense[:, part])
        kept = lists[0][:, :, first_block, :impl.kept_by_head[0] * md.blocks_per_tile:md.blocks_per_tile]
        kept = torch.div(kept, md.blocks_per_tile, rounding_mode="floor").long()
        masses[place] = (held.gather(-1, kept).sum(-1) + others).double().mean((0, 2))
    norms = sum(_squares(dense[:, part], None) for part in _parts(video, q))
    return Trial(errors, norms, masses, [span.milliseconds() for span in spans])


def _parts(video: slice, x: Tensor) -> list[slice]:
    step = max(1, _CHUNK_BYTES // (x.shape[0] * x.shape[2] * x.shape[3] * 4))
    return [slice(first, min(first + step, video.stop)) for first in range(video.start, video.stop, step)]


def _squares(x: Tensor, wanted: Tensor | None) -> Tensor:
    """Sum of squares of x, or of how far it is from what was wanted, per head.   [B, n, H, D] -> float64 [H]"""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x if wanted is None else x - wanted).square().sum(dim=(0, 1, 3), dtype=torch.float64)


class BudgetTable(Measurements):
    """What every share of the tiles costs every head, pooled over all calls of the same step and layer."""

    def __init__(self, shares: Sequence[float], grid: TokenGrid, tile_size: Thw, tiles: int, far_field: bool,
                 steps: int, layers: int, heads: int) -> None:
        """shares: those to try; 1, dense attention, is added as the last. Equal numbers of tiles count once.

        Raises ValueError where every share is all of the clip's tiles.
        """
        by_count = {tiles_kept(share, tiles): check_kept(share) for share in sorted(shares, reverse=True)}
        self.candidates = tuple(sorted(share for count, share in by_count.items() if count < tiles))
        if not self.candidates:
            raise ValueError(f"a clip of {tiles} tiles is too small for these shares: every one keeps all tiles. "
                             "Calibrate on a longer or larger clip")
        self.shares, self.far_field = (*self.candidates, 1.0), far_field
        self.grid, self.tile_size, self.tiles = grid, tuple(tile_size), tiles
        super().__init__([share_density(share, grid, tiles) for share in self.shares], steps, layers, heads)
        self.missed = torch.zeros_like(self.squared_errors)
        """Share of the attention that was not kept, summed over calls."""
        self.fastest = torch.full((len(self.shares),), torch.inf, dtype=torch.float64)
        """Milliseconds of the fastest call of every share, of all heads; the last is dense."""
        self.noise = torch.ones(steps, dtype=torch.float64)
        """How much of the latent is noise in every measured step, from 1 to 0."""

    def add_trial(self, step: int, layer: int, trial: Trial, dense_ms: float, noise: float,
                  heads: range | None = None) -> None:
        """`add` of what a trial gave; dense_ms: what the dense call took; noise: the step's."""
        self.noise[step] = noise
        self.add(step, layer, trial.squared_errors, trial.squared_norms, heads)
        own = slice(None) if heads is None else slice(heads.start, heads.stop)
        self.missed[step, layer][:, own] += 1 - trial.masses.cpu()
        took = torch.tensor([*trial.milliseconds, dense_ms], dtype=torch.float64)
        self.fastest = torch.minimum(self.fastest, took)

    def emphasised(self, emphasis: float) -> Tensor:
        """`relative`, with squares times noise ** emphasis: an error in a noisy step moves the finished clip further,
        because it decides what later steps work on."""
        return self.relative() * self.noise[:, None, None, None] ** (emphasis / 2)

    def unkept(self) -> Tensor:
        """Share of its attention that a head loses, float64 [steps, layers, heads, choices]. Errors: `require_whole`.

        A head whose numbers are not finite loses all, so that it stays dense.
        """
        self.require_whole()
        lost = (self.missed / self.calls[..., None, None]).transpose(2, 3).nan_to_num(nan=1.0)
        return torch.cat([lost.clamp(min=0), torch.zeros_like(lost[..., :1])], dim=-1)

    def times(self) -> list[float]:
        """Time of every choice as a share of dense attention's; never less than that of a cheaper choice."""
        took, longest = [], 0.0
        for ms in (self.fastest / self.fastest[-1]).tolist()[:-1]:
            longest = max(longest, ms)
            took.append(longest)
        return [*took, 1.0]

    def state(self) -> dict[str, Tensor]:
        return {**super().state(), "missed": self.missed, "fastest": self.fastest, "noise": self.noise}


@dataclass(frozen=True)
class BudgetResult:
    """Budgets, and what the measurement foresees for them: means over steps, layers and heads."""

    budgets: Budgets
    density: float
    """Share of query-key pairs computed."""
    time: float
    """Of the attention, as a share of dense attention's on the card that measured."""
    error: float
    worst_error: float
    kept: float
    """Share of the attention."""
    by_step: list[float]
    """Density of every part of the schedule."""
    rows: list[dict]
    """Per share, smallest first: share, density, heads (that chose it), error_of_all, kept_by_all."""


def budget_result(table: BudgetTable, choice: Tensor, model: str = "") -> BudgetResult:
    """The budgets that a choice, int64 [T, L, H] of places in `table.shares`, makes."""
    errors, lost = table.relative(), table.unkept()

    def taken(of: Tensor) -> Tensor:
        return of.gather(-1, choice[..., None])[..., 0]

    budgets = Budgets(table.shares, choice.tolist(), table.grid.thw, table.tile_size, model, table.far_field)
    costs, times = (torch.tensor(of, dtype=torch.float64)[choice] for of in (table.densities, table.times()))
    rows = [{"share": share, "density": table.densities[place], "heads": int((choice == place).sum()),
             "error_of_all": float(errors[..., place].mean()), "kept_by_all": 1 - float(lost[..., place].mean())}
            for place, share in enumerate(table.shares)]
    moved = taken(errors)
    return BudgetResult(budgets, float(costs.mean()), float(times.mean()), float(moved.mean()), float(moved.max()),
                        1 - float(taken(lost).mean()), costs.mean((1, 2)).tolist(), rows)
