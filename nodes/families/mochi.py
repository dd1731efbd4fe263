"""Mochi (comfy/ldm/genmo).

Grid: latent / (1, 2, 2), raster order. Heads: 24 x 128. Every block attends once over the clip and then the text,
cut to the tokens that the prompt has (`num_tokens`, counted by the host). The pooling of the text
does not reach the hook.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...vsa_core.grid import TokenGrid
from .abstract import NOT_TRIED, ModelCall, Stack, built_on, length, present, video_thw

_NUM_TOKENS = 256
"""What the host assumes when it is given no mask of the prompt."""


class Mochi:
    name = "Mochi"

    def matches(self, net) -> bool:
        return built_on(net, "AsymmDiTJoint", "genmo")

    def heads(self, net) -> tuple[int, int]:
        return net.num_heads, net.head_dim

    def blocks(self, net) -> Sequence:
        return net.blocks

    def layer(self, net, options: dict[str, Any], running: int | None) -> tuple[int | None, int]:
        return running, len(net.blocks)

    def stacks(self, net) -> Sequence[Stack] | str:
        return f"{self.name} is {NOT_TRIED}"

    def observe(self, net, latent_shape: tuple[int, ...], context, conds: dict[str, Any]) -> ModelCall:
        text = min(int(conds.get("num_tokens", _NUM_TOKENS)), length(context))
        return ModelCall(video_thw(latent_shape), (1, net.patch_size, net.patch_size), frozenset(), present(conds),
                         suffix=text)

    def locate(self, net, call: ModelCall, options: dict[str, Any], num_tokens: int,
               heads: tuple[int, int]) -> TokenGrid | str:
        return call.place(num_tokens)
