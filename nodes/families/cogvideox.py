"""CogVideoX 1.0 and 1.5, text, image and inpainting (comfy/ldm/cogvideo).

Grid: latent / (1, 2, 2), in 1.5 (2, 2, 2), rounded up; raster order. Heads: 30 or 48 x 64. Every block attends once
over the text (226 tokens) and then the clip. Images come in as channels. Nothing else reaches
the hook.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...vsa_core.grid import TokenGrid
from .abstract import ModelCall, Stack, built_on, length, present, unwrapped, video_thw


class CogVideoX:
    name = "CogVideoX"

    def matches(self, net) -> bool:
        return built_on(net, "CogVideoXTransformer3DModel", "cogvideo")

    def heads(self, net) -> tuple[int, int]:
        return net.num_attention_heads, net.attention_head_dim

    def blocks(self, net) -> Sequence:
        return net.blocks

    def layer(self, net, options: dict[str, Any], running: int | None) -> tuple[int | None, int]:
        return running, len(net.blocks)

    def stacks(self, net) -> Sequence[Stack] | str:
        names = "encoder_hidden_states", "hidden_states"
        return (Stack(unwrapped(net).blocks, names, along={"image_rotary_emb": ("hidden_states", 0)},
                      returns=("hidden_states", "encoder_hidden_states")),)

    def observe(self, net, latent_shape: tuple[int, ...], context, conds: dict[str, Any]) -> ModelCall:
        return ModelCall(video_thw(latent_shape), (net.patch_size_t or 1, net.patch_size, net.patch_size),
                         frozenset(), present(conds), prefix=length(context))

    def locate(self, net, call: ModelCall, options: dict[str, Any], num_tokens: int,
               heads: tuple[int, int]) -> TokenGrid | str:
        return call.place(num_tokens)
