"""The node "Calibrate Sparse Attention": measures, on the user's own model, prompt and resolution, how much of the clip
every head has to see."""
from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from comfy_api.latest import io, ui

from ... import kernels
from ...vsa_core.budget_search import BudgetResult, BudgetTable, budget_result
from ...vsa_core.budgets import Budgets
from ...vsa_core.choosing import choose_under_density, choose_under_error
from ..hook.hook import SparseAttentionHook
from ..hook.settings import read_settings, why_invalid
from ..hook.status import show_under_node
from ..hook.verdict import bullets
from ..methods.far_field import far_field_input, uses_far_field
from ..methods.strategy_input import StrategyType
from ..methods.video_sparse_attention import AUTO_TILE, TILE_SIZES
from ..methods.video_sparse_attention import read_method as read_vsa
from ..trained.gates import gates_of
from .budget_measurement import BudgetSearch, parse_shares
from .dense_sampling import Sampling, kept_file, measure, sampling_inputs
from .measured import Measured, write_measured
from .strategy_files import FOLDER, write_strategy
from .strategy_map import draw_budgets
from .strategy_measurement import AUTO_CANDIDATES

log = logging.getLogger(__name__)

WORK, TIME, ERROR, KEPT = "work of the whole", "time of the whole", "error of every head", "attention of every head"
GOALS = (WORK, TIME, ERROR, KEPT)
EMPHASES = (4, 0, 8)
"""How much more an error counts in a noisy step, see `BudgetTable.emphasised`: what is taken unchecked, then what is
tried besides."""


class SparseAttentionCalibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SparseAttentionCalibrate",
            display_name="Calibrate Sparse Attention",
            category="model/patch",
            description=(
                "Samples your clip densely once and measures, in some of the steps, what each head of each layer loses "
                "when it sees a part of the clip only. Then shares the work out: heads and steps that need little get "
                "little. For Video Sparse Attention (VSA) and models that were not trained for it. Minutes, not hours; "
                "can be interrupted and goes on where it stopped. The result is saved by itself and fits other sizes, "
                "numbers of steps and prompts."),
            search_aliases=["VSA", "budgets", "calibration", "sparse attention preset"],
            is_output_node=True,
            inputs=[
                *sampling_inputs(8),
                io.Combo.Input("goal", options=list(GOALS), default=WORK,
                               tooltip="work of the whole: at most this share of dense attention is computed, shared "
                                       "out so that the error is smallest. time of the whole: the same by the clock of "
                                       "this card. error of every head: none may move further from dense attention. "
                                       "attention of every head: none may lose more of it. The last two give what work "
                                       "they need."),
                io.Float.Input("at_most", default=0.3, min=0.0, max=1.0, step=0.01,
                               tooltip="For work, time and error: the share that the goal allows."),
                io.Float.Input("at_least", default=0.95, min=0.0, max=1.0, step=0.01,
                               tooltip="For attention of every head: the share that is kept."),
                io.Boolean.Input("check", default=True, optional=True,
                                 tooltip="Samples the clip sparse and tells how far it is from the dense one: errors "
                                         "of heads are only a screen. For work and time it samples three ways of "
                                         "sharing the work out over the steps, and takes the closest."),
                io.String.Input("shares", default=AUTO_CANDIDATES, optional=True, advanced=True,
                                tooltip="Shares of the tiles to try, such as: 0.05 0.1 0.2 0.5. auto: six of them. All "
                                        "tiles, which is dense attention, is always among the choices."),
                io.Combo.Input("tile_size", options=list(TILE_SIZES), default=AUTO_TILE, optional=True, advanced=True,
                               tooltip="As in Video Sparse Attention."),
                io.Combo.Input("backend", options=[kernels.AUTO, *(spec.name for spec in kernels.KERNELS)],
                               default=kernels.AUTO, optional=True, advanced=True,
                               tooltip="The kernel that the candidates are measured with."),
                far_field_input(),
            ],
            outputs=[StrategyType.Output("strategy"), io.String.Output("report"), io.Image.Output("map")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, tile_size=None):
        return why_invalid(lambda text: read_vsa(0.0, text), tile_size)

    @classmethod
    def execute(cls, model, positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler,
                measured_steps=8, goal=WORK, at_most=0.3, at_least=0.95, check=True, shares=AUTO_CANDIDATES,
                tile_size=AUTO_TILE, backend="auto", far_field="auto") -> io.NodeOutput:
        node_id = getattr(getattr(cls, "hidden", None), "unique_id", None)
        parse_shares(shares)
        if gates_of(model) is not None:
            raise ValueError(f"{gates_of(model).trained.name} was trained to read the same number of tiles everywhere: "
                             "there is nothing to calibrate. Use Video Sparse Attention without a strategy")
        far, tile = uses_far_field(far_field, False), read_vsa(0.0, tile_size).tile_size
        sampling = Sampling(positive, negative, latent_image, seed, steps, cfg, sampler_name, scheduler)
        measured, path = measure(
            model, sampling, measured_steps, ("budgets", shares, tile_size, far), backend,
            lambda layers, heads, unfinished: BudgetSearch(
                shares, tile, measured_steps, layers, heads, unfinished,
                lambda text: (log.info("[VSA] %s", text), show_under_node(text, node_id)), far_field=far))
        bound, kind = at_least if goal == KEPT else at_most, type(model.model).__name__
        by = f"{goal.split()[0]}_{bound:g}"
        tries = {emphasis: conclude(measured.table, goal, bound, kind, emphasis)
                 for emphasis in (EMPHASES if check and goal in (WORK, TIME) else EMPHASES[:1])}
        emphasis, said = EMPHASES[0], []
        if check:
            def sample(budgets: Budgets, number: int):
                show_under_node(f"calibrating: sampling sparse clip {number} of {len(tries)}", node_id)
                return sampled_with(budgets, model, sampling, backend, tile_size)
            emphasis, said = _closest(measured, path, by, tries, sample)
        result = tries[emphasis]
        prefix = f"{kind}_{'x'.join(map(str, measured.table.grid.thw))}_{by}"
        name = kept_file(measured, path, f"{by}_{emphasis}", lambda: write_strategy(result.budgets, prefix).name)
        report = "\n".join([f"saved as output/{FOLDER}/{name}: Load Sparse Attention Strategy lists it",
                            *bullets([*said, *report_lines(result)])])
        image = draw_budgets(result)
        show_under_node(report, node_id)
        return io.NodeOutput(result.budgets, report, image,
                             ui={**ui.PreviewImage(image, cls=cls).as_dict(), "text": [report]})


def conclude(table: BudgetTable, goal: str, bound: float, model: str, emphasis: float = EMPHASES[0]) -> BudgetResult:
    """The budgets that a measurement leads to. emphasis: for goals of the whole.

    Raises ValueError for a bound that no choice of shares reaches.
    """
    if goal not in GOALS:
        raise ValueError(f"goal {goal!r}: wanted {', '.join(GOALS)}")
    if goal == ERROR:
        choice = choose_under_error(table.relative(), table.densities, bound)
    elif goal == KEPT:
        choice = choose_under_error(table.unkept(), table.densities, 1 - bound + 1e-9)
    else:
        costs = table.densities if goal == WORK else table.times()
        of = "" if goal == WORK else "'s time"
        if bound < min(costs):
            raise ValueError(f"at_most {bound:g}: the smallest share, {table.shares[0]:g} of the tiles, takes "
                             f"{min(costs):.3f} of dense attention{of}. Raise "
                             "at_most or try smaller shares")
        choice = choose_under_density(table.emphasised(emphasis), costs, bound)
    return budget_result(table, choice, model)


def report_lines(result: BudgetResult) -> list[str]:
    """What the budgets compute and what that costs the heads, then a line per share."""
    total = sum(row["heads"] for row in result.rows)
    parts = ", ".join(f"{density:.0%}" for density in result.by_step)
    lines = [f"{result.density:.1%} of dense attention is computed, dense steps included; by the clock of this card "
             f"that takes {result.time:.0%} of its time",
             f"from the first part of the schedule to the last: {parts}",
             f"a head keeps {result.kept:.1%} of its attention and moves by {result.error:.1%} on average, by "
             f"{result.worst_error:.1%} at worst"]
    for row in result.rows:
        part = "all tiles (dense)" if row["share"] == 1 else f"{row['share']:.0%} of the tiles"
        lines.append(f"{part}: taken by {row['heads'] / total:.1%} of the heads; all heads would keep "
                     f"{row['kept_by_all']:.1%} and move by {row['error_of_all']:.1%}")
    return lines


def sampled_with(budgets: Budgets, model, sampling: Sampling, backend: str, tile_size: str) -> torch.Tensor:
    """The finished latent of a clip with these budgets, sparse even where dense is faster.

    Raises ValueError where nothing ran sparse.
    """
    method = replace(read_vsa(0.0, tile_size), far_field=budgets.far_field, budgets=budgets, timed=False)
    settings = read_settings(backend=backend, start_percent=0.0, min_tokens=0, strict=True)
    patched = SparseAttentionHook.install(model, method, settings)
    found = sampling(patched)["samples"]
    run = SparseAttentionHook.of(patched)[-1].last_run
    if not run.sparse_calls:
        raise ValueError(f"no attention ran sparse ({'; '.join([*run.warnings, *run.dense]) or 'none was seen'})")
    return found.cpu()


def _closest(measured: Measured, path: str, by: str, tries: dict[int, BudgetResult],
             sample: Callable[[Budgets, int], torch.Tensor]) -> tuple[int, list[str]]:
    """Which of the tries comes closest to the dense clip, and what to say. Each is sampled once, for ever."""
    if measured.latent is None:
        return EMPHASES[0], ["not checked: the latent of this model is not one tensor, so two clips cannot be compared"]
    dense, found = measured.latent.double(), {}
    for number, (emphasis, result) in enumerate(tries.items(), 1):
        key = f"{by}_{emphasis}"
        alike = next((other for other in found if tries[other].budgets == result.budgets), None)
        if alike is not None:
            measured.checked[key] = found[alike]
        if key not in measured.checked:
            try:
                apart = sample(result.budgets, number).double() - dense
            except ValueError as error:
                return EMPHASES[0], [f"not checked: {error}"]
            measured.checked[key] = float(torch.linalg.vector_norm(apart)
                                          / torch.linalg.vector_norm(dense).clamp(min=1e-30))
            write_measured(path, measured)
        found[emphasis] = measured.checked[key]
    best = min(found, key=found.get)
    said = f"checked: the finished latent of this clip is {found.pop(best):.1%} from that of the dense one"
    if found:
        said += (f" (other ways of sharing the work out over the steps: "
                 f"{', '.join(f'{distance:.1%}' for distance in found.values())})")
    return best, [f"{said}. Compare the clips themselves with Compare Clips"]
