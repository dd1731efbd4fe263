"""Measuring budgets inside a dense sampling: how many tiles every head can live with."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import Span
from ...vsa_core.backends.video_sparse_attn import (
    VideoSparseAttentionImpl,
    VideoSparseAttentionMetadata,
    VideoSparseAttentionMetadataBuilder,
)
from ...vsa_core.budget_search import CANDIDATE_SHARES, BudgetTable, try_shares
from ...vsa_core.budgets import check_kept
from ...vsa_core.grid import Thw, TokenGrid
from ..hook.method import LayerCall
from .strategy_measurement import AUTO_CANDIDATES, Search, dense_attention


@dataclass
class BudgetSearch(Search):
    """The measurement, as a method for the hook: every call gives the dense result, some are also measured."""

    far_field: bool = True
    name: str = "VSA calibration"
    things = "shares"

    def _plan(self, grid: TokenGrid, tile: Thw, device: torch.device) -> VideoSparseAttentionMetadata:
        return VideoSparseAttentionMetadataBuilder().build(
            current_timestep=0, raw_latent_shape=grid.thw, patch_size=(1, 1, 1), VSA_sparsity=0.0, device=device,
            tile_size=tile, prefix=grid.prefix, suffix=grid.suffix, hidden=grid.hidden, cache_tile_buf=False)

    def _new_table(self, grid: TokenGrid, tile: Thw) -> BudgetTable:
        tiles = self._plan(grid, tile, torch.device("cpu")).variable_block_sizes.shape[0]
        return BudgetTable(parse_shares(self.candidates), grid, tile, tiles, self.far_field, self.measured, self.layers,
                           self.heads)

    def _measure(self, step: int, call: LayerCall, plan, q, k, v, dense: Tensor, span: Span) -> None:
        seed = int(self.table.calls.sum())
        trial = try_shares(q, k, v, dense, plan, self.table.candidates, self.far_field, backend=call.kernel, seed=seed)
        noise = call.step.noise[call.step.index]
        self.table.add_trial(step, call.layer, trial, span.milliseconds(), noise, call.heads)

    def _dense(self, plan, q, k, v, kernel: str) -> Tensor:
        if not plan.grid.hidden:
            return dense_attention(q, k, v)
        return VideoSparseAttentionImpl(q.shape[2], q.shape[3], backend=kernel).attend_readable(q, k, v, plan)


def parse_shares(text: str) -> tuple[float, ...]:
    """The shares to try, such as "0.1 0.2 0.5"; auto for the pack's own. Raises ValueError: found, wanted."""
    if str(text).strip() in ("", AUTO_CANDIDATES):
        return CANDIDATE_SHARES
    try:
        return tuple(check_kept(float(part)) for part in str(text).replace(",", " ").replace(";", " ").split())
    except ValueError as error:
        raise ValueError(f"shares {text!r}: wanted numbers above 0 and at most 1, such as 0.1 0.2 0.5") from error
