"""A diffusion model from a file or a diffusers folder, with the VSA gates that it was trained with."""
from __future__ import annotations

from pathlib import Path

import comfy.sd

from ...checkpoints.describe import describe
from ...checkpoints.plan import Plan, plan_of
from ...checkpoints.safetensors_file import CheckpointError
from ...checkpoints.source import open_checkpoint
from .gate_files import with_gates
from .weights import read_tensors


def load_sparse_model(path: Path, model_options: dict, node_id: str | None = None):
    """(ModelPatcher with gates where the file has them, description).

    Headers first; then every byte of the weights is read at most once, into one copy of the model.
    Raises CheckpointError for anything that is no whole model known here.
    """
    plan = plan_of(open_checkpoint(path))
    model = _load(plan, model_options)
    if plan.gates:
        model = with_gates(model, path, node_id=node_id)
    return model, describe(plan, type(model.model).__name__)


def load_without_gates(path: Path, model_options: dict, disable_dynamic: bool = False):
    """The model alone, as ComfyUI asks for it again for a copy without dynamic VRAM (torch.compile, hooks)."""
    return _load(plan_of(open_checkpoint(path)), model_options, disable_dynamic)


def _load(plan: Plan, model_options: dict, disable_dynamic: bool = False):
    tensors, releasing = read_tensors(plan.checkpoint, plan.names)
    state = {target: tensors.pop(name) for name, target in plan.names.items()}
    only_newer = {"disable_dynamic": True} if disable_dynamic else {}      # ComfyUI before dynamic VRAM lacks it
    with releasing:
        model = comfy.sd.load_diffusion_model_state_dict(
            state, model_options=model_options, metadata=plan.metadata, **only_newer)
    if model is None:
        raise CheckpointError(f"{plan.checkpoint.path} holds a model that this ComfyUI does not know: found names such "
                              f"as {next(iter(plan.names))}")
    model.cached_patcher_init = (load_without_gates, (plan.checkpoint.path, model_options))
    return model
