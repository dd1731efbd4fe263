"""A checkpoint in plain words."""
from __future__ import annotations

import json
from collections import Counter

from .plan import ATTENTION_WISH, Plan
from .safetensors_file import CheckpointError
from .source import text_of
from .trained import SLA, UNKNOWN, UNKNOWN_SLA, Trained

SIZES = {(30, 1536): "1.3B", (40, 5120): "14B", (30, 3072): "5B"}
"""Wan by layers and width."""
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
FORMS = {"diffusers": " in diffusers' form", "mixed": " in FastVideo's form"}
"""What is said of a naming; ComfyUI's own is what a user expects."""


UNTRAINED = ("SLA projections in all layers, but all of them zero: not trained with SLA, dense and sparse attention "
             "are both possible")


DENSE = "No VSA gates: not trained with VSA, dense and sparse attention are both possible"


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
    lines += [*_wishes(plan), *([plan.remark] if plan.chosen and plan.remark else [])]
    if plan.projections:
        if all_zero:
            return "\n".join([*lines, UNTRAINED])
        return "\n".join([*lines, f"SLA projections in {len(plan.projections)} of {plan.layers} layers",
                          *training_lines(plan.trained)])
    if plan.gates:
        return "\n".join([*lines, f"VSA gates in {len(plan.gates)} of {plan.layers} layers",
                          *training_lines(plan.trained)])
    if plan.trained is not None:
        source = "trained_as" if plan.chosen is not None else "its metadata"
        return "\n".join([*lines, f"No gates and no projections: that it was made for SLA is told by {source}",
                          *training_lines(plan.trained)])
    return "\n".join([*lines, plan.remark or DENSE])


def _wishes(plan: Plan) -> list[str]:
    """A line on attentions that ask ComfyUI for a function of its own."""
    places = [(name, place) for name, place in plan.checkpoint.tensors.items() if name.endswith(ATTENTION_WISH)]
    asked: list[str] = []
    for entry in places:
        try:
            wishes = json.loads(text_of(*entry))
            wishes = wishes if isinstance(wishes, list) else [wishes]
            asked += [str(wish["attention"]) for wish in wishes]
        except (CheckpointError, ValueError, TypeError, KeyError):
            asked.append("something that cannot be read")
    if not places:
        return []
    return [f"{len(places)} attention layers ask ComfyUI for {' or '.join(dict.fromkeys(asked))} "
            "(comfy_attention.config), where this ComfyUI knows that. A sparse node on the model takes its place"]


def training_lines(trained: Trained) -> list[str]:
    """The training, how to sample it, and the warning."""
    known = trained not in (UNKNOWN, UNKNOWN_SLA)
    whose = f"Trained as {trained.name}" if known else f"Trained with {trained.method}, not a model known by name"
    lines = [f"{whose}: {_sla_words(trained) if trained.method == SLA else _vsa_words(trained)}"
             + (f", clips of {trained.clip} (width x height x frames)" if trained.clip else "")]
    wanted = []
    if trained.steps:
        told = "" if trained.sampler == Trained.sampler else f" with {trained.sampler}"
        wanted.append(f"{trained.steps} steps{'' if trained.sigmas or trained.timesteps else told}")
    sigmas = trained.sigmas or tuple(step / 1000 for step in (*trained.timesteps, 0) if trained.timesteps)
    if sigmas:
        wanted.append(f"sigmas {', '.join(f'{sigma:g}' for sigma in sigmas)} with {trained.sampler}")
    if trained.shift:
        wanted.append(f"shift {trained.shift:g}")
    if sigmas or trained.steps:
        wanted += ["cfg 1", "no other few-step LoRA"]
    if wanted:
        lines.append(f"Sample with {', '.join(wanted)}")
    if trained.remark:
        lines.append(trained.remark)
    return [*lines, _sla_warning(trained) if trained.method == SLA else _vsa_warning()]


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
    runs = f"ratio {ratio}{best}, runs of {run} queries and 64 keys"
    return f"{runs}, no projection" if trained.bare else f"{runs}, feature map {trained.feature or 'not known'}"


def _sla_warning(trained: Trained) -> str:
    if trained.dense_serves:
        return ("Its weights were trained dense: dense attention is harmless, only slower. Sparse Linear Attention "
                "(SLA) samples it as it was published; other sparse nodes do as well as on any model")
    if trained.bare:
        return ("WARNING: trained with sparse attention alone. Sample it through Sparse Linear Attention (SLA) with "
                "start_percent 0 and no other sparse node; dense attention runs, but shows it tokens that it learned "
                "to do without")
    return ("WARNING: trained with SLA. Sample it through Sparse Linear Attention (SLA) with start_percent 0 and no "
            "other sparse node; dense or without its projections it is not the model that was trained")
