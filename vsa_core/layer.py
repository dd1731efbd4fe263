"""The attention layer that runs whichever backend was selected for it. Names: FastVideo, attention/layer.py."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from .forward_context import get_forward_context
from .rotary import apply_rotary_emb
from .selector import AttentionBackendEnum, backend_name_to_enum, get_attn_backend


class LocalAttention(nn.Module):
    """Attention on one device. The backend is chosen once, when the layer is made."""

    def __init__(
        self, num_heads: int, head_size: int, num_kv_heads: int | None = None, softmax_scale: float | None = None,
        causal: bool = False, supported_attention_backends: tuple[AttentionBackendEnum, ...] | None = None,
        **extra_impl_args,
    ) -> None:
        """extra_impl_args go to the backend's implementation: backend (the kernel), prefix, on_selection, ...

        `dtype` among them is the one to select for, torch's default dtype otherwise.
        Raises ValueError when no backend can be had (`selector.get_attn_backend`) or it refuses the arguments.
        """
        super().__init__()
        self.dtype = extra_impl_args.pop("dtype", None) or torch.get_default_dtype()
        self.softmax_scale = head_size ** -0.5 if softmax_scale is None else softmax_scale
        self.num_heads, self.head_size = num_heads, head_size
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.attn_backend = get_attn_backend(head_size, self.dtype, supported_attention_backends)
        self.backend = backend_name_to_enum(self.attn_backend.get_name())
        self.attn_impl = self.attn_backend.get_impl_cls()(
            num_heads=num_heads, head_size=head_size, softmax_scale=self.softmax_scale,
            num_kv_heads=self.num_kv_heads, causal=causal, **extra_impl_args)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, freqs_cis: tuple[Tensor, Tensor] | None = None,
        gate_compress: Tensor | None = None,
    ) -> Tensor:
        """Attention in sequence order with the metadata of `set_forward_context`.

        q, k, v, gate_compress: [B, S, H, D]; freqs_cis: cos and sin [S, D/2], for q and k -> [B, S, H, D].
        gate_compress weighs the coarse branch of a backend that has one.
        Raises ValueError for operands or metadata that are another backend's, RuntimeError outside of a context.
        """
        if not q.dim() == k.dim() == v.dim() == 4:
            raise ValueError(f"attention: found q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, "
                             "wanted [batch, sequence, heads, head_dim]")
        metadata = get_forward_context().attn_metadata
        wanted = self.attn_backend.get_metadata_cls()
        dense = self.backend is AttentionBackendEnum.TORCH_SDPA
        if not (isinstance(metadata, wanted) or dense and metadata is None):
            raise ValueError(f"attention backend {self.backend.name}: found {type(metadata).__name__}, "
                             f"wanted {wanted.__name__} in set_forward_context")
        if freqs_cis is not None:
            q, k = apply_rotary_emb(q, *freqs_cis), apply_rotary_emb(k, *freqs_cis)
        return self.attn_impl.attend(q, k, v, metadata, gate_compress)
