"""Gates or projections in a model that ComfyUI saves: they are written beside the weights, where the loader finds them.

ComfyUI's Save nodes ask a ModelPatcher for its state dict, which knows nothing of additional models. So every clone of
a model with such layers answers for both.
"""
from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

import comfy.float
import comfy.lora
import torch
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ...checkpoints.trained import METADATA_KEY

log = logging.getLogger(__name__)

KEY = "video_sparse_attention.saving"
"""Of the callback that a model's clones inherit."""


def save_layers(model, find: Callable) -> None:
    """From now on `model` (a ModelPatcher of ours) and its clones are saved with their extra layers.

    find(ModelPatcher) -> (ModelPatcher of the layers, how they were trained as JSON, the name of a tensor in the file
    with {layer} and {part}), or None where it has none. A model that was trained sparse without any has None for them.
    """
    def answer_for(patcher) -> None:
        # Weakly: a patcher that holds itself would keep its weights in memory until Python looks for circles.
        patcher.state_dict_for_saving = _Saving(weakref.ref(patcher), find)

    answer_for(model)
    model.remove_callbacks_with_key(CallbacksMP.ON_CLONE, KEY)
    model.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, lambda old, new: answer_for(new))


class _Saving:
    """In place of one ModelPatcher's state_dict_for_saving."""

    def __init__(self, patcher, find: Callable):
        self.patcher, self.find = patcher, find

    def __call__(self, *args, **kwargs) -> dict[str, Tensor]:
        patcher = self.patcher()
        state = type(patcher).state_dict_for_saving(patcher, *args, **kwargs)
        found = self.find(patcher)
        if found is None:
            return state
        layers, trained, saved_as = found
        if layers is not None:
            named = {}
            for name, tensor in patched_tensors(layers).items():
                _, layer, part = name.split(".")
                named[saved_as.format(layer=layer, part=part)] = tensor
            state.update(patcher.model.model_config.process_unet_state_dict_for_saving(named))
            log.info("%d layers that it was trained with are saved with the model", len(layers.model.layers))
        # The Save nodes write metadata of their own, so the training is told as ComfyUI tells quantization: in bytes.
        state[METADATA_KEY] = torch.frombuffer(bytearray(trained.encode()), dtype=torch.uint8)
        return state


def patched_tensors(patcher) -> dict[str, Tensor]:
    """The tensors of a ModelPatcher on the CPU with its patches in them, whether they are loaded or not."""
    found = {}
    for key, ((weight, convert), *patches) in patcher.get_key_patches().items():
        whole = convert(weight).to("cpu", copy=True)
        if patches:
            changed = comfy.lora.calculate_weight(patches, whole.float(), key)
            whole = comfy.float.stochastic_rounding(changed, whole.dtype)
        found[key] = whole.contiguous()
    return found
