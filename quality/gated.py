"""Video Sparse Attention as it is trained, with gradients, for the tiny model: plain torch, one grid, one tile size.

Independent of the pack's own attention; a test holds the two against each other.
"""
from __future__ import annotations

import math

from torch import nn
from torch.nn.functional import scaled_dot_product_attention as softmax_attention

TILE = (4, 4, 4)             # tokens
SPARSITY = 0.9


def tiles_of(x, grid):
    """[B, tokens, H, D] -> [B, H, tiles, tile, D] of a grid that TILE divides."""
    (t, h, w), (a, b, c) = grid, TILE
    x = x.unflatten(1, (t // a, a, h // b, b, w // c, c)).permute(0, 7, 1, 3, 5, 2, 4, 6, 8)
    return x.flatten(5, 7).flatten(2, 4)


def tokens_of(x, grid):
    """What `tiles_of` undoes."""
    (t, h, w), (a, b, c) = grid, TILE
    x = x.unflatten(2, (t // a, h // b, w // c)).unflatten(5, (a, b, c))            # [B, H, T, H, W, a, b, c, D]
    return x.permute(0, 2, 5, 3, 6, 4, 7, 1, 8).flatten(1, 6)


def attend(q, k, v, gate, grid, sparsity=SPARSITY):
    """fine + gate * coarse.   [B, tokens, H, D] -> the same"""
    q, k, v = (tiles_of(x, grid) for x in (q, k, v))
    means = [x.mean(3) for x in (q, k, v)]                                          # [B, H, tiles, D]
    scores = means[0] @ means[1].transpose(2, 3)
    kept = math.ceil(round((1 - sparsity) * scores.shape[-1], 6))
    chosen = scores.detach().topk(kept, sorted=False).indices.sort().values         # [B, H, tiles, kept]

    def gathered(x):
        index = chosen.flatten(2)[..., None, None].expand(-1, -1, -1, *x.shape[3:])
        return x.gather(2, index).unflatten(2, chosen.shape[2:]).flatten(3, 4)

    fine = softmax_attention(q, gathered(k), gathered(v))
    coarse = softmax_attention(*means)[:, :, :, None].expand_as(fine)
    return tokens_of(fine, grid) + gate * tokens_of(coarse, grid)


class Gates:
    """Trainable gates in a ComfyUI Wan model, and what its self-attention computes with them.

    After `Gates(model)` every block has a `to_gate_compress`, zero, and `attention` is to stand in for ComfyUI's.
    `grid` is that of the tokens of the next forward pass."""

    def __init__(self, model):
        self.grid, self.gate = None, None
        for block in model.blocks:
            block.to_gate_compress = nn.Linear(model.dim, model.dim)
            nn.init.zeros_(block.to_gate_compress.weight)
            nn.init.zeros_(block.to_gate_compress.bias)
            block.self_attn.register_forward_pre_hook(self._computes(block), with_kwargs=True)

    def _computes(self, block):
        def before(_, args, kwargs):
            self.gate = block.to_gate_compress(args[0] if args else kwargs["x"])
        return before

    def attention(self, q, k, v, heads, mask=None, **_):
        q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
        if self.gate is None:                          # cross-attention
            return softmax_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)
        gate, self.gate = self.gate.unflatten(-1, (heads, -1)), None
        return attend(q, k, v, gate, self.grid).flatten(2)


def grid_of(latent):
    """Tokens of a latent [B, 16, T, H, W] at Wan's patch (1, 2, 2)."""
    t, h, w = latent.shape[2:]
    return t, h // 2, w // 2
