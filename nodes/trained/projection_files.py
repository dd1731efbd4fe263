"""SLA projections read from files."""
from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ...checkpoints.plan import Plan, plan_of
from ...checkpoints.safetensors_file import CheckpointError
from ...checkpoints.source import open_checkpoint
from .fed_layers import patcher_of
from .projections import ProjectionLayers, ProjectionSet, require_fit
from .weights import read_tensors


def with_projections(model, plan: Plan, node_id: str | None = None):
    """A clone of `model` (ModelPatcher) with the projections of the file that it was loaded from.

    Raises ValueError where they do not fit the model, CheckpointError for NaN or infinity in them.
    """
    path = plan.checkpoint.path
    attention = require_fit(model, len(plan.projections), str(path))
    patcher = open_projections(path, model.load_device, model.offload_device)
    return ProjectionSet(plan.trained, attention, node_id).attach_to(model, patcher)


def open_projections(path: Path, load_device, offload_device, disable_dynamic: bool = False):
    """A ModelPatcher with the projections of a file; can be asked for again, as ComfyUI's own loaders can."""
    tensors = read_projections(plan_of(open_checkpoint(path)))
    module = ProjectionLayers(len(tensors), offload_device)
    patcher = patcher_of(module, tensors, load_device, offload_device, disable_dynamic)
    patcher.cached_patcher_init = (open_projections, (path, load_device, offload_device))
    return patcher


def read_projections(plan: Plan) -> dict[int, dict[str, Tensor]]:
    """layer -> part -> float32 tensor of its own. Raises CheckpointError for NaN or infinity."""
    names = [name for parts in plan.projections.values() for name in parts.values()]
    tensors, _ = read_tensors(plan.checkpoint, names)
    whole = {layer: {part: tensors[name].to("cpu", torch.float32, copy=True) for part, name in parts.items()}
             for layer, parts in plan.projections.items()}
    for layer, parts in whole.items():
        if not all(bool(torch.isfinite(tensor).all()) for tensor in parts.values()):
            raise CheckpointError(f"{plan.checkpoint.path}: the SLA projection of layer {layer} holds NaN or infinity: "
                                  "the file is damaged. Download it again")
    return whole


def are_all_zero(plan: Plan) -> bool:
    """Whether the projections of a file are as training begins with them: then SLA is top-k alone."""
    return not any(bool(tensor.any()) for parts in read_projections(plan).values() for tensor in parts.values())
