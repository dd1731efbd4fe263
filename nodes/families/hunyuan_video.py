"""HunyuanVideo, HunyuanVideo 1.5 and the models built on them (comfy/ldm/hunyuan_video).

Grid: latent / patch, (1, 2, 2) and in 1.5 (1, 1, 1); raster order. Heads: num_heads x 128. The sequence in double
and single blocks: text, reference image tokens (`ref_latent`), clip. The text is, in 1.5, the image tokens of the
vision encoder, the glyph tokens (ByT5), then the prompt; an image to start from comes in as channels and adds
none. Layer: the double blocks, then the single blocks, whose `block_index` starts again at 0. Text tokens that
the prompt's mask hides stay hidden. Dense: the two self-attention blocks that refine the text.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...vsa_core.grid import TokenGrid
from .abstract import UNKNOWN_TOKENS, ModelCall, Stack, built_on, length, present, token_grid, unwrapped, video_thw


class HunyuanVideo:
    name = "HunyuanVideo"

    def matches(self, net) -> bool:
        return built_on(net, "HunyuanVideo", "hunyuan_video")

    def heads(self, net) -> tuple[int, int]:
        return net.num_heads, net.hidden_size // net.num_heads

    def blocks(self, net) -> Sequence:
        return (*net.double_blocks, *net.single_blocks)

    def layer(self, net, options: dict[str, Any], running: int | None) -> tuple[int | None, int]:
        doubles = len(net.double_blocks)
        if running is None and (running := options.get("block_index")) is not None:
            running += doubles * (options.get("block_type") == "single")
        return running, doubles + len(net.single_blocks)

    def stacks(self, net) -> Sequence[Stack] | str:
        net = unwrapped(net)
        double = Stack(net.double_blocks, ("txt", "img"), along={"pe": (None, 2)}, returns=("img", "txt"),
                       ranges={"modulation_dims_img": "img", "modulation_dims_txt": "txt"})
        return double, Stack(net.single_blocks, ("x",), along={"pe": ("x", 2)}, ranges={"modulation_dims": "x"})

    def observe(self, net, latent_shape: tuple[int, ...], context, conds: dict[str, Any]) -> ModelCall:
        patch = tuple(net.patch_size)
        glyphs = conds.get("txt_byt5") if net.byt5_in is not None else None
        prefix = length(context) + length(glyphs) + length(conds.get("clip_fea"))
        reference = conds.get("ref_latent")
        if reference is not None:
            prefix += math.prod(token_grid(reference.shape[2:], patch))
        return ModelCall(video_thw(latent_shape), patch, frozenset(), present(conds), prefix)

    def locate(self, net, call: ModelCall, options: dict[str, Any], num_tokens: int,
               heads: tuple[int, int]) -> TokenGrid | str:
        if "block_type" not in options:
            return "text refiner"
        return call.place(num_tokens) if _text_comes_first(net, call, options, num_tokens) else UNKNOWN_TOKENS


def _text_comes_first(net, call: ModelCall, options: dict[str, Any], num_tokens: int) -> bool:
    """Whether nothing that the host shows of its order contradicts it.

    Double blocks of ComfyUI before 0.14, and of models made after them, say that they put the clip first. Single
    blocks are told where the clip and its reference image lie.
    """
    if any(getattr(block, "flipped_img_txt", False) for block in net.double_blocks):
        return False
    first, last = options.get("img_slice") or (call.prefix, num_tokens)
    return last == num_tokens and (first == call.prefix or "ref_latent" in call.conds and first < call.prefix)
