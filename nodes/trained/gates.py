"""VSA gates on a loaded model: where they live, and how they reach the attention calls.

The gates are a module with a ModelPatcher of its own, which ComfyUI loads, offloads and clones with the model. Nothing
is added to the model itself: while one forward pass runs, a pre-hook on every block's self-attention puts the gate and
the attention's own input into that call's transformer_options, and VSA applies the one to the other. The pre-hooks are
set for each forward pass rather than for as long as a model is loaded (ComfyUI's PatcherInjection), because there a
clone of a loaded model takes the pre-hooks of the loaded one along when it is dropped, in the middle of a sampling too.
"""
from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import Any

import comfy.model_patcher
import comfy.ops
import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ...checkpoints.gate_names import check_gates
from ...checkpoints.trained import Trained
from ..families import family_of
from ..hook.hook import SparseAttentionHook
from ..hook.method import StaysDense
from ..hook.status import show_under_node
from .saving import save_gates

log = logging.getLogger(__name__)

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


class GateSet:
    """The gates of one model, as its clones share them."""

    def __init__(self, trained: Trained, attention: str, node_id: str | None = None):
        self.trained, self.attention, self.node_id = trained, attention, node_id

    def __deepcopy__(self, memo):
        return self

    def apply_model(self, executor, *args, **kwargs):
        """APPLY_MODEL wrapper: the attention calls of this forward pass get their gates."""
        with self._feeding(executor.class_obj):
            return executor(*args, **kwargs)

    @contextmanager
    def _feeding(self, base):
        patcher = base.current_patcher
        found = [] if patcher is None else patcher.get_additional_models_with_key(KEY)
        if not found:
            raise RuntimeError("this model's VSA gates are not loaded: sample it through ComfyUI's samplers")
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
        """OUTER_SAMPLE wrapper: warns when nothing will use the gates."""
        model = getattr(executor.class_obj, "model_patcher", None)
        if model is not None and not any(getattr(hook.method, "gates", None) is self
                                         for hook in SparseAttentionHook.of(model)):
            text = (f"{self.trained.name} was trained with VSA and is about to run dense and without its gates: expect "
                    "noise or blur. Put Video Sparse Attention (VSA) between the loader and the sampler")
            log.warning("[VSA] %s", text)
            show_under_node(text, self.node_id)
        return executor(*args, **kwargs)


def make_patcher(tensors: dict[int, dict[str, Tensor]], dtype: torch.dtype, load_device, offload_device,
                 disable_dynamic: bool = False) -> comfy.model_patcher.ModelPatcher:
    """A ModelPatcher of the gates. tensors: layer -> "weight" [heads * head_dim, width], perhaps "bias"."""
    module = GateLayers([tuple(parts["weight"].shape) for parts in tensors.values()],
                        ["bias" in parts for parts in tensors.values()], dtype, offload_device)
    plain = comfy.model_patcher.ModelPatcher
    cls = plain if disable_dynamic else getattr(comfy.model_patcher, "CoreModelPatcher", plain)
    patcher = cls(module, load_device=load_device, offload_device=offload_device)
    state = {f"layers.{layer}.{part}": tensor for layer, parts in tensors.items() for part, tensor in parts.items()}
    module.load_state_dict(state, assign=hasattr(patcher, "is_dynamic") and patcher.is_dynamic())
    return patcher


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
    clone = model.clone()
    gates = GateSet(trained, attention, node_id)
    clone.model_options.setdefault("transformer_options", {})[KEY] = gates
    clone.set_additional_models(KEY, [patcher])
    for kind, wrapper in ((WrappersMP.APPLY_MODEL, gates.apply_model), (WrappersMP.OUTER_SAMPLE, gates.outer_sample)):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    save_gates(clone, _told_of, SAVED_IN[attention])
    return clone


def _told_of(model) -> tuple[Any, str] | None:
    """(the gates' ModelPatcher, their training as JSON) of a ModelPatcher, as `saving` wants it."""
    gates, patchers = gates_of(model), model.get_additional_models_with_key(KEY)
    return (patchers[0], gates.trained.to_json()) if gates is not None and patchers else None


def gates_of(model) -> GateSet | None:
    """The gates that a ModelPatcher carries."""
    return model.model_options.get("transformer_options", {}).get(KEY)


def gate_of(options: dict[str, Any], query: Tensor, part: range | None, heads: int) -> Tensor | None:
    """The gate of one attention call [B, S, H, D], like `query`; None when the call has none. See `FedGate.of`."""
    fed = options.get(FED)
    return None if fed is None else fed.of(query, part, heads)
