"""What the hook must know of a model family."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ...vsa_core.grid import Thw, TokenGrid

NO_VIDEO = "latent is no video"
NOT_THE_CLIP = "attention over something other than the clip"
UNKNOWN_TOKENS = "tokens beside the clip whose place is not known"


@dataclass(frozen=True)
class ModelCall:
    """The facts of one forward pass of the diffusion model that its attention calls need."""

    latent_thw: Thw | None
    """Latent frames, height and width of the clip as the model gets it, None when the latent is no video."""
    patch_size: Thw
    context_lengths: frozenset[int]
    """Lengths of the sequences that cross-attention reads."""
    conds: frozenset[str]
    """Names of the extra conditions that are present."""
    prefix: int = 0
    """Other tokens that this pass puts before the clip's."""
    suffix: int = 0
    """Other tokens that this pass puts after the clip's."""
    suffix_may_be_cut: bool = False
    """Whether the host may leave out some tokens of the suffix, and of nothing else."""

    @property
    def thw(self) -> Thw | None:
        """The clip's token grid: latent cells per patch, rounded up as the host pads."""
        return None if self.latent_thw is None else token_grid(self.latent_thw, self.patch_size)

    def place(self, num_tokens: int) -> TokenGrid | str:
        """Where the clip lies in num_tokens tokens when every one of them is accounted for, else why not."""
        if self.thw is None:
            return NO_VIDEO
        others = num_tokens - math.prod(self.thw)
        if others == self.prefix + self.suffix:
            return TokenGrid(self.thw, self.prefix, self.suffix)
        if others < 0:
            return NOT_THE_CLIP
        if self.suffix_may_be_cut and self.prefix <= others < self.prefix + self.suffix:
            return TokenGrid(self.thw, self.prefix, others - self.prefix)
        return UNKNOWN_TOKENS


@dataclass(frozen=True)
class Stack:
    """Transformer blocks that run one after the other on one sequence of tokens, as several cards may share it."""

    blocks: Sequence
    tokens: tuple[str, ...]
    """Arguments of a block that hold the sequence, in the order in which its attention joins them."""
    axis: int = 1
    """Of the tokens in them and in what a block returns."""
    along: Mapping[str, tuple[str | None, int]] = field(default_factory=dict)
    """Other arguments, or tuples of them, that may have a row per token -> whose tokens, None: those of the joined
    sequence, and along which axis."""
    per_frame: Mapping[str, int] = field(default_factory=dict)
    """Those of them that may have a row per frame in place of one per token -> how many dimensions they have then."""
    ranges: Mapping[str, str] = field(default_factory=dict)
    """Arguments that name ranges of tokens, [(start, stop or None, ...), ...] -> whose."""
    unknown: Mapping[str, str] = field(default_factory=dict)
    """Arguments that cannot be shared, unless they are None -> what they are to a user."""
    returns: tuple[str, ...] = ()
    """Which of `tokens` a block returns, in this order; () for one tensor."""
    until: Any = None
    """The module whose first argument is the whole sequence again; None: whatever comes after the last block."""


class VideoFamily(Protocol):
    """One family. Its methods look at shapes and names; where a value of a tensor is needed, its file says why."""

    name: str

    def matches(self, net) -> bool:
        """Whether the diffusion model is of this family, judged by its class alone."""

    def heads(self, net) -> tuple[int, int]:
        """(number of heads, head_dim) of its video self-attention."""

    def observe(self, net, latent_shape: tuple[int, ...], context, conds: dict[str, Any]) -> ModelCall:
        """The facts of a forward pass, from what BaseModel.apply_model is called with."""

    def blocks(self, net) -> Sequence:
        """The transformer blocks with the clip's self-attention, in the order in which layers are numbered."""

    def layer(self, net, options: dict[str, Any], running: int | None) -> tuple[int | None, int]:
        """(index of the layer that makes a call, number of layers), None for an index that nothing tells.

        options: the call's transformer_options.   running: the place in `blocks` of the block that is running, None
        where the host calls parts of a block by themselves.
        """

    def locate(self, net, call: ModelCall, options: dict[str, Any], num_tokens: int,
               heads: tuple[int, int]) -> TokenGrid | str:
        """Where the video tokens lie in a self-attention of num_tokens tokens, or why that is not known.

        options: the call's transformer_options.   heads: the call's number of heads and head_dim.
        """

    def stacks(self, net) -> Sequence[Stack] | str:
        """The blocks whose tokens several cards may share with an exact result, or why there are none."""


NOT_TRIED = "not tried on several cards yet"


def unwrapped(net):
    """The diffusion model itself, where torch.compile has put a module of its own around it."""
    while "_orig_mod" in getattr(net, "_modules", ()):
        net = net._modules["_orig_mod"]
    return net


def built_on(net, name: str, package: str) -> bool:
    """Whether a class `name` of ComfyUI's comfy.ldm.`package` is among the classes of the diffusion model."""
    classes = type(unwrapped(net)).__mro__
    return any(cls.__name__ == name and f".{package}." in f".{cls.__module__}." for cls in classes)


def token_grid(latent_thw: Sequence[int], patch_size: Sequence[int]) -> Thw:
    """Patches along every axis, the last one padded."""
    return tuple(-(-cells // patch) for cells, patch in zip(latent_thw, patch_size, strict=True))


def video_thw(latent_shape: Sequence[int]) -> Thw | None:
    """(t, h, w) of a latent [B, C, T, H, W], None for any other."""
    return tuple(latent_shape[2:]) if len(latent_shape) == 5 else None


def video_shape(latent_shape: Sequence[int], conds: dict[str, Any]) -> Sequence[int]:
    """The shape of the video latent, also where several latents come packed into one [B, 1, N]."""
    shapes = conds.get("latent_shapes")
    return shapes[0] if shapes else latent_shape


def length(x) -> int:
    """Tokens of a [B, L, ...] tensor, 0 for None."""
    return 0 if x is None else x.shape[1]


def present(conds: dict[str, Any]) -> frozenset[str]:
    """The names of the conditions that are not None."""
    return frozenset(name for name, value in conds.items() if value is not None)
