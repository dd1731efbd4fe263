"""What becomes of a forward pass on several cards, whoever runs them: whether it can be split, and one card's part.

It happens at the innermost of the model's own wrappers: those of other nodes, such as step caches, run once and see
whole tensors.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ...vsa_core.sequence_parallel import get_sp_group
from ..families import family_of
from ..hook.hook import OVERRIDE, SparseAttentionHook
from ..hook.places import is_compiled
from ..hook.run import Run
from .cards import KEY
from .evidence import Evidence
from .shard import CannotSplit, Shard
from .split_attention import Times, split_attention

PASS = f"{KEY}.pass"
"""In the transformer_options of a pass: its number, as a string."""
_numbers = itertools.count()
_FORWARDS = "forward", "_forward", "forward_orig"


@dataclass(frozen=True)
class Call:
    """What the innermost wrapper was called with."""

    options: dict
    args: Sequence
    kwargs: dict

    @classmethod
    def of(cls, args: Sequence, kwargs: dict) -> Call:
        return cls(next(filter(_is_options, (*args, *kwargs.values())), {}), args, kwargs)

    def on(self, forward, options: dict) -> Any:
        """What forward gives for it, with these transformer_options."""
        return forward(*(options if _is_options(value) else value for value in self.args),
                       **{name: options if _is_options(value) else value for name, value in self.kwargs.items()})

    def moved(self, device: torch.device) -> Call:
        """The same with its tensors on the device."""
        return Call(self.options, _moved(self.args, device), _moved(self.kwargs, device))


class Split:
    """The split of one patched model over its cards."""

    def __init__(self, cards: Sequence[str]):
        """cards: what a user calls them."""
        self.cards = list(cards)
        self.evidence: Evidence | None = None
        """Of the sampling that runs, or ran last."""
        self._passes: dict[str, tuple[Any, frozenset[int]]] = {}
        """Number -> the BaseModel that it is of, and the lengths that cross-attention reads in it."""

    def install(self, clone) -> None:
        """Let the samplings of `clone`, a ModelPatcher of ours, be split; a split that it had is replaced."""
        for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, self._outer_sample),
                              (WrappersMP.APPLY_MODEL, self._apply_model)):
            clone.remove_wrappers_with_key(kind, KEY)
            clone.add_wrapper_with_key(kind, KEY, wrapper)

    def _outer_sample(self, executor, *args, **kwargs):
        """OUTER_SAMPLE wrapper: one sampling, with evidence of its own."""
        raise NotImplementedError

    def on_all_cards(self, executor, patcher, call: Call):
        """The output of the network, computed on all cards. Raises CannotSplit where that shows to be impossible."""
        raise NotImplementedError

    # -- one pass -------------------------------------------------------------------------------------------------

    def _apply_model(self, executor, x, t, *args, **kwargs):
        """Put the fan-out behind all other wrappers of the model, or count why this pass runs on one card."""
        args = list(args)
        c_crossattn = args[1] if len(args) > 1 else kwargs.get("c_crossattn")
        control = args[2] if len(args) > 2 else kwargs.get("control")
        options = args[3] if len(args) > 3 else kwargs.get("transformer_options", {})
        base = executor.class_obj
        if self.evidence is None:       # a caller that applies the model outside of ComfyUI's guiders
            self.evidence = Evidence(self.cards)
        try:
            contexts = self._contexts(base, x, c_crossattn, control, options, kwargs)
        except CannotSplit as reason:
            self._on_one_card(base.current_patcher, str(reason))
            return executor(x, t, *args, **kwargs)
        wrappers = dict(options.get("wrappers", {}))
        inner = {key: found for key, found in wrappers.get(WrappersMP.DIFFUSION_MODEL, {}).items() if key != KEY}
        wrappers[WrappersMP.DIFFUSION_MODEL] = {**inner, KEY: [self._forward]}
        token = str(next(_numbers))
        options = {**options, "wrappers": wrappers, PASS: token}
        if len(args) > 3:
            args[3] = options
        else:
            kwargs["transformer_options"] = options
        self._passes[token] = base, contexts
        try:
            return executor(x, t, *args, **kwargs)
        finally:
            del self._passes[token]

    def _contexts(self, base, x, c_crossattn, control, options, conds) -> frozenset[int]:
        """The lengths of what cross-attention reads in this pass. Raises CannotSplit where it must run on one card."""
        net, patcher = base.diffusion_model, base.current_patcher
        if self.evidence.given_up:
            raise CannotSplit(self.evidence.given_up)
        if patcher is None:
            raise CannotSplit("a model outside of ComfyUI's samplers")
        if control is not None:
            raise CannotSplit("a ControlNet")
        if getattr(patcher, "current_hooks", None) is not None:
            raise CannotSplit("weights that change with the prompt")
        if patches := sorted(name for name, found in options.get("patches", {}).items() if found):
            raise CannotSplit(f"a node that patches the blocks ({', '.join(patches)})")
        if options.get("patches_replace", {}).get("dit"):
            raise CannotSplit("a node that replaces blocks")
        if is_compiled(net, options):
            raise CannotSplit("a compiled model")
        if parts := [name for name in getattr(patcher, "object_patches", {}) if name.startswith("diffusion_model.")]:
            raise CannotSplit(f"a node that replaced a part of the model ({parts[0]})")
        if replaced := [name for name in _FORWARDS if name in vars(net)
                        and getattr(vars(net)[name], "__func__", None) is not getattr(type(net), name)]:
            raise CannotSplit(f"a node that replaced the model's {replaced[0]}")
        try:
            return family_of(base).observe(net, tuple(x.shape), c_crossattn, conds).context_lengths
        except Exception as error:
            raise CannotSplit(f"the model's inputs are not understood ({error})") from error

    def _forward(self, executor, *args, **kwargs):
        """DIFFUSION_MODEL wrapper, the innermost one."""
        call = Call.of(args, kwargs)
        if call.options.get(PASS) not in self._passes or not hasattr(executor.original, "__name__"):
            self.evidence.on_one_card("another node hands on options of its own")
            return executor(*args, **kwargs)
        base = self._passes[call.options[PASS]][0]
        patcher = base.current_patcher
        if _hooked(family_of(base).blocks(executor.class_obj)):
            self._on_one_card(patcher, "a node that hooks into the blocks of the model on the first card")
            return executor(*args, **kwargs)
        try:
            out = self.on_all_cards(executor, patcher, call)
        except CannotSplit as reason:
            self.evidence.given_up = str(reason)
            self._on_one_card(patcher, self.evidence.given_up)
            return executor(*args, **kwargs)
        for hook in SparseAttentionHook.of(patcher):
            hook.note(f"split over {self.evidence.each()}")
        return out

    def _on_one_card(self, patcher, reason: str) -> None:
        self.evidence.on_one_card(reason)
        for hook in SparseAttentionHook.of(patcher) if patcher is not None else ():
            hook.note(f"not split over the cards: {reason}")

    def on_card(self, patcher, net, forward, call: Call, times: Times, run: Callable[[Run], Run] = lambda run: run):
        """(the output of the network on the card of this thread's rank, what it had of the sequence)

        patcher: the model's ModelPatcher on that card.   forward: what to call in place of net's own.   run: which part
        of a sparse node's run counts its calls.
        """
        group, family = get_sp_group(), family_of(patcher.model)
        shard, contexts = Shard(group, family.stacks(net)), self._passes[call.options[PASS]][1]
        heads = group.heads_of(family.heads(net)[0])[group.rank_in_group]
        own = {**call.options, OVERRIDE: split_attention(call.options.get(OVERRIDE), shard, contexts, times)}
        with ExitStack() as stack:
            for hook in SparseAttentionHook.of(patcher):
                own = stack.enter_context(hook.on_card(own, net, heads, run))
            stack.enter_context(shard.cutting())
            return call.on(forward, own), shard


def _hooked(blocks) -> bool:
    """Whether another pack has put hooks on the blocks, which the copies of the model do not have."""
    ours = __name__.removesuffix(".split.passes")
    return any(not type(hook).__module__.startswith(ours) for block in blocks for module in block.modules()
               for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()))


def _is_options(value) -> bool:
    return isinstance(value, dict) and PASS in value


def _moved(value: Any, device: torch.device) -> Any:
    """The same with every tensor on the device; transformer_options stay as they are."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(x, device) for x in value)
    if isinstance(value, dict) and not _is_options(value):
        return {name: _moved(x, device) for name, x in value.items()}
    return value
