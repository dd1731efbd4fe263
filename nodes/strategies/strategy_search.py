"""The node "STA Strategy Search": measures, on the user's own model, prompt and resolution, which window every head
can live with."""
from __future__ import annotations

import logging
import os

import comfy.samplers
import folder_paths
from comfy_api.latest import io, ui

import nodes as host_nodes

from ... import kernels
from ...vsa_core.search import ErrorTable, SearchResult, choose_under_density, choose_under_error, search_result
from ..families import family_of
from ..hook.hook import SparseAttentionHook
from ..hook.run import Run
from ..hook.settings import read_settings, why_invalid
from ..hook.status import show_under_node
from ..hook.verdict import bullets
from ..methods.sliding_tile_attention import AUTO_TILE, TILE_SIZES, StrategyType
from ..methods.sliding_tile_attention import read_method as read_sta
from .measured import read_measured, write_measured
from .search_key import search_key
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
                io.Model.Input("model", tooltip="As in your sampler: the strategy is measured on this very model, with "
                                                "its LoRAs and sampling shift."),
                io.Conditioning.Input("positive", tooltip="As in your sampler: the prompt that the search samples."),
                io.Conditioning.Input("negative", tooltip="As in your sampler. Unused at cfg 1."),
                io.Latent.Input("latent_image", tooltip="The clip's size. The strategy fits other sizes too."),
                io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff,
                             control_after_generate=io.ControlAfterGenerate.fixed,
                             tooltip="The noise that the search samples from. Keep it fixed: an interrupted search "
                                     "goes on only with the same seed, and a finished one is not done again."),
                io.Int.Input("steps", default=12, min=1, max=1000,
                             tooltip="Steps of the dense sampling that the search looks into."),
                io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1,
                               tooltip="As in your sampler: both passes are measured together."),
                io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler",
                               tooltip="As in your sampler."),
                io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple",
                               tooltip="As in your sampler."),
                io.Int.Input("measured_steps", default=4, min=1, max=100,
                             tooltip="How many of the steps are measured, spread evenly. Each stands for its part of "
                                     "any later schedule. More is finer and takes longer."),
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
        if measured_steps > steps:
            raise ValueError(f"measured_steps {measured_steps} of {steps} steps: wanted at most as many as steps")
        family, net = family_of(model.model), model.model.diffusion_model
        layers, heads = family.layer(net, {}, 0)[1], family.heads(net)[0]
        if not layers:
            raise ValueError(f"the number of layers of this {family.name} model is not known: a search needs it")
        unfinished, measured = _paths(model, positive, negative, latent_image, seed, steps, cfg, sampler_name,
                                      scheduler, measured_steps, candidates, tile_size, backend)
        known = read_measured(measured)
        if known is None:
            search = Search(candidates, read_sta("1x1x1", tile_size).tile_size, measured_steps, layers, heads,
                            unfinished, lambda text: (log.info("[STA] %s", text), show_under_node(text, node_id)))
            settings = read_settings(backend=backend, start_percent=0.0, min_tokens=0, strict=True)
            patched = SparseAttentionHook.install(model, search, settings)
            host_nodes.common_ksampler(patched, seed, steps, cfg, sampler_name, scheduler, positive, negative,
                                       latent_image, denoise=1.0)
            known = table_of(search, SparseAttentionHook.of(patched)[-1].last_run), {}
            write_measured(measured, *known)
            if os.path.exists(unfinished):
                os.remove(unfinished)
        else:
            log.info("[STA] this search was finished before: nothing is sampled")
        table, saved = known
        result = conclude(table, goal, max_error, max_density, type(model.model).__name__)
        by = f"error_{max_error:g}" if goal == ERROR else f"density_{max_density:g}"
        if by not in saved or not os.path.exists(os.path.join(os.path.dirname(measured), saved[by])):
            prefix = f"{type(model.model).__name__}_{_x(table.grid.thw)}_{by}"
            saved[by] = write_strategy(result.strategy, prefix).name
            write_measured(measured, table, saved)
        report = f"saved as output/{FOLDER}/{saved[by]}: Load STA Strategy lists it\n{report_text(result)}"
        image = draw_strategy(result)
        show_under_node(report, node_id)
        return io.NodeOutput(result.strategy, report, image,
                             ui={**ui.PreviewImage(image, cls=cls).as_dict(), "text": [report]})


def table_of(search: Search, run: Run) -> ErrorTable:
    """What a search has measured in a run. Raises ValueError where there was nothing to measure, or not all was."""
    if search.table is None:
        seen = (run.other + run.dense).most_common()
        reasons = ", ".join(f"{name} ({count} attention calls)" for name, count in seen)
        raise ValueError(f"no self-attention of the clip was seen, so nothing was measured. Seen instead: {reasons}")
    search.table.relative()
    return search.table


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


def _paths(model, *inputs) -> list[str]:
    """Where a search of these inputs is kept while it is unfinished, and what it measured once it is finished."""
    key = search_key(model, *inputs)
    return [os.path.join(folder_paths.get_output_directory(), FOLDER, f"{name}_{key}.safetensors")
            for name in ("unfinished", "measured")]


def _x(thw) -> str:
    return "x".join(map(str, thw))
