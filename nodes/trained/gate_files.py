"""Gates read from files: whole ones, those of a LoRA, and LoRA differences to gates that a model has already."""
from __future__ import annotations

from pathlib import Path

import comfy.lora
import torch
from torch import Tensor

from ...checkpoints.gate_names import find_gates
from ...checkpoints.names import is_lora
from ...checkpoints.plan import GATE_PARTS
from ...checkpoints.safetensors_file import CheckpointError
from ...checkpoints.source import Checkpoint, open_checkpoint
from ...checkpoints.trained import UNKNOWN, Trained, trained_facts
from .gates import KEY, attach, gates_of, make_patcher, require_fit
from .weights import read_tensors

SCALES = ("scale_weight", "weight_scale")
WHOLE = {"weight": "weight", "bias": "bias", "set_weight": "weight", "diff": "weight", "diff_b": "bias"}
"""Part in a file -> part of the gate that it is when the model has none: FastVideo fills a missing gate with zeros."""


def with_gates(model, path: Path, strength: float = 1.0, node_id: str | None = None, trained: Trained | None = None):
    """A clone of `model` (ModelPatcher) with the gates of the file at `path`. Only the gates are read.

    A whole gate replaces the one there is. What a LoRA says of gates is applied to those of the model with
    `strength`, or makes them when the model has none and the LoRA holds them whole.
    trained: how, where it is known already; else what the file and its name say, and of a folder its config.
    Raises CheckpointError: no gates in the file, gates of another model, differences to gates that are not there.
    """
    checkpoint = open_checkpoint(path)
    found = find_gates(checkpoint.tensors)
    if not found:
        what = "LoRA" if is_lora(checkpoint.tensors) else "model"
        raise CheckpointError(f"{path} is a {what} without VSA gates. Choose the file of a VSA-trained model (FastWan, "
                              "FastH3, ...) or its LoRA with gates. A model that was not trained with VSA has none and "
                              "needs none: bypass this node (Ctrl+B)")
    parts = {part for layer in found.values() for part in layer}
    if trained is None:
        config = checkpoint.config if path.is_dir() else {}
        trained = trained_facts(checkpoint.metadata, (*path.parts[-3:], *checkpoint.metadata.values(),
                                                      str(config.get("_name_or_path", ""))))
    if parts <= set(GATE_PARTS):
        return _attach_whole(model, path, checkpoint, found, trained, node_id)
    if gates_of(model) is not None:
        return _patched(model, path, checkpoint, found, strength, trained, node_id)
    if not parts <= set(WHOLE):
        raise CheckpointError(f"{path} holds low-rank differences to gates ({', '.join(sorted(parts - set(WHOLE)))}), "
                              "but the model has no gates: attach the gates of the base model first")
    return _attach_whole(model, path, checkpoint, found, trained, node_id)


def open_gates(path: Path, dtype: torch.dtype, load_device, offload_device, disable_dynamic: bool = False):
    """A ModelPatcher with the whole gates of a file; can be asked for again, as ComfyUI's own loaders can."""
    checkpoint = open_checkpoint(path)
    found = find_gates(checkpoint.tensors)
    names = [name for parts in found.values() for name in parts.values()]
    tensors, releasing = read_tensors(checkpoint, names)
    with releasing:
        whole = {layer: _whole({part: tensors[name] for part, name in parts.items()}, dtype)
                 for layer, parts in found.items()}
        patcher = make_patcher(whole, dtype, load_device, offload_device, disable_dynamic)
    patcher.cached_patcher_init = (open_gates, (path, dtype, load_device, offload_device))
    return patcher


def _whole(parts: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """weight and perhaps bias of one gate; a weight with a scale (fp8 scaled) is multiplied out."""
    gate = {WHOLE[part]: tensor for part, tensor in parts.items() if part in WHOLE}
    for scale in SCALES:
        if scale in parts:
            gate["weight"] = (gate["weight"].float() * parts[scale].float()).to(_at_least_16_bits(dtype))
    return gate


def _at_least_16_bits(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize > 1 else torch.bfloat16


def _attach_whole(model, path, checkpoint: Checkpoint, found, trained: Trained, node_id):
    weights = {}
    for layer, parts in found.items():
        name = next((name for part, name in parts.items() if WHOLE.get(part) == "weight"), None)
        if name is None:
            raise CheckpointError(f"{path}: the gate of layer {layer} has {', '.join(parts)} and no weight")
        weights[layer] = checkpoint.tensors[name].info.shape
    attention = require_fit(model, weights, str(path))
    base = model.model
    dtype = base.get_dtype()
    if not dtype.is_floating_point:
        dtype = base.get_dtype_inference()
    patcher = open_gates(path, dtype, model.load_device, model.offload_device)
    return attach(model, patcher, trained, attention, node_id)


def _patched(model, path, checkpoint: Checkpoint, found, strength, trained: Trained, node_id):
    """A clone whose gates have the LoRA's parts as ComfyUI patches."""
    gates = gates_of(model)
    clone = model.clone()
    patcher = clone.get_additional_models_with_key(KEY)[0]
    names = [name for parts in found.values() for name in parts.values()]
    tensors, _ = read_tensors(checkpoint, names)
    targets = {name.removesuffix("." + part): f"layers.{layer}.weight"
               for layer, parts in found.items() for part, name in parts.items()}
    patches = comfy.lora.load_lora(tensors, targets, log_missing=False)
    state = patcher.model.state_dict()
    for key, patch in patches.items():
        if key not in state:
            raise CheckpointError(f"{path} changes {key.replace('layers.', 'the gate of layer ', 1)}, which the gates "
                                  "of this model do not have")
        shape = getattr(patch[1][0], "shape", None) if isinstance(patch, tuple) else None
        if shape is not None and shape != state[key].shape:
            raise CheckpointError(f"{path}: found {list(shape)} for a gate of {list(state[key].shape)}: it belongs to "
                                  "another model")
    if not patches:
        raise CheckpointError(f"{path}: its gate keys are of no known kind")
    patcher.add_patches(patches, strength)
    known = gates.trained if trained is UNKNOWN else trained
    return attach(clone, patcher, known, gates.attention, node_id)
