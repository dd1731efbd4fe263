"""Layers that a sparse-trained model brings along, which the host's own model class has no place for.

They are a module with a ModelPatcher of its own, which ComfyUI loads, offloads and clones with the model. Nothing is
added to the model itself: while one forward pass runs, a pre-hook on every block's self-attention puts that block's
layer into the call's transformer_options, and the sparse method applies it. The pre-hooks are set for each forward pass
rather than for as long as a model is loaded (ComfyUI's PatcherInjection), because there a clone of a loaded model takes
the pre-hooks of the loaded one along when it is dropped, in the middle of a sampling too.
"""
from __future__ import annotations

import logging
from contextlib import contextmanager

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...checkpoints.trained import SLA, VSA, Trained
from ..hook.hook import SparseAttentionHook
from ..hook.status import show_under_node
from .saving import save_layers

log = logging.getLogger(__name__)

NODES = {VSA: "Video Sparse Attention (VSA)", SLA: "Sparse Linear Attention (SLA)"}
"""The node that a model trained with a method wants."""


class FedLayers:
    """The extra layers of one model, as its clones share them. One subclass per sparse method."""

    key: str
    """Of this object in a model's transformer_options, of its wrappers, and of the layers' ModelPatcher."""
    what: str
    """What a user calls the layers."""
    held_as: str
    """The attribute of a method that uses them."""

    def __init__(self, trained: Trained, attention: str, node_id: str | None = None):
        """attention: the name of the self-attention in net.blocks[n]."""
        self.trained, self.attention, self.node_id = trained, attention, node_id

    def __deepcopy__(self, memo):
        return self

    @property
    def saved_as(self) -> str:
        """The name of one tensor in a file, with {layer} and {part}."""
        raise NotImplementedError

    @property
    def unused_text(self) -> str:
        """What to say before a sampling in which nothing will use the layers."""
        raise NotImplementedError

    @classmethod
    def of(cls, model):
        """Those that a ModelPatcher carries, or None."""
        return model.model_options.get("transformer_options", {}).get(cls.key)

    def attach_to(self, model, patcher):
        """A clone of `model` with the layers of `patcher`, a ModelPatcher; those that it had are replaced.

        Raises ValueError for a model that was trained with another method.
        """
        clone = model.clone()
        options = clone.model_options.setdefault("transformer_options", {})
        for other in options.values():
            if isinstance(other, FedLayers) and other.key != self.key:
                raise ValueError(f"{other.trained.name} was trained with {other.trained.method} and has {other.what}: "
                                 f"{self.what} are not for it")
        options[self.key] = self
        clone.set_additional_models(self.key, [patcher])
        for kind, wrapper in ((WrappersMP.APPLY_MODEL, self.apply_model), (WrappersMP.OUTER_SAMPLE, self.outer_sample)):
            clone.remove_wrappers_with_key(kind, self.key)
            clone.add_wrapper_with_key(kind, self.key, wrapper)
        save_layers(clone, type(self)._to_save)
        return clone

    @classmethod
    def _to_save(cls, model) -> tuple | None:
        """(the layers' ModelPatcher, their training as JSON, name) of a ModelPatcher, as `saving` wants it."""
        layers, patchers = cls.of(model), model.get_additional_models_with_key(cls.key)
        return (patchers[0], layers.trained.to_json(), layers.saved_as) if layers is not None and patchers else None

    def apply_model(self, executor, *args, **kwargs):
        """APPLY_MODEL wrapper: the self-attentions of this forward pass get their layers."""
        with self._feeding(executor.class_obj):
            return executor(*args, **kwargs)

    @contextmanager
    def _feeding(self, base):
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

    def outer_sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE wrapper: warns when nothing will use the layers."""
        model = getattr(executor.class_obj, "model_patcher", None)
        if model is not None and not any(getattr(hook.method, self.held_as, None) is self
                                         for hook in SparseAttentionHook.of(model)):
            log.warning("[%s] %s", self.trained.method, self.unused_text)
            show_under_node(self.unused_text, self.node_id)
        return executor(*args, **kwargs)


def warn_of_other_training(patched, node_id: str | None = None) -> None:
    """Say on the node, and with every run, that the model of the newest hook was trained with another method."""
    hook = SparseAttentionHook.of(patched)[-1]
    for layers in patched.model_options.get("transformer_options", {}).values():
        if isinstance(layers, FedLayers) and layers.trained.method != hook.method.name:
            text = (f"{layers.trained.name} was trained with {layers.trained.method} and its {layers.what} are not "
                    f"used here: use the node {NODES[layers.trained.method]} in place of this one")
            hook.warnings.append(text)
            log.warning("[%s] %s", hook.method.name, text)
            show_under_node(text, node_id)


def patcher_of(module: torch.nn.Module, tensors: dict[int, dict[str, Tensor]], load_device, offload_device,
               disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """A ModelPatcher of `module`, whose `layers` get the tensors: layer -> part -> tensor."""
    plain = comfy.model_patcher.ModelPatcher
    cls = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    patcher = cls(module, load_device=load_device, offload_device=offload_device)
    state = {f"layers.{layer}.{part}": tensor for layer, parts in tensors.items() for part, tensor in parts.items()}
    module.load_state_dict(state, assign=hasattr(patcher, "is_dynamic") and patcher.is_dynamic())
    return patcher
