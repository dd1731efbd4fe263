"""Wan 2.1 and 2.2: T2V, I2V, FLF2V, TI2V-5B, VACE, Fun and the other models built on WanModel.

Self-attention holds the video tokens in raster order; Fun models with a reference image put its tokens, one
frame's worth, in front. Text and image conditions go through cross-attention.
"""
from __future__ import annotations

import math
from typing import Any

from ...vsa_core.grid import TokenGrid
from .abstract import ModelCall


class Wan:
    name = "Wan"

    def matches(self, net) -> bool:
        return any(cls.__name__ == "WanModel" and ".wan." in f".{cls.__module__}." for cls in type(net).__mro__)

    def heads(self, net) -> tuple[int, int]:
        return net.num_heads, net.dim // net.num_heads

    def layer(self, net, options: dict[str, Any], seen: int) -> tuple[int | None, int | None]:
        return options.get("block_index"), options.get("total_blocks", len(net.blocks))

    def observe(self, net, latent_shape: tuple[int, ...], context, conds: dict[str, Any]) -> ModelCall:
        contexts = {x.shape[1] for x in (context, conds.get("clip_fea")) if x is not None}
        return ModelCall(
            latent_thw=tuple(latent_shape[2:]) if len(latent_shape) == 5 else None,
            patch_size=tuple(net.patch_size),
            context_lengths=frozenset(contexts | {sum(contexts)}),
            conds=frozenset(name for name, value in conds.items() if value is not None))

    def locate(self, net, call: ModelCall, options: dict[str, Any], num_tokens: int) -> TokenGrid | str:
        thw = self._grid(call, options)
        if thw is None:
            return "latent is no video"
        others = num_tokens - math.prod(thw)
        if others == 0:
            return TokenGrid(thw)
        if others < 0:
            return "attention over something other than the clip"
        has_reference = getattr(net, "ref_conv", None) is not None and "reference_latent" in call.conds
        if has_reference and others == thw[1] * thw[2]:
            return TokenGrid(thw, prefix=others)
        return "tokens beside the clip whose place is not known"

    @staticmethod
    def _grid(call: ModelCall, options: dict[str, Any]):
        if "grid_sizes" in options:
            return tuple(int(n) for n in options["grid_sizes"])
        if call.latent_thw is None:
            return None
        return tuple(-(-n // p) for n, p in zip(call.latent_thw, call.patch_size, strict=True))
