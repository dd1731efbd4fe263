"""What the user of an SLA-trained model is told: where the settings leave its training, and how its projections were
used; and what SLA is on a model that was not trained for it."""
from __future__ import annotations

from ...checkpoints.trained import Trained
from ..hook.run import OTHER, Run
from ..hook.settings import Settings

UNTRAINED = ("no trained projection in this model: plain top-k. Video Sparse Attention (VSA) chooses by tiles in space "
             "and time, which is closer to dense at the same speed")


def advice_before(trained: Trained, ratio: float, query_run: int, feature: str, settings: Settings) -> list[str]:
    """Warnings that the settings alone justify, before anything is sampled."""
    dense, lines = settings.dense_parts(), []
    if dense and not trained.dense_serves:
        means = ("Its dense part shows it tokens that it learned to do without" if trained.bare else
                 "Its dense part keeps the projections and is slower")
        lines = [f"{trained.name} was trained with SLA throughout. {means}: {', '.join(dense)}"]
    return lines + mismatches(trained, ratio, query_run, feature)


def advice_after(trained: Trained, ratio: float, query_run: int, feature: str, run: Run) -> list[str]:
    """How far the projections were used in a run, and what left the training."""
    if trained.bare:
        return _advice_after_bare(trained, run) + mismatches(trained, ratio, query_run, feature)
    lines = []
    if run.gated:
        lines.append(f"SLA projections of {trained.name} used in {len(run.gated)} layers")
    completed = run.completed.total() - run.completed[OTHER]
    without = run.sparse_calls - run.gated.total() + run.dense.total() - completed
    if without > 0:
        lines.append(f"WARNING: {without} attention calls had no projection: those blocks were not trained with SLA")
    if completed:
        lines.append(f"{completed} attention calls of this SLA-trained model ran dense, with its projections: near to "
                     "its training, and slower")
    return lines + mismatches(trained, ratio, query_run, feature)


def _advice_after_bare(trained: Trained, run: Run) -> list[str]:
    if not run.dense or trained.dense_serves:
        return []
    return [f"WARNING: {run.dense.total()} attention calls of {trained.name} ran dense, which it was not trained for: "
            "see the reasons"]


def mismatches(trained: Trained, ratio: float, query_run: int, feature: str) -> list[str]:
    """Settings that are not the trained ones. Up to twice the trained ratio only adds what it looks at."""
    lines = []
    if trained.ratio is not None and not trained.ratio - 0.005 <= ratio <= 2 * trained.ratio + 0.005:
        lines.append(f"ratio {ratio:g} is far from the {trained.ratio:g} that {trained.name} was trained with")
    if trained.query_run is not None and query_run != trained.query_run:
        lines.append(f"query_run {query_run} differs from the {trained.query_run} of {trained.name}")
    if not trained.bare and trained.feature is not None and feature != trained.feature:
        lines.append(f"feature_map {feature} differs from the {trained.feature} that {trained.name} was trained with: "
                     "its projections are wrong for it")
    return lines
