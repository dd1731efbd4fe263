"""The node "Sliding Tile Attention (STA)"."""
from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ...vsa_core.backends.sliding_tile_attn import (
    STA_TILE_SIZE,
    SlidingTileAttentionMetadata,
    SlidingTileAttentionMetadataBuilder,
)
from ...vsa_core.forward_context import set_forward_context
from ...vsa_core.grid import Thw, TokenGrid
from ...vsa_core.selector import AttentionBackendEnum
from ...vsa_core.strategy import Strategy
from ...vsa_core.tiling import auto_tile_size, parse_tile_size
from ...vsa_core.window import Share, effective_window, first_seen, is_full, parse_window
from ..families import family_of
from ..hook.hook import SparseAttentionHook
from ..hook.method import LayerCall, StaysDense
from ..hook.run import Run
from ..hook.settings import DEFAULT_START, precision_input, read_settings, settings_inputs, why_invalid
from ..trained.fed_layers import warn_of_other_training
from .far_field import OFF, far_field_input, uses_far_field
from .local_layers import LocalLayers
from .presets import CUSTOM, PRESETS, choose, preset_input

StrategyType = io.Custom("STA_STRATEGY")

AUTO_TILE, UPSTREAM_TILE = "auto", "6x8x8"
TILE_SIZES = (AUTO_TILE, UPSTREAM_TILE, "4x4x4", "2x8x8", "4x8x8", "3x8x8", "1x8x8", "2x4x8")
DEFAULT_WINDOW = "1.0x0.5x0.5"


@dataclass
class Plan:
    """One grid: its metadata, and the strategy's windows in tiles per schedule length and heads of a call."""

    metadata: SlidingTileAttentionMetadata
    layers: LocalLayers
    params: dict[tuple[int, int, int], list] = field(default_factory=dict)
    densities: dict[tuple[Thw, ...], Tensor] = field(default_factory=dict)
    """Share of query-key pairs computed, per distinct windows of a layer's heads."""

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
    name: str = "STA"
    dense_serves = True
    timed = True
    has_strict = True

    @property
    def far_cure(self) -> str:
        return "choose a larger window" if self.strategy is None else "take a strategy with a smaller error"

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
        return {**facts, "kept": math.prod(window), "window": list(window),
                "label": f"window {_x(window)} of {_x(tiles)} tiles"}

    def attend(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        md, heads = self._metadata(plan, call), q.shape[2]
        windows = md.windows(heads)
        if self.strategy is not None and all(is_full(window, plan.tiles) for window in windows):
            raise StaysDense("the strategy's windows cover the clip")
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


class SlidingTileAttentionPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SlidingTileAttentionPatch",
            display_name="Sliding Tile Attention (STA)",
            category="model/patch",
            description=(
                "Makes a video model sample faster: in self-attention every tile of the clip attends to a window of "
                "tiles around it. Works at any resolution and length. A strategy gives every step, layer and head "
                "a window of its own. After a run the node says whether it was on, whether that was faster, and why "
                "not."),
            search_aliases=["STA", "sliding tile", "sparse attention", "local attention", "FastVideo"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A video model from any loader. Other patches may come before or after."),
                io.String.Input(
                    "window", default=DEFAULT_WINDOW,
                    tooltip="What a tile sees, time x height x width: as fractions of the clip with a decimal point "
                            "(1.0x0.5x0.5, the same at every resolution), or in tiles (3x3x5). Smaller is faster and "
                            "further from dense. At the edges the window shifts inward and keeps its size. Even "
                            "numbers of tiles act as the next odd one. Unused when a strategy is connected."),
                io.Combo.Input(
                    "tile_size", options=list(TILE_SIZES), default=AUTO_TILE, optional=True, advanced=True,
                    tooltip="Tokens per tile, time x height x width. auto takes the shape of up to 64 tokens that "
                            "fits this resolution best: nearly a cube, with little padding at the edges. 6x8x8 is what "
                            "published strategies were made for. Any tile of 64, 128, 192, ... tokens is accepted."),
                StrategyType.Input(
                    "strategy", optional=True,
                    tooltip="Windows per step, layer and head, from a file or a search. It is fitted to this clip's "
                            "grid and number of steps; it must be for a model of as many layers and heads."),
                *settings_inputs(),
                far_field_input(),
                preset_input("window", trains=False),
                precision_input(),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, tile_size=None):
        return why_invalid(lambda text: read_method(DEFAULT_WINDOW, text), tile_size)

    @classmethod
    def execute(cls, model, window=DEFAULT_WINDOW, tile_size=AUTO_TILE, strategy=None, far_field=OFF, preset=CUSTOM,
                **settings) -> io.NodeOutput:
        node_id = getattr(getattr(cls, "hidden", None), "unique_id", None)
        window, settings = preset_of(preset, window, settings, strategy is not None)
        method = replace(read_method(window, tile_size, strategy), far_field=uses_far_field(far_field, False))
        if strategy is not None:
            family, net = family_of(model.model), model.model.diffusion_model
            strategy.require(family.layer(net, {}, 0)[1], family.heads(net)[0])
        patched = SparseAttentionHook.install(model, method, read_settings(**settings), node_id)
        warn_of_other_training(patched, node_id)
        return io.NodeOutput(patched)


def preset_of(preset: str, window: str, settings: dict[str, Any], planned: bool):
    """(window, shared widgets) as a preset has them. planned: whether a strategy says the windows."""
    defaults = {"window": DEFAULT_WINDOW, "start_percent": DEFAULT_START}
    wanted = {}
    if preset in PRESETS:
        wanted = {"start_percent": PRESETS[preset].start_percent}
        if not planned:
            wanted = {"window": PRESETS[preset].window, **wanted}
    widgets = {"window": window, "start_percent": settings.get("start_percent", DEFAULT_START)}
    chosen = choose(preset, widgets, defaults, wanted, None)
    used = dict(chosen.widgets)
    return used.pop("window"), {**settings, **used, "few_steps": chosen.few_steps, "said": chosen.said}


def read_method(window: str, tile_size: str, strategy: Strategy | None = None) -> SlidingTileMethod:
    """The node's own widgets as a method. Raises ValueError: found, wanted."""
    if tile_size == AUTO_TILE:
        tile = strategy.tile if strategy is not None else None
    else:
        tile = STA_TILE_SIZE if tile_size == UPSTREAM_TILE else parse_tile_size(tile_size)
    return SlidingTileMethod(parse_window(window), tile, strategy)


def _x(thw) -> str:
    return "x".join(map(str, thw))
