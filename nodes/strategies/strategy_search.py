"""The node "STA Strategy Search": measures, on the user's own model, prompt and resolution, which window every head
can live with."""
from __future__ import annotations

import logging

from comfy_api.latest import io, ui

from ... import kernels
from ...vsa_core.choosing import choose_under_density, choose_under_error
from ...vsa_core.search import ErrorTable, SearchResult, search_result
from ..hook.settings import why_invalid
from ..hook.status import show_under_node
from ..hook.verdict import bullets
from ..methods.sliding_tile_attention import AUTO_TILE, TILE_SIZES
from ..methods.sliding_tile_attention import read_method as read_sta
from ..methods.strategy_input import StrategyType
from .dense_sampling import Sampling, kept_file, measure, sampling_inputs
from .strategy_files import FOLDER, write_strategy
from .strategy_map import draw_strategy
from .strategy_measurement import AUTO_CANDIDATES, Search, parse_candidates

log = logging.getLogger(__name__)

ERROR, DENSITY = "error of every head", "density of the whole"


class STAStrategySearch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="STAStrategySearch",
            display_name="STA Strategy Search",
            category="model/patch",
            description=(
                "Samples your clip densely once and measures, in some of the steps, how much each head of each layer "
                "loses under each candidate window. Then gives every head the cheapest window it can live with. "
                "Minutes, not hours; can be interrupted and goes on where it stopped. The result is saved by itself."),
            search_aliases=["STA", "mask search", "calibrate sparse attention"],
            is_output_node=True,
            inputs=[
                *sampling_inputs(4),
                io.Combo.Input("goal", options=[ERROR, DENSITY], default=ERROR,
                               tooltip="error of every head: no head may move further from dense attention than "
                                       "max_error, and the speed is what that leaves. density of the whole: at most "
                                       "max_density of all attention is computed, shared out so that the error is "
                                       "smallest."),
                io.Float.Input("max_error", default=0.15, min=0.0, max=1.0, step=0.01,
                               tooltip="For the first goal: how far the output of a head may move from dense "
                                       "attention, as a share of its size. Smaller keeps more; 0 keeps everything."),
                io.Float.Input("max_density", default=0.3, min=0.01, max=1.0, step=0.01,
                               tooltip="For the second goal: the share of dense attention that is computed, averaged "
                                       "over steps, layers and heads."),
                io.String.Input("candidates", default=AUTO_CANDIDATES, optional=True, advanced=True,
                                tooltip="Windows to try, separated by spaces or semicolons, in tiles (3x3x5) or as "
                                        "fractions of the clip (1.0x0.5x0.3). auto: eight shapes, long in time, "
                                        "wide, tall, and small cubes."),
                io.Combo.Input("tile_size", options=list(TILE_SIZES), default=AUTO_TILE, optional=True, advanced=True,
                               tooltip="As in Sliding Tile Attention."),
                io.Combo.Input("backend", options=[kernels.AUTO, *(spec.name for spec in kernels.KERNELS)],
                               default=kernels.AUTO, optional=True, advanced=True,
                               tooltip="The kernel that the candidates are measured with."),
            ],
            outputs=[StrategyType.Output("strategy"), io.String.Output("report"), io.Image.Output("map")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, tile_size=None):
        return why_invalid(lambda text: read_sta("1x1x1", text), tile_size)

    @classmethod
    def execute(cls, model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler,
                measured_steps=4, goal=ERROR, max_error=0.15, max_density=0.3, candidates=AUTO_CANDIDATES,
                tile_size=AUTO_TILE, backend="auto") -> io.NodeOutput:
        node_id = getattr(getattr(cls, "hidden", None), "unique_id", None)
        parse_candidates(candidates)
        sampling = Sampling(positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler)
        measured, path = measure(
            model, sampling, measured_steps, (candidates, tile_size), backend,
            lambda layers, heads, unfinished: Search(
                candidates, read_sta("1x1x1", tile_size).tile_size, measured_steps, layers, heads, unfinished,
                lambda text: (log.info("[STA] %s", text), show_under_node(text, node_id))))
        result = conclude(measured.table, goal, max_error, max_density, type(model.model).__name__)
        by = f"error_{max_error:g}" if goal == ERROR else f"density_{max_density:g}"
        prefix = f"{type(model.model).__name__}_{_x(measured.table.grid.thw)}_{by}"
        name = kept_file(measured, path, by, lambda: write_strategy(result.strategy, prefix).name)
        report = f"saved as output/{FOLDER}/{name}: Load Sparse Attention Strategy lists it\n{report_text(result)}"
        image = draw_strategy(result)
        show_under_node(report, node_id)
        return io.NodeOutput(result.strategy, report, image,
                             ui={**ui.PreviewImage(image, cls=cls).as_dict(), "text": [report]})


def conclude(table: ErrorTable, goal: str, max_error: float, max_density: float, model: str) -> SearchResult:
    """The strategy that a measurement leads to."""
    errors = table.relative()
    choice = (choose_under_error(errors, table.densities, max_error) if goal == ERROR
              else choose_under_density(errors, table.densities, max_density))
    return search_result(table, choice, model)


def report_text(result: SearchResult) -> str:
    """What the strategy computes and how far that moves the heads, then a line per window: Markdown, and plain text."""
    lines = [f"density {result.density:.1%}: so much of dense attention is computed",
             f"the output of a head moves by {result.error:.1%} on average, by {result.worst_error:.1%} at worst; "
             "dense attention is 0%"]
    total = sum(row["heads"] for row in result.table)
    for row in result.table:
        moved = "" if row["error"] is None else f", which move by {row['error']:.1%}"
        lines.append(f"window {_x(row['window'])} ({row['density']:.1%} of attention): taken by "
                     f"{row['heads'] / total:.1%} of the heads{moved}; all heads would move by "
                     f"{row['error_of_all']:.1%}")
    return "\n".join(bullets(lines))


def _x(thw) -> str:
    return "x".join(map(str, thw))
