"""Video Sparse Attention (VSA): every tile of queries attends to the k tiles whose means score highest.

Zhang et al., "VSA: Faster Video Diffusion with Trainable Sparse Attention", arXiv 2505.13389; names, signatures
and rules: FastVideo attention/backends/video_sparse_attn.py at 2f3d4074. Wider than upstream: any tile whose
volume is a multiple of 64 or at most 64, and tokens that are not video before and after the grid.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ...kernels import select_tiles, tile_means
from ..far_field import far_field
from ..grid import Thw, TokenGrid
from ..layout import (
    TileLayout,
    construct_variable_block_sizes,
    get_non_pad_index,
    get_reverse_tile_partition_indices,
    get_tile_partition_indices,
    to_sequence,
    to_slots,
)
from ..lowering import attend_lists, attend_lists_in_sequence, dense_lists
from ..mass_lists import KeptTiles
from ..selection import HeadGroups, block_means, tile_lists_to_blocks
from .abstract import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder

__all__ = ["VSA_TILE_SIZE", "VideoSparseAttentionBackend", "VideoSparseAttentionImpl", "VideoSparseAttentionMetadata",
           "VideoSparseAttentionMetadataBuilder", "compute_topk", "construct_variable_block_sizes",
           "get_non_pad_index", "get_reverse_tile_partition_indices", "get_tile_partition_indices"]

VSA_TILE_SIZE: Thw = (4, 4, 4)
"""The tile that every released VSA checkpoint was trained with."""


def compute_topk(sparsity: float, num_blocks: int) -> int:
    """Tiles that a query tile keeps: ceil((1 - sparsity) * num_blocks), at least 1 and at most all.

    Computed on the decimal that was written: (1 - 0.95) * 1200 is 60, where float arithmetic overshoots to 61.
    The count is over tiles (FastVideo since its pull request 1517), not over unpadded tokens as before.
    """
    kept = math.ceil((1 - Fraction(str(sparsity))) * num_blocks)
    return max(1, min(kept, num_blocks))


@dataclass
class VideoSparseAttentionMetadata(TileLayout, AttentionMetadata):
    """One token grid cut into tiles, and how many of them a query tile keeps."""

    VSA_sparsity: float

    @property
    def topk(self) -> int:
        """Tiles that every query tile keeps."""
        return compute_topk(self.VSA_sparsity, math.prod(self.num_tiles))


class VideoSparseAttentionMetadataBuilder(AttentionMetadataBuilder[VideoSparseAttentionMetadata]):
    """Builds the index tensors of one grid."""

    def __init__(self) -> None:
        pass

    def prepare(self) -> None:
        pass

    def build(  # type: ignore[override]
        self, current_timestep: int, raw_latent_shape: Thw, patch_size: Thw, VSA_sparsity: float,
        device: torch.device, tile_size: Thw = VSA_TILE_SIZE, prefix: int = 0, suffix: int = 0,
        cache_tile_buf: bool = True, hidden: tuple[int, ...] = (), **kwargs,
    ) -> VideoSparseAttentionMetadata:
        """Metadata for a latent of raw_latent_shape (t, h, w) cells, cut by patch_size into tokens, floor.

        tile_size: any whose volume is a multiple of 64 or at most 64.
        prefix, suffix, hidden: the tokens that are not video, as in `TokenGrid`.
        Raises ValueError for a sparsity outside 0 <= s < 1 and for a tile or grid that is none, TypeError for a
        keyword that no builder has.
        """
        self.refuse_unknown(kwargs, self.build)
        if not 0.0 <= VSA_sparsity < 1.0:
            raise ValueError(f"sparsity {VSA_sparsity}: wanted at least 0 and below 1")
        shape = tuple(latent // patch for latent, patch in zip(raw_latent_shape, patch_size, strict=True))
        return VideoSparseAttentionMetadata.of_grid(
            TokenGrid(shape, prefix, suffix, hidden), tile_size, device, current_timestep=current_timestep,
            VSA_sparsity=VSA_sparsity, cache_tile_buf=cache_tile_buf)


class VideoSparseAttentionImpl(AttentionImpl[VideoSparseAttentionMetadata]):
    """VSA on tiled tensors [B, S, H, D]."""

    def __init__(
        self, num_heads: int, head_size: int, causal: bool = False, softmax_scale: float | None = None,
        num_kv_heads: int | None = None, prefix: str = "", backend: str = "auto",
        on_selection: Callable[[Tensor, VideoSparseAttentionMetadata], None] | None = None, far_field: bool = False,
        **extra_impl_args,
    ) -> None:
        """backend: the kernel, as in `kernels.block_sparse_attention`.

        on_selection is called with the kept tiles, int32 [B, H, N, k], of every forward pass; -1 is none.
        far_field: tiles that are not kept count as one key each (`far_field.py`); for weights not trained sparse.
        Raises ValueError for causal attention and for fewer key heads than query heads: VSA has neither.
        """
        if causal:
            raise ValueError("video sparse attention is not causal: found causal=True, wanted False")
        if num_kv_heads not in (None, num_heads):
            raise ValueError(f"found {num_kv_heads} key heads for {num_heads} query heads: wanted as many")
        self.num_heads, self.head_size, self.prefix = num_heads, head_size, prefix
        self.softmax_scale = head_size ** -0.5 if softmax_scale is None else softmax_scale
        self.backend, self.on_selection, self.far_field = backend, on_selection, far_field
        self.kept: KeptTiles | None = None
        """Read these in place of the k tiles that score highest; `on_selection` is not called then."""
        self.kept_by_head: tuple[int, ...] | None = None
        """k of every head, in place of the metadata's one k for all."""
        self._groups: dict[tuple, HeadGroups] = {}

    def tile(self, x: Tensor, attn_metadata: VideoSparseAttentionMetadata) -> Tensor:
        """Tokens in slot order, padding slots zero.   x: [B, total_seq_length, H, D] -> [B, S, H, D]

        The result is attn_metadata.tile_buf and valid until the next tile() on the same metadata, unless
        attn_metadata.cache_tile_buf is False.
        """
        return self.tile_parts((x,), attn_metadata)

    def tile_parts(self, parts: tuple[Tensor, ...], attn_metadata: VideoSparseAttentionMetadata) -> Tensor:
        """`tile` of the parts stacked on the batch axis, without the stacked copy. Same aliasing contract."""
        return to_slots(parts, attn_metadata)

    def untile(self, x: Tensor, attn_metadata: VideoSparseAttentionMetadata) -> Tensor:
        """Tokens back in sequence order, padding dropped.   x: [B, S, H, D] -> [B, total_seq_length, H, D]"""
        return to_sequence(x, attn_metadata)

    def preprocess_qkv(self, qkv: Tensor, attn_metadata: VideoSparseAttentionMetadata) -> Tensor:
        """Tile q, k, v (and gate) stacked on the batch axis. Aliasing contract: `tile`."""
        return self.tile(qkv, attn_metadata)

    def postprocess_output(self, output: Tensor, attn_metadata: VideoSparseAttentionMetadata) -> Tensor:
        """Undo `preprocess_qkv`."""
        return self.untile(output, attn_metadata)

    def select(self, query: Tensor, key: Tensor, attn_metadata: VideoSparseAttentionMetadata) -> Tensor:
        """Tiles that every query tile keeps, ascending.   tiled q, k [B, S, H, D] -> int32 [B, H, N, k]"""
        return self._select(query, self._means((query, key), attn_metadata), attn_metadata)

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, gate_compress: Tensor | None,
        attn_metadata: VideoSparseAttentionMetadata,
    ) -> Tensor:
        """coarse * gate_compress + fine, on tiled tensors.

        query, key, value, gate_compress: [B, S, H, D], padding slots zero -> [B, S, H, D].
        fine: softmax over the valid tokens of the kept tiles and all tokens that are not video, whose own
        queries attend to everything. coarse: softmax over the tile means, one row per query tile. A gate of
        None counts as 0, so that sparsity 0 is dense attention. With far_field, fine has one key of each other tile.
        Raises ValueError for operands that do not fit the metadata, NoKernel when no kernel can run them.
        """
        md = attn_metadata
        if query.shape[1] != md.padded_seq_length:
            raise ValueError(f"forward: found {query.shape[1]} slots, wanted {md.padded_seq_length} "
                             "(the output of preprocess_qkv with this metadata)")
        if gate_compress is not None and gate_compress.shape != query.shape:
            raise ValueError(f"forward: found gate_compress {list(gate_compress.shape)}, wanted {list(query.shape)}")
        means = self._means((query, key, value), md, gate_compress is not None)
        lists = self._told(query, self._slot_lists(query, means, md), md)
        output = attend_lists(query, key, value, *lists, md, self.softmax_scale, self.backend,
                              *self._far(means, lists, md))
        if gate_compress is not None:
            self._add_coarse(output, means, gate_compress, md)
        return output

    def attend_readable(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: VideoSparseAttentionMetadata,
                        gate_compress: Tensor | None = None) -> Tensor:
        """What preprocess_qkv, forward and postprocess_output compute.   [B, total_seq_length, H, D] -> the same

        Without tiled copies where the kernel gathers tokens: beside the result, memory for the tile means, the
        scores of some heads and the lists. Errors: as in `forward`.
        """
        md = attn_metadata
        parts = (query, key, value) if gate_compress is None else (query, key, value, gate_compress)
        if any(x.shape != (query.shape[0], md.total_seq_length, *query.shape[2:]) for x in parts):
            raise ValueError(f"attend: found {[list(x.shape) for x in parts]}, "
                             f"wanted one shape with {md.total_seq_length} tokens")
        gate = parts[3:]
        tiles, topk = md.variable_block_sizes.shape[0], md.topk
        means = ()
        if gate or not self._reads_all(md) and (self.far_field or self.kept is None):
            means = tile_means((query, key, value)[:3 if gate or self.far_field else 2], md.token_rows, tiles,
                               md.blocks_per_tile, self.backend)
        lists = self._told(query, self._lists(query, means, tiles, topk, md), md)
        coarse = torch.nn.functional.scaled_dot_product_attention(*means, scale=self.softmax_scale) if gate else None
        return attend_lists_in_sequence(query, key, value, *lists, md, self.softmax_scale, self.backend,
                                        gate[0] if gate else None, coarse, *self._far(means, lists, md))

    def _reads_all(self, md) -> bool:
        return self.kept is None and self.kept_by_head is None and md.topk == md.variable_block_sizes.shape[0]

    def _far(self, means, lists, md) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Of what the lists leave out, as `kernels.block_sparse_attention` wants it."""
        if not self.far_field or self._reads_all(md):
            return None, None
        return far_field(means, *lists, md.variable_block_sizes, self.softmax_scale, md.blocks_per_tile)

    def _lists(self, query, means, tiles, topk, md) -> tuple[Tensor, Tensor]:
        """indices and counts of the video's query blocks, as a kernel wants them, from the means of q and k."""
        if self.kept is not None:
            return self.kept.lists(md)
        batch, _, heads, _ = query.shape
        per_tile = md.blocks_per_tile
        if self.kept_by_head is not None:
            return self._by_head(means, md)
        if topk == tiles:
            if self.on_selection is not None:
                self.on_selection(self._every_tile(query, tiles), md)
            return dense_lists(batch, heads, tiles * per_tile, md)
        indices = select_tiles(*means[:2], topk, self.softmax_scale, per_tile, md.num_other_blocks, self.backend)
        if self.on_selection is not None:
            self.on_selection(indices[:, :, ::per_tile, :topk * per_tile:per_tile] // per_tile, md)
        counts = torch.full((1, 1, 1), indices.shape[3], dtype=torch.int32, device=indices.device)
        return indices, counts.expand(indices.shape[:3])

    def _slot_lists(self, query, means, md) -> tuple[Tensor, Tensor]:
        """`_lists` for tensors in slots."""
        if self.kept is not None:
            return self.kept.lists(md)
        if self.kept_by_head is not None:
            return self._by_head(means, md)
        tiles = self._select(query, means, md)
        if self.on_selection is not None:
            self.on_selection(tiles, md)
        return tile_lists_to_blocks(tiles, md.blocks_per_tile, tiles.shape[2], md.num_other_blocks)

    def _by_head(self, means, md) -> tuple[Tensor, Tensor]:
        kept, device = self.kept_by_head, means[0].device
        if len(kept) != means[0].shape[1]:
            raise ValueError(f"tiles kept by {len(kept)} heads: found {means[0].shape[1]} heads, wanted as many")
        if (kept, device) not in self._groups:
            self._groups[kept, device] = HeadGroups(kept, device)
        groups, per_tile = self._groups[kept, device], md.blocks_per_tile
        lists = groups.lists(*means[:2], self.softmax_scale, per_tile, md.num_other_blocks, self.backend)
        if self.on_selection is not None:
            self.on_selection(groups.tiles(lists[0], per_tile), md)
        return lists

    def _told(self, query, lists: tuple[Tensor, Tensor], md) -> tuple[Tensor, Tensor]:
        if self.on_lists is not None:
            self.on_lists(slice(0, query.shape[2]), *lists, md)
        return lists

    @staticmethod
    def _every_tile(query, tiles) -> Tensor:
        every = torch.arange(tiles, dtype=torch.int32, device=query.device)
        return every.expand(query.shape[0], query.shape[2], tiles, tiles)

    def _select(self, query, means, md) -> Tensor:
        tiles = md.variable_block_sizes.shape[0]
        if md.topk == tiles:
            return self._every_tile(query, tiles)
        return select_tiles(*means[:2], md.topk, self.softmax_scale, backend=self.backend)

    def _means(self, parts, md, coarse: bool = False) -> tuple[Tensor, ...]:
        """The tile means that `forward` needs, of q and k or of all three, from tensors in slots."""
        if self._reads_all(md) and not coarse:
            return ()
        return tuple(block_means(x[:, :md.num_video_slots], md.variable_block_sizes, md.slots_per_tile)
                     for x in parts[:3 if coarse or self.far_field else 2])

    def _add_coarse(self, output, means, gate, md) -> None:
        coarse = torch.nn.functional.scaled_dot_product_attention(*means, scale=self.softmax_scale)
        per_tile = (-1, md.slots_per_tile)
        rows = output[:, :md.num_video_slots].unflatten(1, per_tile)      # [B, N, slots, H, D]
        rows.addcmul_(coarse.transpose(1, 2)[:, :, None].to(output.dtype),
                      gate[:, :md.num_video_slots].unflatten(1, per_tile))


class VideoSparseAttentionBackend(AttentionBackend):
    """VSA, for the selector and the tables."""

    accept_output_buffer: bool = True

    @staticmethod
    def get_name() -> str:
        return "VIDEO_SPARSE_ATTN"

    @staticmethod
    def get_impl_cls() -> type[VideoSparseAttentionImpl]:
        return VideoSparseAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[VideoSparseAttentionMetadata]:
        return VideoSparseAttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[VideoSparseAttentionMetadataBuilder]:
        return VideoSparseAttentionMetadataBuilder
