"""A diffusion model from a file or a diffusers folder, with the gates or projections that it was trained with."""
from __future__ import annotations

import logging
from pathlib import Path

import comfy.model_detection
import comfy.sd
import comfy.utils
import torch

from ...checkpoints.describe import describe
from ...checkpoints.mapped import DTYPES
from ...checkpoints.plan import Plan, plan_of
from ...checkpoints.safetensors_file import CheckpointError
from ...checkpoints.source import open_checkpoint
from ..families import family_of
from .gate_files import with_gates
from .projection_files import are_all_zero, with_projections
from .training import BareTraining
from .weights import read_tensors

log = logging.getLogger(__name__)


def load_sparse_model(path: Path, model_options: dict, node_id: str | None = None, trained_as: str | None = None):
    """(ModelPatcher with gates or projections where the file has them, description).

    trained_as: what the user says that it is, one of `CHOICES`.
    Headers first; then every byte of the weights is read at most once, into one copy of the model.
    Raises CheckpointError for anything that is no whole model known here, or not what the user says.
    """
    plan = plan_of(open_checkpoint(path))
    if trained_as is not None:
        plan = plan.told_as(trained_as)
    model = _load(plan, model_options)
    if plan.trained is not None and plan.trained.bare:
        _require_family(model, plan)
        model = BareTraining(plan.trained, node_id).attach_to(model)
    if plan.gates:
        model = with_gates(model, path, node_id=node_id, trained=plan.trained)
    untrained = bool(plan.projections) and are_all_zero(plan)
    if untrained and trained_as is not None:
        raise CheckpointError(f"{path} is not {trained_as}: all of its SLA projections are zero, which is how training "
                              "begins. Load the file as it was published, or set trained_as to auto")
    if plan.projections and not untrained:
        model = with_projections(model, plan, node_id)
    return model, describe(plan, type(model.model).__name__, untrained)


def is_video_model(plan: Plan) -> bool:
    """Whether ComfyUI would know a video model by the names and shapes of these tensors. Reads no tensor."""
    if plan.layers:
        return True
    tensors = plan.checkpoint.tensors
    state = {target: torch.empty(plan.shape_of(name), dtype=DTYPES.get(tensors[name].info.dtype), device="meta")
             for name, target in plan.names.items()}
    prefix = comfy.model_detection.unet_prefix_from_state_dict(state)
    state = comfy.utils.state_dict_prefix_replace(state, {prefix: ""}, filter_keys=True) or state
    try:
        config = comfy.model_detection.model_config_from_unet(state, "", metadata=plan.metadata)
    except Exception as error:      # what it finds in the tensors themselves, such as quantization, is not here
        log.debug("%s may be a model: %s", plan.checkpoint.path, error)
        return True
    return config is not None and config.latent_format.latent_dimensions == 3


def _require_family(model, plan: Plan) -> None:
    try:
        found = family_of(model.model).name
    except ValueError:
        found = type(model.model).__name__
    if plan.trained.family not in ("", found):
        raise CheckpointError(f"{plan.checkpoint.path}: {plan.trained.name} is a {plan.trained.family}, this file is "
                              f"{found}. Set trained_as to auto")


def load_without_gates(path: Path, model_options: dict, disable_dynamic: bool = False):
    """The model alone, as ComfyUI asks for it again for a copy without dynamic VRAM (torch.compile, hooks)."""
    return _load(plan_of(open_checkpoint(path)), model_options, disable_dynamic)


def _load(plan: Plan, model_options: dict, disable_dynamic: bool = False):
    tensors, releasing = read_tensors(plan.checkpoint, plan.names)
    state = {target: tensors.pop(name).view(plan.shape_of(name)) if name in plan.reshaped else tensors.pop(name)
             for name, target in plan.names.items()}
    only_newer = {"disable_dynamic": True} if disable_dynamic else {}      # ComfyUI before dynamic VRAM lacks it
    with releasing:
        model = comfy.sd.load_diffusion_model_state_dict(
            state, model_options=model_options, metadata=plan.metadata, **only_newer)
    if model is None:
        raise CheckpointError(plan.refusal)
    model.cached_patcher_init = (load_without_gates, (plan.checkpoint.path, model_options))
    return model
