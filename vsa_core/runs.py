"""A sequence cut into runs of consecutive tokens: the blocks of methods that know no tiles, such as SLA."""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import BLOCK, tile_means
from .grid import TokenGrid
from .layout import TileLayout
from .lowering import readable


def run_rows(tokens: int, run: int, first: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """`token_rows` of consecutive tokens from row `first` on, run after run; every run takes whole blocks.

    int32 [runs * ceil(run / 64) * 64], -1 behind a run that does not fill its blocks.
    """
    if run < 1:
        raise ValueError(f"runs of {run} tokens: wanted 1 or more")
    runs, slots = -(-tokens // run), -(-run // BLOCK) * BLOCK
    place = torch.arange(slots, device=device)
    rows = torch.arange(runs, device=device)[:, None] * run + place
    return torch.where((place < run) & (rows < tokens), rows + first, -1).flatten().to(torch.int32)


def run_means(x: Tensor, run: int, backend: str = "auto") -> Tensor:
    """The mean of every run of tokens.   [B, S, H, D] -> float32 [B, H, ceil(S / run), D] (float64 for float64)

    backend: as in `kernels.tile_means`.
    """
    rows = run_rows(x.shape[1], run, device=x.device)
    return tile_means(readable(x), rows, -(-x.shape[1] // run), -(-run // BLOCK), backend)[0]


@dataclass(frozen=True)
class RunLayout:
    """A sequence in runs of 64 keys and `query_run` queries, raster order; the last run may be short."""

    keys: TileLayout
    """The runs of 64, as tiles of a grid of one row; tokens that are not video lie behind them."""
    query_run: int
    query_rows: Tensor
    """int32 [Nq * query_run], `token_rows` of the video's runs of queries."""
    visible: Tensor | None
    """int64, the tokens that queries may see, where some are hidden."""

    @classmethod
    def of(cls, grid: TokenGrid, query_run: int, device: torch.device) -> RunLayout:
        """The layout of a sequence. query_run: a multiple of 64. Raises ValueError for another one."""
        if query_run < BLOCK or query_run % BLOCK:
            raise ValueError(f"runs of {query_run} queries: wanted a multiple of {BLOCK}")
        tokens = grid.num_video_tokens
        line = TokenGrid((1, 1, tokens), grid.prefix, grid.suffix, grid.hidden)
        visible = None
        if grid.hidden:
            hidden = [i if i < grid.prefix else i + tokens for i in grid.hidden]
            seen = torch.ones(grid.num_tokens, dtype=torch.bool)
            seen[hidden] = False
            visible = seen.nonzero().flatten().to(device)
        return cls(TileLayout.of_grid(line, (1, 1, BLOCK), device, cache_tile_buf=False), query_run,
                   run_rows(tokens, query_run, grid.prefix, device), visible)

    @property
    def num_keys(self) -> int:
        """Runs of 64 keys."""
        return math.prod(self.keys.num_tiles)

    @property
    def num_queries(self) -> int:
        """Runs of queries."""
        return self.query_rows.numel() // self.query_run

    def seen_rows(self) -> Tensor:
        """int32 [slots], `token_rows` of all keys in their runs, -1 also for those that no query may see."""
        slot = torch.arange(BLOCK, device=self.query_rows.device)
        is_seen = (slot < self.keys.kernel_block_sizes[:, None]).flatten()
        return torch.where(is_seen, self.keys.token_rows, -1)

    def per_block(self, lists: Tensor) -> Tensor:
        """Lists of the runs of queries as lists of their blocks of 64.   [B, H, Nq, K] -> [B, H, blocks, K]"""
        per_run = self.query_run // BLOCK
        return lists if per_run == 1 else lists.repeat_interleave(per_run, dim=2)[:, :, :self.num_keys]
