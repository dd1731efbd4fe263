"""Kandinsky 5, lite and pro (comfy/ldm/kandinsky5).

Grid: latent / (1, 2, 2), rounded up; raster order; no other tokens. Heads: 28 x 64 (lite) or 32 x 128 (pro). Dense:
the self-attention blocks of the text encoder, which run first, and cross-attention to the text. A first frame to
start from replaces cells of the latent and adds no tokens.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...vsa_core.grid import TokenGrid
from .abstract import ModelCall, Stack, built_on, length, present, unwrapped, video_thw


class Kandinsky5:
    name = "Kandinsky 5"

    def matches(self, net) -> bool:
        return built_on(net, "Kandinsky5", "kandinsky5")

    def heads(self, net) -> tuple[int, int]:
        attention = net.visual_transformer_blocks[0].self_attention
        return attention.num_heads, attention.head_dim

    def blocks(self, net) -> Sequence:
        return net.visual_transformer_blocks

    def layer(self, net, options: dict[str, Any], running: int | None) -> tuple[int | None, int]:
        return (options.get("block_index") if running is None else running), len(net.visual_transformer_blocks)

    def stacks(self, net) -> Sequence[Stack] | str:
        along = {"freqs": ("visual_embed", 1)}
        return (Stack(unwrapped(net).visual_transformer_blocks, ("visual_embed",), along=along),)

    def observe(self, net, latent_shape: tuple[int, ...], context, conds: dict[str, Any]) -> ModelCall:
        return ModelCall(video_thw(latent_shape), tuple(net.patch_size), frozenset({length(context)} - {0}),
                         present(conds))

    def locate(self, net, call: ModelCall, options: dict[str, Any], num_tokens: int,
               heads: tuple[int, int]) -> TokenGrid | str:
        return call.place(num_tokens) if "block_type" in options else "text encoder"
