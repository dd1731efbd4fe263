"""Layers that a sparse-trained model brings along, which the host's own model class has no place for.

They are a module with a ModelPatcher of its own, which ComfyUI loads, offloads and clones with the model. Nothing is
added to the model itself: while one forward pass runs, a pre-hook on every block's self-attention puts that block's
layer into the call's transformer_options, and the sparse method applies it. The pre-hooks are set for each forward pass
rather than for as long as a model is loaded (ComfyUI's PatcherInjection), because there a clone of a loaded model takes
the pre-hooks of the loaded one along when it is dropped, in the middle of a sampling too.
"""
from __future__ import annotations

from contextlib import contextmanager

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...checkpoints.trained import Trained
from .saving import save_layers
from .training import NODES, Training


class FedLayers(Training):
    """The extra layers of one model, as its clones share them. One subclass per sparse method.

    `key` is that of the layers' ModelPatcher too.
    """

    what: str
    """What a user calls the layers."""

    def __init__(self, trained: Trained, attention: str, node_id: str | None = None):
        """attention: the name of the self-attention in net.blocks[n]."""
        super().__init__(trained, node_id)
        self.attention = attention

    @property
    def saved_as(self) -> str:
        """The name of one tensor in a file, with {layer} and {part}."""
        raise NotImplementedError

    @property
    def other_text(self) -> str:
        return (f"{self.trained.name} was trained with {self.trained.method} and its {self.what} are not used here: "
                f"use the node {NODES[self.trained.method]} in place of this one")

    def attach_to(self, model, patcher):
        """A clone of `model` with the layers of `patcher`, a ModelPatcher; those that it had are replaced.

        Raises ValueError for a model that was trained with another method.
        """
        clone = model.clone()
        for other in clone.model_options.get("transformer_options", {}).values():
            if isinstance(other, Training) and other.key != self.key:
                has = getattr(other, "what", "no extra layers")
                raise ValueError(f"{other.trained.name} was trained with {other.trained.method} and has {has}: "
                                 f"{self.what} are not for it")
        self.put_on(clone)
        clone.set_additional_models(self.key, [patcher])
        clone.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, self.key)
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, self.key, self.apply_model)
        save_layers(clone, type(self)._to_save)
        return clone

    @classmethod
    def _to_save(cls, model) -> tuple | None:
        """(the layers' ModelPatcher, their training as JSON, name) of a ModelPatcher, as `saving` wants it."""
        layers, patchers = cls.of(model), model.get_additional_models_with_key(cls.key)
        return (patchers[0], layers.trained.to_json(), layers.saved_as) if layers is not None and patchers else None

    def apply_model(self, executor, *args, **kwargs):
        """APPLY_MODEL wrapper: the self-attentions of this forward pass get their layers."""
        with self.feeding(executor.class_obj):
            return executor(*args, **kwargs)

    @contextmanager
    def feeding(self, base):
        """While it lasts, the self-attentions of `base`, a BaseModel that is loaded, get their layers."""
        patcher = base.current_patcher
        found = [] if patcher is None else patcher.get_additional_models_with_key(self.key)
        if not found:
            raise RuntimeError(f"this model's {self.what} are not loaded: sample it through ComfyUI's samplers")
        handles = []
        try:
            for block, feed in zip(base.diffusion_model.blocks, found[0].model.feeds, strict=True):
                attention = getattr(block, self.attention)
                handles.append(attention.register_forward_pre_hook(feed, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()


def patcher_of(module: torch.nn.Module, tensors: dict[int, dict[str, Tensor]], load_device, offload_device,
               disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """A ModelPatcher of `module`, whose `layers` get the tensors: layer -> part -> tensor."""
    plain = comfy.model_patcher.ModelPatcher
    cls = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    patcher = cls(module, load_device=load_device, offload_device=offload_device)
    state = {f"layers.{layer}.{part}": tensor for layer, parts in tensors.items() for part, tensor in parts.items()}
    module.load_state_dict(state, assign=hasattr(patcher, "is_dynamic") and patcher.is_dynamic())
    return patcher
