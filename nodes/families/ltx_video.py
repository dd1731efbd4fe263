"""LTXV 0.9.x and the video stream of LTX-2 (comfy/ldm/lightricks).

Grid: the latent itself, patch (1, 1, 1), raster order. Heads: 32 x 64 (2B) or 32 x 128. Text goes through
cross-attention. Guide and keyframe frames are appended to the latent; they are no part of the clip in time and
become a suffix, of which the host may drop tokens. LTX-2 adds an audio stream with attention of its own.

Dense: cross-attention, the whole audio stream and what joins it with the video, told apart by its heads;
self-attention under guide masks (`guide strength` other than 1), which the host splits into calls with fewer queries
than keys. Where audio and video agree in head_dim and in length, both stay dense.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...vsa_core.grid import TokenGrid
from .abstract import (
    NOT_THE_CLIP,
    NOT_TRIED,
    ModelCall,
    Stack,
    built_on,
    length,
    present,
    unwrapped,
    video_shape,
    video_thw,
)


class LtxVideo:
    name = "LTX-Video"

    def matches(self, net) -> bool:
        return built_on(net, "LTXVModel", "lightricks")

    def heads(self, net) -> tuple[int, int]:
        return net.num_attention_heads, net.attention_head_dim

    def blocks(self, net) -> Sequence:
        return net.transformer_blocks

    def layer(self, net, options: dict[str, Any], running: int | None) -> tuple[int | None, int]:
        return running, len(net.transformer_blocks)

    def stacks(self, net) -> Sequence[Stack] | str:
        net = unwrapped(net)
        if type(net).__name__ != "LTXVModel":
            return f"{type(net).__name__}, whose blocks join video and audio, is {NOT_TRIED}"
        return (Stack(net.transformer_blocks, ("x",), along={"timestep": ("x", 1), "pe": ("x", 1)},
                      unknown={"self_attention_mask": "guides of another strength than 1"}),)

    def observe(self, net, latent_shape: tuple[int, ...], context, conds: dict[str, Any]) -> ModelCall:
        thw = video_thw(video_shape(latent_shape, conds))
        contexts, guides, whole = {length(context)}, 0, True
        if thw is not None and (keyframes := conds.get("keyframe_idxs")) is not None and keyframes.shape[2]:
            frames, rest = divmod(keyframes.shape[2], thw[1] * thw[2])
            if rest or frames >= thw[0]:
                thw = None
            else:
                thw, guides = (thw[0] - frames, *thw[1:]), keyframes.shape[2]
                whole = _is_whole(conds.get("denoise_mask"), thw[0])
        if getattr(net, "audio_attention_head_dim", None) == self.heads(net)[1] and thw is not None:
            contexts.add(_audio_tokens(conds))
        return ModelCall(thw, (1, 1, 1), frozenset(contexts - {0}), present(conds), 0, guides,
                         suffix_may_be_cut=whole)

    def locate(self, net, call: ModelCall, options: dict[str, Any], num_tokens: int,
               heads: tuple[int, int]) -> TokenGrid | str:
        number, head_dim = self.heads(net)
        clips = heads[1] == head_dim and heads[0] <= number      # some of the heads, where a neighbour splits a call
        return call.place(num_tokens) if clips else NOT_THE_CLIP


def _audio_tokens(conds: dict[str, Any]) -> int:
    """Tokens of the audio stream: latent frames, after those of a reference voice."""
    shapes = conds.get("latent_shapes") or ()
    reference = conds.get("ref_audio")
    return (shapes[1][2] if len(shapes) > 1 else 0) + (length(reference["tokens"]) if reference else 0)


def _is_whole(denoise_mask, frames: int) -> bool:
    """Whether the host drops no token of the clip itself. It drops those whose mask is negative.

    Reads the mask: which tokens of a clip with guides are left is in no shape. The host waits for the same mask.
    """
    if denoise_mask is None:
        return True
    return not bool((denoise_mask[:, :, :frames] < 0).any())
