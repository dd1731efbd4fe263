"""Wan 2.1 and 2.2 and every model built on ComfyUI's WanModel (comfy/ldm/wan).

Grid: latent / (1, 2, 2), rounded up; raster order. Heads: num_heads x dim / num_heads (12, 24 or 40 x 128). Layer:
`block_index`; VACE's own blocks carry the index of the main block that they follow. Text, image, audio and music
go through cross-attention. The sequence, with f tokens per frame:

    T2V, I2V, FLF2V, TI2V-5B, VACE, Camera, FlowRVS    clip (VACE: reference images are frames of the clip)
    Fun with a reference image, Animate, WanDancer     f of the reference image, clip
    any of them with time_dim_concat (Phantom)         ... clip, the concatenated frames
    in-context references (Bernini)                    clip, every reference as a whole grid of its own
    S2V                                                clip, reference frames, motion frames packed 1x, 2x and 4x
    HuMo                                               clip, reference frames
    SCAIL, SCAIL-2                                     reference frames, clip, pose frames (half size or full)
    Animate 2                                          f of the reference image, clip; its pose branch: clip alone

References and poses are never cut: every video query sees them and they see everything. Dense: cross-attention;
Animate 2's clip while a pose acts on it, where the host attends frame by frame to keys that the others do not see;
Animate's face adapter, S2V's and WanDancer's audio, which the host calls without the hook.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from ...vsa_core.grid import Thw, TokenGrid
from .abstract import NOT_TRIED, ModelCall, Stack, built_on, length, present, token_grid, unwrapped, video_thw

_SHARED = ("WanModel", "VaceWanModel", "CameraWanModel", "SCAILWanModel", "SCAIL2WanModel")
"""Classes that do nothing with the tokens between their blocks."""
_CONTEXTS = ("clip_fea", "clip_fea_ref", "clip_fea_pose", "context_pose")


class Wan:
    name = "Wan"

    def matches(self, net) -> bool:
        return built_on(net, "WanModel", "wan")

    def heads(self, net) -> tuple[int, int]:
        return net.num_heads, net.dim // net.num_heads

    def blocks(self, net) -> Sequence:
        return net.blocks

    def layer(self, net, options: dict[str, Any], running: int | None) -> tuple[int | None, int]:
        return (options.get("block_index") if running is None else running), len(net.blocks)

    def stacks(self, net) -> Sequence[Stack] | str:
        net = unwrapped(net)
        if type(net).__name__ not in _SHARED:
            return f"{type(net).__name__} is {NOT_TRIED}"
        along = {"freqs": ("x", 1), "e": ("x", 1)}
        main = Stack(net.blocks, ("x",), along=along, per_frame={"e": 4}, until=net.head)
        if not hasattr(net, "vace_blocks"):
            return (main,)
        along = {name: ("c", 1) for name in ("freqs", "e", "x")}
        return main, Stack(net.vace_blocks, ("c",), along=along, per_frame={"e": 4}, until=net.head)

    def observe(self, net, latent_shape: tuple[int, ...], context, conds: dict[str, Any]) -> ModelCall:
        contexts = {length(x) for x in (context, *map(conds.get, _CONTEXTS))} - {0}
        thw, prefix, suffix = video_thw(latent_shape), 0, 0
        if thw is not None:
            thw, prefix, suffix = _variant(net)(net, thw, conds)
            suffix += _tokens(net, conds.get("time_dim_concat"))
        return ModelCall(thw, tuple(net.patch_size), frozenset(contexts | {sum(contexts)}), present(conds),
                         prefix, suffix)

    def locate(self, net, call: ModelCall, options: dict[str, Any], num_tokens: int,
               heads: tuple[int, int]) -> TokenGrid | str:
        place = call.place(num_tokens)
        if isinstance(place, str) and call.thw is not None:
            if built_on(net, "WanAnimate2Model", "wan") and num_tokens == math.prod(call.thw):
                return TokenGrid(call.thw)
            published = tuple(int(n) for n in options.get("grid_sizes", ()))
            if published and num_tokens == math.prod(published):     # a patch changed the clip on its way here
                return TokenGrid(published)
        return place


def _tokens(net, latent, padded: bool = True) -> int:
    """Tokens of one latent [B, C, (T,) H, W], 0 for None. padded: whether the host pads it to whole patches."""
    if latent is None:
        return 0
    thw = (1, 1, 1, *latent.shape[2:])[-3:]
    if not padded:
        return math.prod(cells // patch for cells, patch in zip(thw, net.patch_size, strict=True))
    return math.prod(token_grid(thw, net.patch_size))


Places = tuple[Thw, int, int]
"""Latent (t, h, w) of the clip itself, tokens before it, tokens after it."""


def _plain(net, thw: Thw, conds: dict[str, Any]) -> Places:
    has_reference = getattr(net, "ref_conv", None) is not None
    prefix = _tokens(net, conds.get("reference_latent"), padded=False) if has_reference else 0
    return thw, prefix, sum(_tokens(net, latent) for latent in conds.get("context_latents") or ())


def _s2v(net, thw: Thw, conds: dict[str, Any]) -> Places:
    suffix = _tokens(net, conds.get("reference_latent"), padded=False)
    motion, packer = conds.get("reference_motion"), net.frame_packer
    if motion is not None:
        for conv, frames in zip((packer.proj, packer.proj_2x, packer.proj_4x), packer.zip_frame_buckets, strict=True):
            cells = (frames, *motion.shape[3:])
            suffix += math.prod(n // stride for n, stride in zip(cells, conv.stride, strict=True))
    return thw, 0, suffix


def _humo(net, thw: Thw, conds: dict[str, Any]) -> Places:
    return thw, 0, _tokens(net, conds.get("reference_latent"), padded=False)


def _scail(net, thw: Thw, conds: dict[str, Any]) -> Places:
    return thw, _tokens(net, conds.get("reference_latent")), _tokens(net, conds.get("pose_latents"))


def _animate2(net, thw: Thw, conds: dict[str, Any]) -> Places:
    if thw[0] < 2:
        return thw, 0, 0
    return (thw[0] - 1, *thw[1:]), math.prod(token_grid((1, *thw[1:]), net.patch_size)), 0


_VARIANTS: tuple[tuple[str, Callable[..., Places]], ...] = (
    ("WanModel_S2V", _s2v), ("HumoWanModel", _humo), ("SCAILWanModel", _scail), ("WanAnimate2Model", _animate2))


def _variant(net) -> Callable[..., Places]:
    return next((places for name, places in _VARIANTS if built_on(net, name, "wan")), _plain)
