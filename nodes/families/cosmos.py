"""Cosmos 1 and Cosmos Predict2 (comfy/ldm/cosmos).

Grid: latent / (1, 2, 2), rounded up; raster order; no other tokens. Heads: 16, 32 or 40 x 128. Dense: cross-attention
to the text. A single image, which both can make, is one frame and stays dense.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...vsa_core.grid import TokenGrid
from .abstract import NOT_TRIED, ModelCall, Stack, built_on, length, present, video_thw


class Cosmos:
    name = "Cosmos"

    def matches(self, net) -> bool:
        return built_on(net, "GeneralDIT", "cosmos") or built_on(net, "MiniTrainDIT", "cosmos")

    def heads(self, net) -> tuple[int, int]:
        return net.num_heads, net.model_channels // net.num_heads

    def blocks(self, net) -> Sequence:
        return tuple(net.blocks.values() if hasattr(net.blocks, "values") else net.blocks)

    def layer(self, net, options: dict[str, Any], running: int | None) -> tuple[int | None, int]:
        return (options.get("block_index") if running is None else running), len(net.blocks)

    def stacks(self, net) -> Sequence[Stack] | str:
        return f"{self.name} is {NOT_TRIED}"

    def observe(self, net, latent_shape: tuple[int, ...], context, conds: dict[str, Any]) -> ModelCall:
        return ModelCall(video_thw(latent_shape), (net.patch_temporal, net.patch_spatial, net.patch_spatial),
                         frozenset({length(context)} - {0}), present(conds))

    def locate(self, net, call: ModelCall, options: dict[str, Any], num_tokens: int,
               heads: tuple[int, int]) -> TokenGrid | str:
        return call.place(num_tokens)
