"""How a loaded model was trained, where sparse attention was part of it: carried by the model, asked for by the nodes.

Extra layers that it brings along are `fed_layers`'. A training without any is told by a model's metadata or its user
alone; it changes nothing about the model but what the nodes take for granted and what they warn of.
"""
from __future__ import annotations

import logging

from comfy.patcher_extension import WrappersMP

from ...checkpoints.trained import SLA, VSA, Trained
from ..hook.hook import SparseAttentionHook
from ..hook.status import show_under_node
from .saving import save_layers

log = logging.getLogger(__name__)

NODES = {VSA: "Video Sparse Attention (VSA)", SLA: "Sparse Linear Attention (SLA)"}
"""The node that a model trained with a method wants."""


class Training:
    """The sparse training of one model, as its clones share it."""

    key: str
    """Of this object in a model's transformer_options, and of its wrappers."""
    held_as: str
    """The attribute of a method that makes use of it."""

    def __init__(self, trained: Trained, node_id: str | None = None):
        self.trained, self.node_id = trained, node_id

    def __deepcopy__(self, memo):
        return self

    @property
    def unused_text(self) -> str:
        """What to say before a sampling in which nothing makes use of it, "" where that is harmless."""
        raise NotImplementedError

    @property
    def other_text(self) -> str:
        """What to say where a node for another method is on the model, "" where that is harmless."""
        raise NotImplementedError

    @classmethod
    def of(cls, model):
        """That of a ModelPatcher, or None."""
        return model.model_options.get("transformer_options", {}).get(cls.key)

    def put_on(self, clone) -> None:
        """Let `clone`, a ModelPatcher of ours, carry it in place of one of its kind."""
        clone.model_options.setdefault("transformer_options", {})[self.key] = self
        clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, self.key)
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, self.key, self.outer_sample)

    def outer_sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE wrapper: warns when nothing will make use of it."""
        model = getattr(executor.class_obj, "model_patcher", None)
        if self.unused_text and model is not None and not any(
                getattr(hook.method, self.held_as, None) is self for hook in SparseAttentionHook.of(model)):
            log.warning("[%s] %s", self.trained.method, self.unused_text)
            show_under_node(self.unused_text, self.node_id)
        return executor(*args, **kwargs)


class BareTraining(Training):
    """The training of a model without extra layers."""

    key, held_as = "video_sparse_attention.training", "bare"

    @property
    def unused_text(self) -> str:
        return "" if self.trained.dense_serves else (
            f"{self.trained.name} was trained with sparse attention alone and is about to run without it, which is not "
            "what was trained: expect a worse clip. Put Sparse Linear Attention (SLA) between the loader and the "
            "sampler, and no other sparse node")

    @property
    def other_text(self) -> str:
        return "" if self.trained.dense_serves else (
            f"{self.trained.name} was trained with {self.trained.method}, which this is not: use the node "
            f"{NODES[self.trained.method]} in place of this one")

    def attach_to(self, model):
        """A clone of `model` (ModelPatcher) that carries it, and is saved with it."""
        clone = model.clone()
        self.put_on(clone)
        save_layers(clone, _to_save)
        return clone


def _to_save(model) -> tuple | None:
    """(no layers, the training as JSON, no name) of a ModelPatcher, as `saving` wants it."""
    training = BareTraining.of(model)
    return None if training is None else (None, training.trained.to_json(), "")


def bare_training_of(model) -> BareTraining | None:
    """That of a ModelPatcher without extra layers, or None."""
    return BareTraining.of(model)


def warn_of_other_training(patched, node_id: str | None = None) -> None:
    """Say on the node, and with every run, that the model of the newest hook was trained with another method."""
    hook = SparseAttentionHook.of(patched)[-1]
    for training in patched.model_options.get("transformer_options", {}).values():
        if isinstance(training, Training) and training.trained.method != hook.method.name and training.other_text:
            hook.warnings.append(training.other_text)
            log.warning("[%s] %s", hook.method.name, training.other_text)
            show_under_node(training.other_text, node_id)
