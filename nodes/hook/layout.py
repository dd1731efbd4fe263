"""ComfyUI's attention tensors as [B, S, H, D] and back, as views."""
from __future__ import annotations

from torch import Tensor


def to_bshd(x: Tensor, heads: int, skip_reshape: bool) -> Tensor:
    """[B, S, H*D], or with skip_reshape [B, H, S, D], as a [B, S, H, D] view."""
    return x.transpose(1, 2) if skip_reshape else x.unflatten(-1, (heads, -1))


def from_bshd(x: Tensor, skip_output_reshape: bool) -> Tensor:
    """[B, S, H, D] as [B, S, H*D], or with skip_output_reshape as [B, H, S, D]."""
    return x.transpose(1, 2) if skip_output_reshape else x.flatten(2)
