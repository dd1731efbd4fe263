"""What the user of a VSA-trained model is told: where the settings leave its training, and how its gates were used."""
from __future__ import annotations

from ...checkpoints.trained import Trained
from ..hook.run import Run
from ..hook.settings import Settings


def advice_before(trained: Trained, sparsity: float, settings: Settings) -> list[str]:
    """Warnings that the settings alone justify, before anything is sampled."""
    dense = settings.dense_parts()
    lines = [f"{trained.name} was trained with VSA and will run partly dense, which it was not trained for: "
             f"{', '.join(dense)}"] if dense else []
    return lines + _sparsity_advice(trained, sparsity)


def advice_after(trained: Trained, sparsity: float, run: Run) -> list[str]:
    """How far the gates were used in a run, and what left the training."""
    lines = []
    if run.gated:
        lines.append(f"VSA gates of {trained.name} used in {len(run.gated)} layers")
    without = run.sparse_calls - run.gated.total()
    if without > 0:
        lines.append(f"WARNING: {without} sparse attention calls had no gate")
    if run.dense:
        lines.append(f"WARNING: {run.dense.total()} attention calls of this VSA-trained model ran dense, without its "
                     f"gates: expect noise or blur. {_remedy(run)}")
    return lines + _sparsity_advice(trained, sparsity)


def _sparsity_advice(trained: Trained, sparsity: float) -> list[str]:
    if trained.sparsity is None or abs(sparsity - trained.sparsity) < 0.005:
        return []
    return [f"sparsity {sparsity:g} differs from the {trained.sparsity:g} that {trained.name} was trained with"]


def _remedy(run: Run) -> str:
    if any(reason.startswith("fewer than") for reason in run.dense):
        return "Lower min_tokens"
    if "outside start_percent..end_percent" in run.dense:
        return "Set start_percent to 0 and end_percent to 1"
    return "See the reasons above"
