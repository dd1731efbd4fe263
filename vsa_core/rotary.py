"""Rotary position embedding on interleaved pairs (Su et al., arXiv 2104.09864), as FastVideo's layers apply it."""
from __future__ import annotations

import torch
from torch import Tensor


def apply_rotary_emb(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every pair (x[2i], x[2i+1]) turned by the angle of its place, computed in float32 or better.

    x: [B, S, H, D], cos and sin: [S, D/2] -> [B, S, H, D] in x's dtype. Raises ValueError for other shapes.
    """
    wanted = (x.shape[1], x.shape[3] // 2)
    if x.shape[3] % 2 or tuple(cos.shape) != wanted or tuple(sin.shape) != wanted:
        raise ValueError(f"rotary embedding: found x {list(x.shape)}, cos {list(cos.shape)}, sin {list(sin.shape)}; "
                         f"wanted an even head size and cos and sin of {list(wanted)}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (angle.to(dtype)[:, None] for angle in (cos, sin))           # [S, 1, D/2]
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1).flatten(-2).to(x.dtype)
