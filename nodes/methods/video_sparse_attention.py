"""The node "Video Sparse Attention (VSA)"."""
from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ...vsa_core.budgets import Budgets
from ...vsa_core.tiling import parse_tile_size
from ..families import family_of
from ..hook.hook import SparseAttentionHook
from ..hook.settings import DEFAULT_START, precision_input, read_settings, settings_inputs, why_invalid
from ..hook.status import show_under_node
from ..trained.gate_advice import advice_before
from ..trained.gates import GateSet, gates_of
from ..trained.training import warn_of_other_training
from .attention_mass import mass_input, require_mass
from .far_field import OFF, far_field_input, uses_far_field, warning
from .presets import CUSTOM, PRESETS, as_trained, choose, preset_input
from .spread import EVEN, spread_from, spread_input
from .strategy_input import StrategyType, require_budgets
from .video_sparse_method import VideoSparseMethod

log = logging.getLogger(__name__)

DEFAULT_SPARSITY, AUTO_TILE = 0.8, "auto"
TILE_SIZES = (AUTO_TILE, "4x4x4", "1x8x8", "2x4x8", "2x8x4", "4x2x8", "4x8x2", "8x2x4", "8x4x2", "4x4x8", "4x8x4",
              "8x4x4", "2x8x8", "4x8x8", "8x8x4")


class VideoSparseAttentionPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="VideoSparseAttentionPatch",
            display_name="Video Sparse Attention (VSA)",
            category="model/patch",
            description=(
                "Makes a video model sample faster: in self-attention every tile of the clip attends only to the "
                "tiles that matter most to it. Works at any resolution and length. After a run the node says "
                "whether it was on, whether that was faster, and why not."),
            search_aliases=["VSA", "sparse attention", "FastVideo", "speed up video", "Wan"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A video model from any loader. Other patches may come before or after."),
                io.Float.Input(
                    "sparsity", default=DEFAULT_SPARSITY, min=0.0, max=0.99, step=0.01,
                    tooltip="Share of the clip that a tile does not look at. Higher is faster and further from the "
                            "dense result. 0.8 is a good start for models that were not trained for it; above 0.85 "
                            "expect visible changes. Models trained with VSA take 0.8 to 0.9. 0 is dense attention."),
                io.Combo.Input(
                    "tile_size", options=list(TILE_SIZES), default=AUTO_TILE, optional=True, advanced=True,
                    tooltip="Tokens per tile as time x height x width. auto takes the shape that fits this "
                            "resolution best: nearly a cube, with little padding at the edges. 4x4x4 is what VSA "
                            "checkpoints were trained with. 128 and 256 tokens choose more coarsely. Any tile of 64, "
                            "128, 192, ... tokens is accepted."),
                *settings_inputs(),
                far_field_input(),
                mass_input(),
                preset_input("sparsity", trains=True),
                precision_input(),
                StrategyType.Input(
                    "strategy", optional=True,
                    tooltip="How many tiles every head keeps, per step and layer, from a calibration or a file. It "
                            "holds at any size of clip and number of steps; sparsity is unused then. It must be for "
                            "a model of as many layers and heads."),
                spread_input(trains=True),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, tile_size=None):
        return why_invalid(lambda text: read_method(0.0, text), tile_size)

    @classmethod
    def execute(cls, model, sparsity, tile_size=AUTO_TILE, far_field=OFF, attention_mass=0.0, preset=CUSTOM,
                strategy=None, spread=EVEN, **settings) -> io.NodeOutput:
        node_id, gates = getattr(getattr(cls, "hidden", None), "unique_id", None), gates_of(model)
        require_mass(attention_mass)
        if strategy is not None:
            _require_use(strategy, model, gates, attention_mass)
        sparsity, settings = preset_of(preset, sparsity, settings, gates, strategy is not None)
        method, settings = read_method(sparsity, tile_size), read_settings(**settings)
        own = {"gates": gates and f"{gates.trained.name} was trained to read the same number of tiles in every step",
               "attention_mass": attention_mass and "attention_mass says how many tiles are kept",
               "strategy": strategy and "the strategy spreads the work itself"}
        method = replace(method, gates=gates, far_field=uses_far_field(far_field, gates is not None),
                         mass=attention_mass, budgets=strategy, start=settings.schedule.start_percent,
                         spread_from=spread_from(spread, next(filter(None, own.values()), "")))
        patched = SparseAttentionHook.install(model, method, settings, node_id)
        if method.gates is not None:
            advice = advice_before(method.gates.trained, sparsity, settings)
            if advice := [*advice, *filter(None, [warning(far_field, True)])]:
                log.warning("[VSA] %s", "; ".join(advice))
                show_under_node("\n".join(advice), node_id)
        warn_of_other_training(patched, node_id)
        return io.NodeOutput(patched)


def _require_use(strategy: Budgets, model, gates: GateSet | None, mass: float) -> None:
    """Raise ValueError where a strategy cannot say what heads keep."""
    require_budgets(strategy)
    if gates is not None:
        raise ValueError(f"{gates.trained.name} was trained to read the same number of tiles everywhere: a strategy is "
                         "for models that were not trained with VSA. Disconnect it")
    if mass:
        raise ValueError(f"attention_mass {mass:g} and a strategy: both say how many tiles a head keeps. Set "
                         "attention_mass to 0 or disconnect the strategy")
    family, net = family_of(model.model), model.model.diffusion_model
    strategy.require(family.layer(net, {}, 0)[1], family.heads(net)[0])


def preset_of(preset: str, sparsity: float, settings: dict[str, Any], gates: GateSet | None, planned: bool = False):
    """(sparsity, shared widgets) as a preset has them, for a model with these gates.

    planned: whether a strategy says what heads keep, the dense start included.
    """
    defaults = {"sparsity": DEFAULT_SPARSITY, "start_percent": DEFAULT_START, "end_percent": 1.0, "dense_blocks": ""}
    wanted = {}
    if gates is not None:
        wanted = as_trained(gates.trained)
    elif planned:
        wanted = {"start_percent": 0.0}
    elif preset in PRESETS:
        wanted = {"sparsity": PRESETS[preset].sparsity, "start_percent": PRESETS[preset].start_percent}
    widgets = {name: settings.get(name, default) for name, default in defaults.items()} | {"sparsity": sparsity}
    chosen = choose(preset, widgets, defaults, wanted, gates and gates.trained)
    used = dict(chosen.widgets)
    return used.pop("sparsity"), {**settings, **used, "few_steps": chosen.few_steps, "said": chosen.said}


def read_method(sparsity: float, tile_size: str) -> VideoSparseMethod:
    """The node's own widgets as a method. Raises ValueError: found, wanted."""
    if not 0.0 <= sparsity <= 0.99:
        raise ValueError(f"sparsity {sparsity}: wanted 0 to 0.99")
    return VideoSparseMethod(sparsity, None if tile_size == AUTO_TILE else parse_tile_size(tile_size))
