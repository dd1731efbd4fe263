"""Sliding Tile Attention as a method for the hook."""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...vsa_core.backends.sliding_tile_attn import SlidingTileAttentionMetadata, SlidingTileAttentionMetadataBuilder
from ...vsa_core.forward_context import set_forward_context
from ...vsa_core.grading import graded_shares
from ...vsa_core.grid import Thw, TokenGrid
from ...vsa_core.selector import AttentionBackendEnum
from ...vsa_core.strategy import Strategy
from ...vsa_core.tiling import auto_tile_size
from ...vsa_core.window import (
    Share,
    effective_window,
    first_seen,
    is_full,
    window_density,
    window_of_density,
)
from ..hook.method import LayerCall, StaysDense
from ..hook.run import Run
from .local_layers import LocalLayers
from .spread import SO_NOISY


@dataclass
class Plan:
    """One grid: its metadata, and the strategy's windows in tiles per schedule length and heads of a call."""

    metadata: SlidingTileAttentionMetadata
    layers: LocalLayers
    params: dict[tuple[int, int, int], list] = field(default_factory=dict)
    densities: dict[tuple[Thw, ...], Tensor] = field(default_factory=dict)
    """Share of query-key pairs computed, per distinct windows of a layer's heads."""
    by_step: dict[int, list[Thw]] = field(default_factory=dict)
    """Where the work is spread by noise: steps of the schedule -> the window of each."""

    @property
    def tiles(self) -> Thw:
        return tuple(self.metadata.layout.num_tiles)

    def density(self, md: SlidingTileAttentionMetadata, heads: int) -> Tensor:
        """Share of query-key pairs that a layer with this metadata computes, a scalar on the CPU."""
        windows = md.windows(heads)
        if windows not in self.densities:
            self.densities[windows] = torch.tensor(md.density(heads))
        return self.densities[windows]


@dataclass(frozen=True)
class SlidingTileMethod:
    """STA with its settings. tile_size None: `auto_tile_size` of the grid at hand. A strategy replaces the window."""

    window: Thw | Share
    tile_size: Thw | None
    strategy: Strategy | None = None
    far_field: bool = False
    start: float = 0.0
    """Dense part of the denoising at the start, as far as work is spread by noise: it counts as work."""
    spread_from: int | None = None
    """Steps of a schedule from which on the work is spread by noise; None: never."""
    name: str = "STA"
    dense_serves = True
    timed = True
    has_strict = True

    @property
    def far_cure(self) -> str:
        return "choose a larger window" if self.strategy is None else "take a strategy with a smaller error"

    def plans_start(self, steps: int) -> bool:
        return self.spread_from is not None and steps >= self.spread_from

    def _window(self, plan: Plan, call: LayerCall) -> Thw:
        """Of this step, where the work is spread by noise."""
        step, layout = call.step, plan.metadata.layout
        if step.total not in plan.by_step:
            window = effective_window(plan.metadata.STA_param, plan.tiles)
            even = window_density(layout.grid, layout.tile_size, window)
            known = {}
            for share in graded_shares(step.noise, self.start + (1 - self.start) * even):
                if share not in known:
                    known[share] = window_of_density(layout.grid, layout.tile_size, window, round(share, 6))
                plan.by_step.setdefault(step.total, []).append(known[share])
            first, last = plan.by_step[step.total][0], plan.by_step[step.total][-1]
            densities = [window_density(layout.grid, layout.tile_size, window) for window in plan.by_step[step.total]]
            step.run.note(f"the work is spread over the steps by noise: window {_x(first)} in the first, {_x(last)} in "
                          f"the last, {sum(densities) / len(densities):.0%} of the pairs on average")
        return plan.by_step[step.total][step.index]

    def keeps_all(self, plan: Plan, heads: int, call: LayerCall) -> bool:
        return all(is_full(window, plan.tiles) for window in self._metadata(plan, call).windows(heads))

    def work(self, plan: Plan, heads: int, call: LayerCall) -> float:
        return round(plan.density(self._metadata(plan, call), heads).item(), 2)

    def plan(self, grid: TokenGrid, device: torch.device) -> Plan:
        metadata = SlidingTileAttentionMetadataBuilder().build(
            STA_param=self.window, current_timestep=0, raw_latent_shape=grid.thw, device=device,
            tile_size=self.tile_size or auto_tile_size(grid.thw), prefix=grid.prefix, suffix=grid.suffix,
            hidden=grid.hidden, cache_tile_buf=False)
        return Plan(metadata, LocalLayers(AttentionBackendEnum.SLIDING_TILE_ATTN, far_field=self.far_field))

    def facts(self, plan: Plan) -> dict[str, Any]:
        md, tiles = plan.metadata, plan.tiles
        facts = {"tile": list(md.layout.tile_size), "tiles": math.prod(tiles), "far_field": self.far_field}
        if self.strategy is not None:
            made_for = f" for {self.strategy.model}" if self.strategy.model else ""
            return {**facts, "kept": None, "window": None,
                    "label": f"strategy{made_for}, {self.strategy.steps} steps"}
        window = effective_window(md.STA_param, tiles)
        if self.spread_from is not None:
            return {**facts, "kept": None, "window": None,
                    "label": f"window {_x(window)} of {_x(tiles)} tiles, larger in noisy steps, smaller later"}
        return {**facts, "kept": math.prod(window), "window": list(window),
                "label": f"window {_x(window)} of {_x(tiles)} tiles"}

    def attend(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        md, heads = self._metadata(plan, call), q.shape[2]
        windows = md.windows(heads)
        if self.strategy is not None and all(is_full(window, plan.tiles) for window in windows):
            raise StaysDense("the strategy's windows cover the clip")
        if self.plans_start(call.step.total) and is_full(windows[0], plan.tiles):
            raise StaysDense(SO_NOISY)
        call.record.densities.append(plan.density(md, heads))
        if call.sampled:
            call.record.tile_map = window_map(windows, plan.tiles)
        layer = plan.layers.of(q, call.kernel)
        layer.attn_impl.on_lists = call.reads
        with set_forward_context(md):
            return layer(q, k, v)

    def remarks(self, run: Run) -> list[str]:
        return []

    def _metadata(self, plan: Plan, call: LayerCall) -> SlidingTileAttentionMetadata:
        if self.spread_from is not None and self.plans_start(call.step.total):
            return plan.metadata.at(0, None, self._window(plan, call))
        return plan.metadata.at(call.step.index, call.layer, self._param(plan, call))

    def _param(self, plan: Plan, call: LayerCall):
        if self.strategy is None:
            return None
        if call.layer is None or call.heads is None:
            raise StaysDense("the strategy is per layer and head, and those of this call are not known")
        total, (first, last) = call.step.total, (call.heads.start, call.heads.stop)
        if (total, first, last) not in plan.params:
            plan.params[total, first, last] = [[row[first:last] for row in layers]
                                               for layers in self.strategy.sta_param(plan.tiles, total)]
        return plan.params[total, first, last]


def window_map(windows: tuple[Thw, ...], tiles: Thw) -> Tensor:
    """Share of heads whose window around the middle tile holds each tile.   -> [Nt, Nh, Nw]"""
    total = torch.zeros(tiles)
    for window in set(windows):
        seen = []
        for width, n in zip(effective_window(window, tiles), tiles, strict=True):
            first = first_seen(width, n)[n // 2]
            seen.append(slice(first, first + width))
        total[tuple(seen)] += windows.count(window)
    return total / len(windows)


def _x(thw) -> str:
    return "x".join(map(str, thw))
