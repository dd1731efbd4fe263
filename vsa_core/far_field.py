"""What a query tile does not read still counts: every such tile enters its softmax as one key.

The key is the tile's mean key with the logarithm of its tokens added to the score, the value its mean value, the query
the query tile's mean. Without training, a weight for the mass that is left out is most of what a sparse softmax misses;
the same tail per query is Sol-Attn's (arXiv 2607.24027). For weights that were trained sparse it is another function.
"""
from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = 64 << 20
"""Bound on the tile-by-tile scores of the query tiles worked on at once, and what is made of them."""
_BYTES_PER_SCORE = 20


def far_field(
    means: tuple[Tensor, Tensor, Tensor], indices: Tensor, counts: Tensor, sizes: Tensor, scale: float,
    blocks_per_tile: int = 1,
) -> tuple[Tensor, Tensor]:
    """`far` and `far_lse` of `kernels.block_sparse_attention`, from the means of q, k and v.

    means: [B, H, N, D] each.   sizes: [N] valid tokens of every tile, at least 1.
    indices: int32 [B, H, N*m, K], counts: int32 [B, H, N*m], m = blocks_per_tile: the lists of the same call, whole
    tiles, the same for all blocks of a tile; blocks behind the last tile are no tile's.
    -> [B, H, N, D] and [B, H, N] in the dtype of the means; 0 and -inf where a list names every tile.
    """
    queries, keys, values = means
    batch, heads, tiles, _ = queries.shape
    far, lse = torch.empty_like(queries), torch.empty_like(queries[..., 0])
    listed, lengths = indices[:, :, ::blocks_per_tile, ::blocks_per_tile], counts[:, :, ::blocks_per_tile, None]
    place = torch.arange(0, indices.shape[3], blocks_per_tile, device=indices.device)
    mass, keys = sizes.to(queries.dtype).log(), keys.transpose(2, 3)
    step = max(1, _CHUNK_BYTES // max(1, batch * heads * tiles * _BYTES_PER_SCORE))
    for first in range(0, tiles, step):
        rows = slice(first, first + step)
        read = _listed_tiles(listed[:, :, rows], place < lengths[:, :, rows], tiles, blocks_per_tile)
        scores = torch.matmul(queries[:, :, rows] * scale, keys).add_(mass).masked_fill_(read, -torch.inf)
        peak = lse[:, :, rows] = torch.logsumexp(scores, -1)
        weights = scores.sub_(torch.where(peak == -torch.inf, 0, peak)[..., None]).exp_()
        far[:, :, rows] = torch.matmul(weights, values)
    return far, lse


def _listed_tiles(listed: Tensor, is_entry: Tensor, tiles: int, blocks_per_tile: int) -> Tensor:
    """Whether a list names a tile.   listed: [B, H, n, K] blocks;  is_entry: [B, H, n, K]  ->  bool [B, H, n, tiles]"""
    names = torch.div(listed, blocks_per_tile, rounding_mode="floor").long()
    names = torch.where(is_entry, names, tiles).clamp_(max=tiles)      # the column `tiles` collects what is no tile
    read = torch.zeros(*names.shape[:3], tiles + 1, dtype=torch.bool, device=names.device)
    return read.scatter_(-1, names, True)[..., :tiles]
