"""MiniMax H3 (comfy/ldm/minimax).

Grid: video latent / (1, 2, 2), rounded up; raster order. Heads: 56 x 128. Every block attends once over one packed
sequence: text, condition frames and references, audio (two tokens per audio latent frame), and last the clip. The
host runs each condition on its own, batch 1, and hands the hook plain tensors. Dense: the blocks that refine the text.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ...vsa_core.grid import TokenGrid
from .abstract import UNKNOWN_TOKENS, ModelCall, Stack, built_on, length, present, unwrapped, video_shape, video_thw


class MiniMaxH3:
    name = "MiniMax H3"

    def matches(self, net) -> bool:
        return built_on(net, "MiniMaxH3Model", "minimax")

    def heads(self, net) -> tuple[int, int]:
        attention = net.blocks[0].attn
        return attention.heads, attention.head_dim

    def blocks(self, net) -> Sequence:
        return net.blocks

    def layer(self, net, options: dict[str, Any], running: int | None) -> tuple[int | None, int]:
        return (options.get("block_index") if running is None else running), len(net.blocks)

    def stacks(self, net) -> Sequence[Stack] | str:
        along, ranges = {"rope_freqs": ("x", 1)}, {"mod_segments": "x"}
        return (Stack(unwrapped(net).blocks, ("x",), axis=0, along=along, ranges=ranges),)

    def observe(self, net, latent_shape: tuple[int, ...], context, conds: dict[str, Any]) -> ModelCall:
        shapes = conds.get("latent_shapes") or ()
        audio = 2 * shapes[1][-1] if len(shapes) > 1 else 0
        return ModelCall(video_thw(video_shape(latent_shape, conds)), tuple(net.patch_size),
                         frozenset(), present(conds), prefix=length(context) + audio)

    def locate(self, net, call: ModelCall, options: dict[str, Any], num_tokens: int,
               heads: tuple[int, int]) -> TokenGrid | str:
        place = call.place(num_tokens)
        if place == UNKNOWN_TOKENS and "minimax_payload" in call.conds:
            before = num_tokens - math.prod(call.thw)
            if before > call.prefix:       # condition frames and references: all of them lie before the clip
                return replace(call, prefix=before).place(num_tokens)
        return place
