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
from ...vsa_core.search import SearchResult, choose_under_density, choose_under_error, search_result
from ..families import family_of
from ..hook.hook import SparseAttentionHook
from ..hook.run import Run
from ..hook.settings import read_settings, why_invalid
from ..hook.status import show_under_node
from ..methods.sliding_tile_attention import AUTO_TILE, TILE_SIZES, StrategyType
from ..methods.sliding_tile_attention import read_method as read_sta
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
                               tooltip="Bound the error of every head and take what speed that gives, or bound the "
                                       "density and take the smallest error."),
                io.Float.Input("max_error", default=0.15, min=0.0, max=1.0, step=0.01,
                               tooltip="For the first goal: relative L2 error of a head's attention output. "
                                       "Smaller keeps more; 0 keeps everything."),
                io.Float.Input("max_density", default=0.3, min=0.01, max=1.0, step=0.01,
                               tooltip="For the second goal: share of query-key pairs, averaged over everything."),
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
        state = _state_path(model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler,
                            measured_steps, candidates, tile_size, backend)
        search = Search(candidates, read_sta("1x1x1", tile_size).tile_size, measured_steps, layers, heads,
                        state, lambda text: (log.info("[STA] %s", text), show_under_node(text, node_id)))
        settings = read_settings(backend=backend, start_percent=0.0, min_tokens=0, strict=True)
        patched = SparseAttentionHook.install(model, search, settings)
        host_nodes.common_ksampler(patched, seed, steps, cfg, sampler_name, scheduler, positive, negative,
                                   latent_image, denoise=1.0)
        result = conclude(search, SparseAttentionHook.of(patched)[-1].last_run, goal, max_error, max_density,
                          type(model.model).__name__)
        if os.path.exists(state):
            os.remove(state)
        saved = write_strategy(result.strategy, f"search_{type(model.model).__name__}")
        report = f"saved as {saved.name}: Load STA Strategy finds it\n{report_text(result)}"
        image = draw_strategy(result)
        show_under_node(report, node_id)
        return io.NodeOutput(result.strategy, report, image,
                             ui={**ui.PreviewImage(image, cls=cls).as_dict(), "text": [report]})


def conclude(search: Search, run: Run, goal: str, max_error: float, max_density: float, model: str) -> SearchResult:
    """The strategy that the measurement leads to. Raises ValueError when there was nothing to measure."""
    if search.table is None:
        reasons = ", ".join(f"{name} ({count} calls)" for name, count in (run.other + run.dense).most_common())
        raise ValueError(f"no self-attention of the clip was seen, so nothing was measured. Seen instead: {reasons}")
    errors = search.table.relative()
    choice = (choose_under_error(errors, search.table.densities, max_error) if goal == ERROR
              else choose_under_density(errors, search.table.densities, max_density))
    return search_result(search.table, choice, model)


def report_text(result: SearchResult) -> str:
    """Density and error foreseen, and a line per window."""
    lines = [f"density {result.density:.1%}, error {result.error:.3f} on average, {result.worst_error:.3f} at worst",
             "window       density   heads    error   error if all heads had it"]
    total = sum(row["heads"] for row in result.table)
    for row in result.table:
        error = "-" if row["error"] is None else f"{row['error']:.3f}"
        lines.append(f"{_x(row['window']):12s} {row['density']:7.1%} {row['heads'] / total:7.1%} {error:>8s}   "
                     f"{row['error_of_all']:.3f}")
    return "\n".join(lines)


def _state_path(model, *inputs) -> str:
    """Where an unfinished search of the same inputs is kept."""
    name = f"unfinished_{search_key(model, *inputs)}.safetensors"
    return os.path.join(folder_paths.get_output_directory(), FOLDER, name)


def _x(thw) -> str:
    return "x".join(map(str, thw))
