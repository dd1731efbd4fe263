"""A checkpoint in plain words."""
from __future__ import annotations

from collections import Counter

from .plan import Plan
from .trained import SLA, UNKNOWN, UNKNOWN_SLA, Trained

SIZES = {(30, 1536): "1.3B", (40, 5120): "14B", (30, 3072): "5B"}
"""Wan by layers and width."""
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
FORMS = {"diffusers": " in diffusers' form", "mixed": " in FastVideo's form"}
"""What is said of a naming; ComfyUI's own is what a user expects."""


UNTRAINED = ("SLA projections in all layers, but all of them zero: not trained with SLA, dense and sparse attention "
             "are both possible")


def describe(plan: Plan, model_class: str = "", all_zero: bool = False) -> str:
    """Family, layers, gates, training, recommended sampling, and a warning when the model was trained sparse.

    all_zero: whether its projections have been looked at and are zero.
    """
    places = [place.info for place in plan.checkpoint.tensors.values()]
    weights = Counter()
    for info in places:
        weights[info.dtype] += info.numel
    total = sum(weights.values())
    count = f"{total / 1e9:.2f} billion" if total >= 1e8 else f"{total / 1e6:.2f} million"
    size = SIZES.get((plan.layers, plan.width), "") if plan.family == "Wan" else ""
    family = " ".join(filter(None, (plan.family if plan.layers else model_class or "a model", size)))
    dtype = weights.most_common(1)[0][0]
    built = f"{plan.layers} layers of width {plan.width}, " if plan.layers else ""
    files = len(plan.checkpoint.files)
    lines = [f"{family}: {built}{count} weights in {DTYPES.get(dtype, dtype)}, read from {files} "
             f"file{'s' if files > 1 else ''}{FORMS.get(plan.naming, '')}"]
    if plan.checkpoint.remark:
        lines.append(plan.checkpoint.remark)
    if plan.per_head_gates:
        lines.append("to_gate_compress in this file is no VSA gate; it was left to ComfyUI")
    if plan.projections:
        if all_zero:
            return "\n".join([*lines, UNTRAINED])
        return "\n".join([*lines, f"SLA projections in {len(plan.projections)} of {plan.layers} layers",
                          *training_lines(plan.trained)])
    if not plan.gates:
        lines.append("No VSA gates: not trained with VSA, dense and sparse attention are both possible")
        return "\n".join(lines)
    return "\n".join([*lines, f"VSA gates in {len(plan.gates)} of {plan.layers} layers", *training_lines(plan.trained)])


def training_lines(trained: Trained) -> list[str]:
    """The training, how to sample it, and the warning."""
    known = trained not in (UNKNOWN, UNKNOWN_SLA)
    whose = f"Trained as {trained.name}" if known else f"Trained with {trained.method}, not a model known by name"
    lines = [f"{whose}: {_sla_words(trained) if trained.method == SLA else _vsa_words(trained)}"
             + (f", clips of {trained.clip} (width x height x frames)" if trained.clip else "")]
    wanted = []
    if trained.steps:
        wanted.append(f"{trained.steps} steps")
    sigmas = trained.sigmas or tuple(step / 1000 for step in (*trained.timesteps, 0) if trained.timesteps)
    if sigmas:
        wanted.append(f"sigmas {', '.join(f'{sigma:g}' for sigma in sigmas)} with {trained.sampler}")
    if trained.shift:
        wanted.append(f"shift {trained.shift:g}")
    if sigmas or trained.steps:
        wanted.append("cfg 1")
    if wanted:
        lines.append(f"Sample with {', '.join(wanted)}")
    if trained.remark:
        lines.append(trained.remark)
    return [*lines, _sla_warning() if trained.method == SLA else _vsa_warning()]


def _vsa_words(trained: Trained) -> str:
    sparsity = "not known, try 0.8 to 0.9" if trained.sparsity is None else f"{trained.sparsity:g}"
    return f"sparsity {sparsity}, tile " + ("not known" if trained.tile is None else "x".join(map(str, trained.tile)))


def _vsa_warning() -> str:
    return ("WARNING: trained with VSA. Sample it through Video Sparse Attention (VSA) with start_percent 0; "
            "dense or without its gates it gives noise or blur")


def _sla_words(trained: Trained) -> str:
    ratio = "not known, try 0.1 to 0.2" if trained.ratio is None else f"{trained.ratio:g}"
    best = f" ({trained.best_ratio:g} for quality)" if trained.best_ratio else ""
    run = "not known" if trained.query_run is None else f"{trained.query_run}"
    return f"ratio {ratio}{best}, runs of {run} queries and 64 keys, feature map {trained.feature or 'not known'}"


def _sla_warning() -> str:
    return ("WARNING: trained with SLA. Sample it through Sparse Linear Attention (SLA) with start_percent 0 and no "
            "other sparse node; dense or without its projections it is not the model that was trained")
