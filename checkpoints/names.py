"""Tensor names: which naming a checkpoint uses, and ComfyUI's name for every one of them.

Wan comes in three namings, also mixed in one model: the original one, which ComfyUI reads ("native"), diffusers', and
FastVideo's (FastVideo configs/models/dits/wanvideo.py, param_names_mapping). The three do not collide.
"""
from __future__ import annotations

import re
from collections.abc import Iterable

WAN, MINIMAX_H3, OTHER = "Wan", "MiniMax H3", "other"
PREFIX = re.compile(r"^(?:model\.)?diffusion_model\.")
WRAPPER = "_checkpoint_wrapped_module."
"""What activation checkpointing in training leaves inside of names."""

# (diffusers or FastVideo, native); every rule applies at most once, in this order.
WAN_RULES = tuple((re.compile(pattern), replacement) for pattern, replacement in (
    (r"^patch_embedding\.proj\.", "patch_embedding."),
    (r"^condition_embedder\.time_embedder\.(?:linear_1|mlp\.fc_in)\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.(?:linear_2|mlp\.fc_out)\.", "time_embedding.2."),
    (r"^condition_embedder\.(?:time_proj|time_modulation\.linear)\.", "time_projection.1."),
    (r"^condition_embedder\.text_embedder\.(?:linear_1|fc_in)\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.(?:linear_2|fc_out)\.", "text_embedding.2."),
    (r"^condition_embedder\.image_embedder\.norm1\.", "img_emb.proj.0."),
    (r"^condition_embedder\.image_embedder\.ff\.(?:net\.0\.proj|fc_in)\.", "img_emb.proj.1."),
    (r"^condition_embedder\.image_embedder\.ff\.(?:net\.2|fc_out)\.", "img_emb.proj.3."),
    (r"^condition_embedder\.image_embedder\.norm2\.", "img_emb.proj.4."),
    (r"^condition_embedder\.image_embedder\.pos_embed$", "img_emb.emb_pos"),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation"),
    (r"^(blocks\.\d+)\.(?:attn1\.)?to_([qkv])\.", r"\1.self_attn.\2."),
    (r"^(blocks\.\d+)\.(?:attn1\.to_out\.0|attn1\.to_out|to_out\.0|to_out)\.", r"\1.self_attn.o."),
    (r"^(blocks\.\d+)\.(?:attn1\.)?norm_([qk])\.", r"\1.self_attn.norm_\2."),
    (r"^(blocks\.\d+)\.attn2\.to_([qkv])\.", r"\1.cross_attn.\2."),
    (r"^(blocks\.\d+)\.attn2\.to_out\.(?:0\.)?", r"\1.cross_attn.o."),
    (r"^(blocks\.\d+)\.attn2\.norm_([qk])\.", r"\1.cross_attn.norm_\2."),
    (r"^(blocks\.\d+)\.attn2\.add_([kv])_proj\.", r"\1.cross_attn.\2_img."),
    (r"^(blocks\.\d+)\.attn2\.norm_added_k\.", r"\1.cross_attn.norm_k_img."),
    (r"^(blocks\.\d+)\.(?:norm2|self_attn_residual_norm\.norm)\.", r"\1.norm3."),
    (r"^(blocks\.\d+)\.ffn\.(?:net\.0\.proj|fc_in)\.", r"\1.ffn.0."),
    (r"^(blocks\.\d+)\.ffn\.(?:net\.2|fc_out)\.", r"\1.ffn.2."),
))
DIFFUSERS_MARKS = re.compile(r"(?:^condition_embedder\.|\.attn[12]\.|^(?:transformer_)?blocks\.\d+\.to_[qkv]\.)")


def without_prefix(name: str) -> str:
    """The name without "model.diffusion_model." or "diffusion_model.", and without a checkpoint wrapper's part."""
    return PREFIX.sub("", name).replace(WRAPPER, "")


def family_of_names(names: Iterable[str]) -> str:
    """WAN, MINIMAX_H3 or OTHER, from names without prefix in any naming."""
    names = set(names)
    if {"head.modulation", "blocks.0.self_attn.q.weight"} <= names:
        return WAN
    if "scale_shift_table" in names and any(name.startswith("condition_embedder.") for name in names):
        return WAN
    if {"video_patch_proj.weight", "audio_patch_proj.weight"} <= names:
        return MINIMAX_H3
    return OTHER


def native_wan_name(name: str) -> str:
    """ComfyUI's name of a Wan tensor; a name that is native already stays."""
    for pattern, replacement in WAN_RULES:
        name, found = pattern.subn(replacement, name)
        if found:
            break
    return name


def naming_of(names: Iterable[str]) -> str:
    """ "native", "diffusers", or "mixed" when some names are FastVideo's or native beside diffusers'."""
    names = list(names)
    if not any(DIFFUSERS_MARKS.search(name) for name in names):
        return "native"
    others = (r"\.self_attn\.|\.cross_attn\.|\.fc_(?:in|out)\.|^blocks\.\d+\.to_(?:[qkv]|out)\."
              r"|self_attn_residual_norm|^blocks\.\d+\.norm_[qk]\.|time_modulation\.linear")
    return "mixed" if any(re.search(others, name) for name in names) else "diffusers"


def is_lora(names: Iterable[str]) -> bool:
    """Whether the names are those of a LoRA: every one a difference, a factor, or a scale of one."""
    parts = re.compile(r"\.(?:lora_[AB]|lora_up|lora_down|lora|diff|diff_b|set_weight|alpha|dora_scale|lokr_\w+|"
                       r"hada_\w+|oft_\w+|reshape_weight|rank|lora_rank|lora_alpha)(?:\.|$)")
    names = list(names)
    return bool(names) and sum(bool(parts.search(name)) for name in names) > 0.5 * len(names)
