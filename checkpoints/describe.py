"""A checkpoint in plain words."""
from __future__ import annotations

from collections import Counter

from .plan import Plan
from .trained import UNKNOWN, Trained

SIZES = {(30, 1536): "1.3B", (40, 5120): "14B", (30, 3072): "5B"}
"""Wan by layers and width."""
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
FORMS = {"diffusers": " in diffusers' form", "mixed": " in FastVideo's form"}
"""What is said of a naming; ComfyUI's own is what a user expects."""


def describe(plan: Plan, model_class: str = "") -> str:
    """Family, layers, gates, training, recommended sampling, and a warning when the model was trained with VSA."""
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
    if not plan.gates:
        lines.append("No VSA gates: not trained with VSA, dense and sparse attention are both possible")
        return "\n".join(lines)
    return "\n".join([*lines, f"VSA gates in {len(plan.gates)} of {plan.layers} layers", *training_lines(plan.trained)])


def training_lines(trained: Trained) -> list[str]:
    """The training, how to sample it, and the warning."""
    sparsity = "not known, try 0.8 to 0.9" if trained.sparsity is None else f"{trained.sparsity:g}"
    tile = "not known" if trained.tile is None else "x".join(map(str, trained.tile))
    whose = "Trained with VSA, not a model known by name" if trained == UNKNOWN else f"Trained as {trained.name}"
    lines = [f"{whose}: sparsity {sparsity}, tile {tile}"
             + (f", clips of {trained.clip} (width x height x frames)" if trained.clip else "")]
    wanted = []
    if trained.steps:
        wanted.append(f"{trained.steps} steps")
    if trained.timesteps:
        wanted.append("sigmas " + ", ".join(f"{step / 1000:g}" for step in (*trained.timesteps, 0)) + " with lcm")
    if trained.shift:
        wanted.append(f"shift {trained.shift:g}")
    if trained.timesteps or trained.steps:
        wanted.append("cfg 1")
    if wanted:
        lines.append(f"Sample with {', '.join(wanted)}")
    lines.append("WARNING: trained with VSA. Sample it through Video Sparse Attention (VSA) with start_percent 0; "
                 "dense or without its gates it gives noise or blur")
    return lines
