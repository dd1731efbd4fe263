"""The node "Sliding Tile Attention (STA)"."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ...vsa_core.backends.sliding_tile_attn import (
    STA_TILE_SIZE,
)
from ...vsa_core.strategy import Strategy
from ...vsa_core.tiling import parse_tile_size
from ...vsa_core.window import parse_window
from ..families import family_of
from ..hook.hook import SparseAttentionHook
from ..hook.settings import DEFAULT_START, precision_input, read_settings, settings_inputs, why_invalid
from ..trained.training import warn_of_other_training
from .far_field import OFF, far_field_input, uses_far_field
from .presets import CUSTOM, PRESETS, choose, preset_input
from .sliding_tile_method import SlidingTileMethod
from .spread import EVEN, spread_from, spread_input
from .strategy_input import StrategyType, require_windows

AUTO_TILE, UPSTREAM_TILE = "auto", "6x8x8"
TILE_SIZES = (AUTO_TILE, UPSTREAM_TILE, "4x4x4", "2x8x8", "4x8x8", "3x8x8", "1x8x8", "2x4x8")
DEFAULT_WINDOW = "1.0x0.5x0.5"


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
                spread_input(trains=False),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, tile_size=None):
        return why_invalid(lambda text: read_method(DEFAULT_WINDOW, text), tile_size)

    @classmethod
    def execute(cls, model, window=DEFAULT_WINDOW, tile_size=AUTO_TILE, strategy=None, far_field=OFF, preset=CUSTOM,
                spread=EVEN, **settings) -> io.NodeOutput:
        node_id = getattr(getattr(cls, "hidden", None), "unique_id", None)
        if strategy is not None:
            require_windows(strategy)
        window, settings = preset_of(preset, window, settings, strategy is not None)
        settings = read_settings(**settings)
        method = replace(read_method(window, tile_size, strategy), far_field=uses_far_field(far_field, False),
                         start=settings.schedule.start_percent,
                         spread_from=spread_from(spread, "the strategy spreads the work itself" if strategy else ""))
        if strategy is not None:
            family, net = family_of(model.model), model.model.diffusion_model
            strategy.require(family.layer(net, {}, 0)[1], family.heads(net)[0])
        patched = SparseAttentionHook.install(model, method, settings, node_id)
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
