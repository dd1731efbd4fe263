"""SLA projections on a loaded model: where they live, and how they reach the attention calls.

They are fed as `fed_layers` says. A projection needs nothing but q, k and v, so its layer alone is handed to the calls
of a block's self-attention, those that run dense included: without it dense attention is another model.
"""
from __future__ import annotations

from typing import Any

import comfy.ops
import torch
from torch import Tensor

from ...checkpoints.projection_names import HEAD_DIM, NATIVE_NAME
from ..families import family_of
from .fed_layers import FedLayers

KEY = "video_sparse_attention.projections"
"""Of a model's ProjectionSet in its transformer_options, of its wrappers, and of the projections' ModelPatcher."""
FED = "video_sparse_attention.projection"
"""In the transformer_options of one self-attention: its FedProjection."""
FAMILY, ATTENTION = "Wan", "self_attn"


class ProjectionLayers(torch.nn.Module):
    """One linear layer per transformer block, head_dim -> head_dim, in float32: there are few numbers in them."""

    def __init__(self, layers: int, device: torch.device):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            comfy.ops.manual_cast.Linear(HEAD_DIM, HEAD_DIM, dtype=torch.float32, device=device)
            for _ in range(layers))
        self.feeds = [ProjectionFeed(layer) for layer in self.layers]


class FedProjection:
    """The projection of one self-attention, [..., D] -> [..., D], wherever its weights are."""

    def __init__(self, layer: torch.nn.Module):
        self.layer = layer

    def __deepcopy__(self, memo):
        return self

    def __call__(self, x: Tensor) -> Tensor:
        return self.layer(x)


class ProjectionFeed:
    """Pre-hook of a self-attention: gives its calls the projection."""

    def __init__(self, layer: torch.nn.Module):
        self.projection = FedProjection(layer)

    def __call__(self, module, args, kwargs):
        options = kwargs.get("transformer_options")
        if options is None:
            return None
        return args, {**kwargs, "transformer_options": {**options, FED: self.projection}}


class ProjectionSet(FedLayers):
    """The projections of one model, as its clones share them."""

    key, what, held_as = KEY, "SLA projections", "projections"

    @property
    def saved_as(self) -> str:
        return NATIVE_NAME

    @property
    def unused_text(self) -> str:
        return (f"{self.trained.name} was trained with SLA and is about to run without its projections, which is not "
                "the model that was trained: expect a worse clip. Put Sparse Linear Attention (SLA) between the loader "
                "and the sampler, and no other sparse node")


def require_fit(model, layers: int, where: str) -> str:
    """The name of the self-attention that so many layers of projections belong to.

    Raises ValueError: a model of another family, of other heads or with other blocks.
    """
    family, net = family_of(model.model), model.model.diffusion_model
    if family.name != FAMILY:
        raise ValueError(f"{where}: found SLA projections for {family.name}: there are none for it, wanted {FAMILY}")
    head_dim = family.heads(net)[1]
    if head_dim != HEAD_DIM or len(net.blocks) != layers or not all(hasattr(block, ATTENTION) for block in net.blocks):
        raise ValueError(f"{where}: found SLA projections for {layers} layers and heads of {HEAD_DIM}, this model has "
                         f"{len(net.blocks)} layers and heads of {head_dim}: they belong to another model")
    return ATTENTION


def projections_of(model) -> ProjectionSet | None:
    """The projections that a ModelPatcher carries."""
    return ProjectionSet.of(model)


def projection_of(options: dict[str, Any]) -> FedProjection | None:
    """The projection of one attention call; None when the call has none."""
    return options.get(FED)
