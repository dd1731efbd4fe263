"""Search for a mask strategy: which window costs each head how much of its dense attention output.

The idea of measuring candidates against dense while the trajectory stays dense is FastVideo's (STA_Mode in
attention/backends/sliding_tile_attn.py before #1124). There the best of a few windows is taken whatever its error;
here the cheapest under an error, or the best set under a density.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import BLOCK, block_sparse_attention
from .backends.sliding_tile_attn import SlidingTileAttentionMetadata
from .choosing import Measurements
from .grid import Thw, TokenGrid
from .layout import to_slots
from .strategy import Strategy
from .tiling import num_tiles
from .window import Share, effective_window, is_full, window_density, window_of_share

_CHUNK_BYTES = 128 << 20
"""Bound on a candidate's output held at once."""

CANDIDATE_SHARES: tuple[Share, ...] = (
    (1.0, 1 / 6, 1.0), (1 / 3, 5 / 6, 0.7), (1.0, 0.5, 0.3), (1 / 3, 1.0, 0.5), (1 / 3, 0.5, 1.0), (1.0, 1.0, 0.1),
    (0.2, 1.0, 1.0), (0.6, 0.5, 0.5))
"""The windows of FastVideo's searches on Wan and HunyuanVideo, as fractions of their grids."""


def default_candidates(tiles: Thw) -> tuple[Thw, ...]:
    """CANDIDATE_SHARES on a grid of `tiles`, cheapest first, equal ones once, without the full window."""
    windows = {window_of_share(share, tiles) for share in CANDIDATE_SHARES}
    return tuple(sorted((w for w in windows if not is_full(w, tiles)), key=lambda w: (math.prod(w), w)))


def candidate_errors(
    q: Tensor, k: Tensor, v: Tensor, dense: Tensor, attn_metadata: SlidingTileAttentionMetadata,
    candidates: Sequence[Thw], scale: float | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """(squared error of every candidate, squared norm of dense) per head, over the clip's tokens and the batch.

    q, k, v and dense, the dense result of the same call: [B, tokens, H, D] in sequence order.
    -> float64 [C, H] and [H] on q's device; nothing waits for it. Each candidate is run on all heads, a part of the
    query tiles at a time. Tokens that are not video are left out: their queries are dense under any window.
    """
    md, layout = attn_metadata, attn_metadata.on(q.shape[1], q.device)
    heads, slots = q.shape[2], layout.num_video_slots
    query, key, value = to_slots((q, k, v), layout).chunk(3)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    lists = []
    for window in candidates:
        (launch,) = md.lists.launches((tuple(window),) * heads)
        lists.append(md.lists.lists(launch, q.shape[0]))
    tokens = layout.grid.num_video_tokens
    source = torch.zeros(slots, dtype=torch.int64, device=q.device)
    source[layout.non_pad_index[:tokens]] = layout.tile_partition_indices[:tokens]
    valid = torch.zeros(slots, dtype=torch.bool, device=q.device)
    valid[layout.non_pad_index[:tokens]] = True
    errors = torch.zeros(len(candidates), heads, dtype=torch.float64, device=q.device)
    norms = torch.zeros(heads, dtype=torch.float64, device=q.device)
    per_block = q.shape[0] * BLOCK * heads * q.shape[3] * 4
    step = max(1, _CHUNK_BYTES // per_block)
    for first in range(0, slots // BLOCK, step):
        blocks = slice(first, first + step)
        rows = slice(first * BLOCK, min((first + step) * BLOCK, slots))
        wanted, here = dense.index_select(1, source[rows]), valid[rows, None, None]
        norms += _squared_sum(wanted, here)
        for row, (indices, counts) in zip(errors, lists, strict=True):
            out = block_sparse_attention(query[:, rows], key, value, indices[:, :, blocks], counts[:, :, blocks],
                                         layout.kernel_block_sizes, scale=scale, backend=backend)
            row += _squared_sum(out.to(torch.promote_types(out.dtype, torch.float32)).sub_(wanted), here)
    return errors, norms


def _squared_sum(x: Tensor, valid: Tensor) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32)).masked_fill(~valid, 0)
    return x.square_().sum(dim=(0, 1, 3), dtype=torch.float64)


class ErrorTable(Measurements):
    """Relative L2 errors of candidate windows, pooled over all calls of the same step and layer."""

    def __init__(self, candidates: Sequence[Thw], grid: TokenGrid, tile_size: Thw, steps: int, layers: int,
                 heads: int) -> None:
        """candidates: windows in tiles; the full window, which has no error, is added as the last."""
        self.grid, self.tile_size, self.tiles = grid, tuple(tile_size), num_tiles(grid.thw, tile_size)
        kept = {effective_window(window, self.tiles): None for window in candidates}
        self.candidates = tuple(window for window in kept if not is_full(window, self.tiles))
        self.windows = (*self.candidates, self.tiles)
        super().__init__([window_density(grid, tile_size, window) for window in self.windows], steps, layers, heads)


@dataclass(frozen=True)
class SearchResult:
    """A strategy, and what the search foresees for it."""

    strategy: Strategy
    density: float
    """Share of query-key pairs computed, averaged over steps, layers and heads."""
    error: float
    """Relative L2 error of a head's output, averaged the same way."""
    worst_error: float
    table: list[dict]
    """Per window, cheapest first: window, density, heads (that chose it), error (of those), error_of_all."""


def search_result(table: ErrorTable, choice: Tensor, model: str = "") -> SearchResult:
    """The strategy that a choice, int64 [T, L, H] of places in `table.windows`, makes."""
    errors = table.relative()
    taken = errors.gather(-1, choice[..., None])[..., 0]
    windows = [[[table.windows[place] for place in row] for row in rows] for rows in choice.tolist()]
    strategy = Strategy.of_windows(windows, table.tiles, table.grid.thw, table.tile_size, model)
    rows = []
    for place in sorted(range(len(table.windows)), key=lambda place: table.densities[place]):
        mine = taken[choice == place]
        rows.append({"window": table.windows[place], "density": table.densities[place], "heads": mine.numel(),
                     "error": float(mine.mean()) if mine.numel() else None,
                     "error_of_all": float(errors[..., place].mean())})
    density = sum(row["density"] * row["heads"] for row in rows) / choice.numel()
    return SearchResult(strategy, density, float(taken.mean()), float(taken.max()), rows)
