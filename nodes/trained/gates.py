"""VSA gates on a loaded model: where they live, and how they reach the attention calls.

They are fed as `fed_layers` says: a block's self-attention gets its gate layer and the input to apply it to.
"""
from __future__ import annotations

from typing import Any

import comfy.model_patcher
import comfy.ops
import torch
from torch import Tensor

from ...checkpoints.gate_names import check_gates
from ...checkpoints.trained import Trained
from ..families import family_of
from ..hook.method import StaysDense
from .fed_layers import FedLayers, patcher_of

KEY = "video_sparse_attention.gates"
"""Of a model's GateSet in its transformer_options, of its wrappers, and of the gates' ModelPatcher."""
FED = "video_sparse_attention.gate"
"""In the transformer_options of one self-attention: its FedGate."""
ATTENTION = {"Wan": ("self_attn", "dim"), "MiniMax H3": ("attn", "hidden_size")}
"""Family -> (self-attention in net.blocks[n], attribute of net with the width of its input)."""

SAVED_IN = {"self_attn": "", "attn": "attn."}
"""Self-attention -> the part between block and gate in the names of published files."""


class GateLayers(torch.nn.Module):
    """One linear layer per transformer block: width -> heads * head_dim."""

    def __init__(self, shapes: list[tuple[int, int]], biases: list[bool], dtype: torch.dtype, device: torch.device):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            comfy.ops.manual_cast.Linear(width, inner, bias=bias, dtype=dtype, device=device)
            for (inner, width), bias in zip(shapes, biases, strict=True))
        self.feeds = [GateFeed(layer) for layer in self.layers]


class FedGate:
    """The gate of one self-attention, computed for the calls of it that run sparse."""

    def __init__(self, layer: torch.nn.Module, x: Tensor):
        self.layer, self.x = layer, x
        self._gate: Tensor | None = None

    def __deepcopy__(self, memo):
        return self

    def of(self, query: Tensor, part: range | None, heads: int) -> Tensor:
        """The gate [B, S, H, D] of a call with the heads `part` out of `heads`.

        Raises StaysDense where it cannot be told which heads or tokens of the gate the call's are.
        """
        gate = self.layer(self.x).to(query.dtype) if self._gate is None else self._gate
        head_dim = query.shape[-1]
        if part is None or gate.numel() * len(part) != query.numel() * heads:
            raise StaysDense("its VSA gate is for other heads or tokens")
        self._gate = None if part.stop == heads else gate       # kept while the rest of the heads is still to come
        return gate.unflatten(-1, (heads, head_dim))[..., part.start:part.stop, :].reshape(query.shape)


class HeldGate:
    """The gate of a call's own heads and tokens, [B, S, H, D], where a card has only some of them."""

    def __init__(self, gate: Tensor, heads: range):
        self.gate, self.heads = gate, heads

    def __deepcopy__(self, memo):
        return self

    def of(self, query: Tensor, part: range | None, heads: int) -> Tensor:
        """As `FedGate.of`."""
        if part is None or part.start < self.heads.start or part.stop > self.heads.stop:
            raise StaysDense("its VSA gate is for other heads or tokens")
        first = part.start - self.heads.start
        return self.gate[:, :, first:first + len(part)].to(query.dtype)


class GateFeed:
    """Pre-hook of a self-attention: gives its calls the gate layer and the input to apply it to."""

    def __init__(self, layer: torch.nn.Module):
        self.layer = layer

    def __call__(self, module, args, kwargs):
        options, x = kwargs.get("transformer_options"), args[0] if args else kwargs.get("x")
        if isinstance(x, list) and len(x) == 1:     # a neighbour's, from which the attention takes its input out
            x = x[0]
        if options is None or not isinstance(x, Tensor):
            return None
        return args, {**kwargs, "transformer_options": {**options, FED: FedGate(self.layer, x)}}


class GateSet(FedLayers):
    """The gates of one model, as its clones share them."""

    key, what, held_as = KEY, "VSA gates", "gates"

    @property
    def saved_as(self) -> str:
        return f"blocks.{{layer}}.{SAVED_IN[self.attention]}to_gate_compress.{{part}}"

    @property
    def unused_text(self) -> str:
        return (f"{self.trained.name} was trained with VSA and is about to run dense and without its gates: expect "
                "noise or blur. Put Video Sparse Attention (VSA) between the loader and the sampler")


def make_patcher(tensors: dict[int, dict[str, Tensor]], dtype: torch.dtype, load_device, offload_device,
                 disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """A ModelPatcher of the gates. tensors: layer -> "weight" [heads * head_dim, width], perhaps "bias"."""
    module = GateLayers([tuple(parts["weight"].shape) for parts in tensors.values()],
                        ["bias" in parts for parts in tensors.values()], dtype, offload_device)
    return patcher_of(module, tensors, load_device, offload_device, disable_dynamic)


def require_fit(model, shapes: dict[int, tuple[int, ...]], where: str) -> str:
    """The name of the self-attention that gates of these shapes (layer -> shape) belong to.

    Raises ValueError: a model of no family with gates, gates of another model.
    """
    family, net = family_of(model.model), model.model.diffusion_model
    if family.name not in ATTENTION:
        raise ValueError(f"found {family.name}: there are no VSA gates for it, wanted {' or '.join(ATTENTION)}")
    attention, width = ATTENTION[family.name]
    heads, head_dim = family.heads(net)
    check_gates(shapes, len(net.blocks), (heads * head_dim, getattr(net, width)), where)
    if not all(hasattr(block, attention) for block in net.blocks):
        raise ValueError(f"found a {family.name} model whose blocks have no {attention}: its gates cannot be attached")
    return attention


def attach(model, patcher, trained: Trained, attention: str, node_id: str | None = None):
    """A clone of `model` with the gates of `patcher`; gates that it had are replaced, VSA nodes before it take them."""
    return GateSet(trained, attention, node_id).attach_to(model, patcher)


def gates_of(model) -> GateSet | None:
    """The gates that a ModelPatcher carries."""
    return GateSet.of(model)


def gate_of(options: dict[str, Any], query: Tensor, part: range | None, heads: int) -> Tensor | None:
    """The gate of one attention call [B, S, H, D], like `query`; None when the call has none. See `FedGate.of`."""
    fed = options.get(FED)
    return None if fed is None else fed.of(query, part, heads)
