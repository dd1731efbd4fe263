"""Runs the lists of the video's query blocks on a kernel; all other queries attend to everything."""
from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import block_sparse_attention
from .layout import TileLayout


def attend_lists(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor, layout: TileLayout,
    scale: float, backend: str, far: Tensor | None = None, far_lse: Tensor | None = None,
) -> Tensor:
    """Attention in slot order, [B, S, H, D], where the video's query blocks read the blocks that their lists name.

    indices: int32 [B, H, Nq, K], counts: int32 [B, H, Nq], for the Nq blocks of video slots, as a kernel wants them.
    backend: the kernel, as in `kernels.block_sparse_attention`, whose errors these are.
    far, far_lse: what a query tile has seen besides its list, likewise (`far_field`).
    """
    query, key, value = readable(query, key, value)

    def attend(q, indices, counts, **start):
        return block_sparse_attention(q, key, value, indices, counts, layout.kernel_block_sizes,
                                      scale=scale, backend=backend, **start)

    start = dict(blocks_per_tile=layout.blocks_per_tile, far=far, far_lse=far_lse)

    others = layout.num_other_blocks
    if not others:
        return attend(query, indices, counts, **start)
    video = attend(query[:, :layout.num_video_slots], indices, counts, **start)
    every = dense_lists(query.shape[0], query.shape[2], others, layout)
    return torch.cat([video, attend(query[:, layout.num_video_slots:], *every)], dim=1)


def attend_lists_in_sequence(
    query: Tensor, key: Tensor, value: Tensor, indices: Tensor, counts: Tensor, layout: TileLayout,
    scale: float, backend: str, gate: Tensor | None = None, coarse: Tensor | None = None,
    far: Tensor | None = None, far_lse: Tensor | None = None,
) -> Tensor:
    """`attend_lists` on tensors in the order of the sequence, [B, tokens, H, D]: a kernel that can reads them there.

    gate [B, tokens, H, D] and coarse [B, H, N, D]: gate * coarse of the token's tile is added for the video's tokens.
    """
    if query.shape[1] != layout.total_seq_length:
        raise ValueError(f"attention: found a sequence of {query.shape[1]} tokens, wanted {layout.total_seq_length}")
    return block_sparse_attention(query, key, value, indices, counts, layout.kernel_block_sizes, scale=scale,
                                  backend=backend, token_rows=layout.token_rows, gate=gate, coarse=coarse,
                                  blocks_per_tile=layout.blocks_per_tile, tile_grid=layout.tile_grid,
                                  far=far, far_lse=far_lse)


def readable(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as every kernel reads them: one whose last dimension is not contiguous is copied, others are not."""
    return tuple(x if x is None or x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous() for x in tensors)


def dense_lists(batch: int, heads: int, rows: int, layout: TileLayout) -> tuple[Tensor, Tensor]:
    """Lists of `rows` query blocks that read every block: indices [batch, heads, rows, K] and counts, all views."""
    blocks, device = layout.kernel_block_sizes.shape[0], layout.kernel_block_sizes.device
    every = torch.arange(blocks, dtype=torch.int32, device=device)
    counts = torch.full((1, 1, 1), blocks, dtype=torch.int32, device=device)
    return every.expand(batch, heads, rows, blocks), counts.expand(batch, heads, rows)
