"""Dense attention, through torch's scaled_dot_product_attention. Names: FastVideo, attention/backends/sdpa.py."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .abstract import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder


@dataclass
class SDPAMetadata(AttentionMetadata):
    """Dense attention needs nothing besides q, k and v; attn_mask is torch's, over [B, H, Sq, Skv]."""

    attn_mask: Tensor | None = None


class SDPAMetadataBuilder(AttentionMetadataBuilder[SDPAMetadata]):
    def __init__(self) -> None:
        pass

    def prepare(self) -> None:
        pass

    def build(self, current_timestep: int = 0, attn_mask: Tensor | None = None, **kwargs) -> SDPAMetadata:
        self.refuse_unknown(kwargs, self.build)
        return SDPAMetadata(current_timestep=current_timestep, attn_mask=attn_mask)


class SDPAImpl(AttentionImpl[SDPAMetadata]):
    """Softmax attention over all keys; num_kv_heads may be any divisor of num_heads."""

    def __init__(
        self, num_heads: int, head_size: int, causal: bool = False, softmax_scale: float | None = None,
        num_kv_heads: int | None = None, prefix: str = "", **extra_impl_args,
    ) -> None:
        """Raises ValueError for key heads that cannot be shared out evenly."""
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"found {num_kv_heads} key heads for {num_heads} query heads: wanted a divisor")
        self.num_heads, self.num_kv_heads, self.head_size, self.causal = num_heads, num_kv_heads, head_size, causal
        self.softmax_scale = head_size ** -0.5 if softmax_scale is None else softmax_scale
        self.prefix = prefix

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: SDPAMetadata | None = None) -> Tensor:
        """[B, Sq, H, D], [B, Skv, H or num_kv_heads, D] twice -> [B, Sq, H, D]"""
        mask = None if attn_metadata is None else attn_metadata.attn_mask
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if query.shape[1] != key.shape[1]:      # torch does this itself from 2.5 on, asked with enable_gqa
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=self.causal and mask is None, scale=self.softmax_scale)
        return out.transpose(1, 2)


class SDPABackend(AttentionBackend):
    """Dense attention, for the selector."""

    @staticmethod
    def get_name() -> str:
        return "TORCH_SDPA"

    @staticmethod
    def get_impl_cls() -> type[SDPAImpl]:
        return SDPAImpl

    @staticmethod
    def get_metadata_cls() -> type[SDPAMetadata]:
        return SDPAMetadata

    @staticmethod
    def get_builder_cls() -> type[SDPAMetadataBuilder]:
        return SDPAMetadataBuilder
