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

from ...kernels import block_sparse_attention
from ..grid import Thw, TokenGrid
from ..selection import block_means, select_top_tiles, tile_lists_to_blocks
from ..tiling import BLOCK, num_tiles, tile_slots
from .abstract import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder

VSA_TILE_SIZE: Thw = (4, 4, 4)
"""The tile that every released VSA checkpoint was trained with."""


def get_tile_partition_indices(dit_seq_shape: Thw, tile_size: Thw, device: torch.device) -> Tensor:
    """Raster index of every token, in tile order: tiles by (t, h, w), raster order inside each. int64 [t*h*w]"""
    raster = torch.arange(math.prod(dit_seq_shape), device=device).view(*dit_seq_shape)
    tile_of, place = [], []
    for axis, (length, side) in enumerate(zip(dit_seq_shape, tile_size, strict=True)):
        coordinate = torch.arange(length, device=device).view([-1 if a == axis else 1 for a in range(3)])
        tile_of.append(coordinate // side)
        place.append(coordinate % side)
    counts = num_tiles(dit_seq_shape, tile_size)
    tile = (tile_of[0] * counts[1] + tile_of[1]) * counts[2] + tile_of[2]
    inner = (place[0] * tile_size[1] + place[1]) * tile_size[2] + place[2]
    return raster.flatten()[(tile * math.prod(tile_size) + inner).flatten().argsort()]


def get_reverse_tile_partition_indices(dit_seq_shape: Thw, tile_size: Thw, device: torch.device) -> Tensor:
    """Place in tile order of every token in raster order. int64 [t*h*w]"""
    return torch.argsort(get_tile_partition_indices(dit_seq_shape, tile_size, device))


def construct_variable_block_sizes(
    dit_seq_shape: Thw, num_tiles: Thw, device: torch.device, tile_size: Thw = VSA_TILE_SIZE,
) -> Tensor:
    """Tokens in every tile; only the last tile along an axis may be short. int32 [prod(num_tiles)]"""
    per_axis = []
    for length, count, side in zip(dit_seq_shape, num_tiles, tile_size, strict=True):
        sizes = torch.full((count,), side, dtype=torch.int32, device=device)
        sizes[-1] = length - (count - 1) * side
        per_axis.append(sizes)
    t, h, w = per_axis
    return (t[:, None, None] * h[None, :, None] * w[None, None, :]).flatten()


def get_non_pad_index(variable_block_sizes: Tensor, max_block_size: int) -> Tensor:
    """Slots that hold a token, ascending: the first `size` of every run of `max_block_size` slots. int64"""
    slot = torch.arange(max_block_size, device=variable_block_sizes.device)
    return (slot < variable_block_sizes[:, None]).flatten().nonzero().flatten()


def compute_topk(sparsity: float, num_blocks: int) -> int:
    """Tiles that a query tile keeps: ceil((1 - sparsity) * num_blocks), at least 1 and at most all.

    Computed on the decimal that was written: (1 - 0.95) * 1200 is 60, where float arithmetic overshoots to 61.
    The count is over tiles (FastVideo since its pull request 1517), not over unpadded tokens as before.
    """
    kept = math.ceil((1 - Fraction(str(sparsity))) * num_blocks)
    return max(1, min(kept, num_blocks))


@dataclass
class VideoSparseAttentionMetadata(AttentionMetadata):
    """One token grid cut into tiles. N = prod(num_tiles); S = padded_seq_length slots."""

    dit_seq_shape: list[int]
    VSA_sparsity: float
    num_tiles: list[int]
    total_seq_length: int
    """Tokens in the sequence, those that are not video included."""
    tile_partition_indices: Tensor
    """int64 [total_seq_length], sequence index of every token in slot order."""
    reverse_tile_partition_indices: Tensor
    """int64 [total_seq_length], its inverse."""
    variable_block_sizes: Tensor
    """int32 [N], tokens in every tile."""
    non_pad_index: Tensor
    """int64 [total_seq_length], slots that hold a token, ascending."""
    tile_size: Thw
    grid: TokenGrid
    untile_combined_index: Tensor
    """int64 [total_seq_length], slot of every token in sequence order: one gather removes padding and order."""
    kernel_block_sizes: Tensor
    """int32 [S/64], tokens in every block of 64 slots."""
    cache_tile_buf: bool = True
    """Whether tile() reuses one buffer. Off where several results of tile() must live at once."""
    tile_buf: Tensor | None = None

    @property
    def slots_per_tile(self) -> int:
        return tile_slots(self.tile_size)

    @property
    def num_video_slots(self) -> int:
        return math.prod(self.num_tiles) * self.slots_per_tile

    @property
    def padded_seq_length(self) -> int:
        return self.kernel_block_sizes.shape[0] * BLOCK

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
        cache_tile_buf: bool = True, **kwargs,
    ) -> VideoSparseAttentionMetadata:
        """Metadata for a latent of raw_latent_shape (t, h, w) cells, cut by patch_size into tokens, floor.

        tile_size: any whose volume is a multiple of 64 or at most 64.   prefix, suffix: tokens that are not video.
        Raises ValueError for a sparsity outside 0 <= s < 1 and for a tile or grid that is none.
        """
        if not 0.0 <= VSA_sparsity < 1.0:
            raise ValueError(f"sparsity {VSA_sparsity}: wanted at least 0 and below 1")
        volume = math.prod(tile_size)
        if len(tile_size) != 3 or min(tile_size) < 1 or (volume > BLOCK and volume % BLOCK):
            raise ValueError(f"tile {'x'.join(map(str, tile_size))} holds {volume} tokens: "
                             f"wanted at most {BLOCK} or a multiple of {BLOCK}")
        shape = tuple(latent // patch for latent, patch in zip(raw_latent_shape, patch_size, strict=True))
        grid = TokenGrid(shape, prefix, suffix)
        device = torch.device(device)
        tiles = num_tiles(shape, tile_size)
        slots = tile_slots(tile_size)
        sizes = construct_variable_block_sizes(shape, tiles, device, tile_size)
        per_block = [(sizes - first).clamp(0, BLOCK) for first in range(0, slots, BLOCK)]
        block_sizes = torch.stack(per_block, dim=1).flatten()
        partition = get_tile_partition_indices(shape, tile_size, device) + prefix
        non_pad = get_non_pad_index(sizes, slots)
        if others := grid.num_other_tokens:
            last_video = prefix + grid.num_video_tokens
            partition = torch.cat([partition, torch.arange(prefix, device=device),
                                   torch.arange(last_video, grid.num_tokens, device=device)])
            first_slot = math.prod(tiles) * slots
            non_pad = torch.cat([non_pad, torch.arange(first_slot, first_slot + others, device=device)])
            extra = [min(BLOCK, others - first) for first in range(0, others, BLOCK)]
            block_sizes = torch.cat([block_sizes, torch.tensor(extra, dtype=torch.int32, device=device)])
        reverse = torch.argsort(partition)
        return VideoSparseAttentionMetadata(
            current_timestep=current_timestep, dit_seq_shape=list(shape), VSA_sparsity=VSA_sparsity,
            num_tiles=list(tiles), total_seq_length=grid.num_tokens, tile_partition_indices=partition,
            reverse_tile_partition_indices=reverse, variable_block_sizes=sizes, non_pad_index=non_pad,
            tile_size=tuple(tile_size), grid=grid, untile_combined_index=non_pad[reverse],
            kernel_block_sizes=block_sizes, cache_tile_buf=cache_tile_buf)


class VideoSparseAttentionImpl(AttentionImpl[VideoSparseAttentionMetadata]):
    """VSA on tiled tensors [B, S, H, D]."""

    def __init__(
        self, num_heads: int, head_size: int, causal: bool = False, softmax_scale: float | None = None,
        num_kv_heads: int | None = None, prefix: str = "", backend: str = "auto",
        on_selection: Callable[[Tensor, VideoSparseAttentionMetadata], None] | None = None, **extra_impl_args,
    ) -> None:
        """backend: the kernel, as in `kernels.block_sparse_attention`.

        on_selection is called with the kept tiles, int32 [B, H, N, k], of every forward pass.
        Raises ValueError for causal attention and for fewer key heads than query heads: VSA has neither.
        """
        if causal:
            raise ValueError("video sparse attention is not causal: found causal=True, wanted False")
        if num_kv_heads not in (None, num_heads):
            raise ValueError(f"found {num_kv_heads} key heads for {num_heads} query heads: wanted as many")
        self.num_heads, self.head_size, self.prefix = num_heads, head_size, prefix
        self.softmax_scale = head_size ** -0.5 if softmax_scale is None else softmax_scale
        self.backend, self.on_selection = backend, on_selection

    def tile(self, x: Tensor, attn_metadata: VideoSparseAttentionMetadata) -> Tensor:
        """Tokens in slot order, padding slots zero.   x: [B, total_seq_length, H, D] -> [B, S, H, D]

        The result is attn_metadata.tile_buf and valid until the next tile() on the same metadata, unless
        attn_metadata.cache_tile_buf is False.
        """
        return self.tile_parts((x,), attn_metadata)

    def tile_parts(self, parts: tuple[Tensor, ...], attn_metadata: VideoSparseAttentionMetadata) -> Tensor:
        """`tile` of the parts stacked on the batch axis, without the stacked copy. Same aliasing contract."""
        first = parts[0]
        if any(x.shape[1] != attn_metadata.total_seq_length for x in parts):
            raise ValueError(f"tile: found sequences of {[x.shape[1] for x in parts]} tokens, "
                             f"wanted {attn_metadata.total_seq_length}")
        shape = (sum(x.shape[0] for x in parts), attn_metadata.padded_seq_length, *first.shape[2:])
        buf = attn_metadata.tile_buf if attn_metadata.cache_tile_buf else None
        if buf is None or buf.shape != shape or buf.dtype != first.dtype or buf.device != first.device:
            buf = torch.zeros(shape, dtype=first.dtype, device=first.device)
            if attn_metadata.cache_tile_buf:
                attn_metadata.tile_buf = buf
        row = 0
        for x in parts:
            buf[row:row + x.shape[0]].index_copy_(1, attn_metadata.untile_combined_index, x)
            row += x.shape[0]
        return buf

    def untile(self, x: Tensor, attn_metadata: VideoSparseAttentionMetadata) -> Tensor:
        """Tokens back in sequence order, padding dropped.   x: [B, S, H, D] -> [B, total_seq_length, H, D]"""
        return x.index_select(1, attn_metadata.untile_combined_index)

    def preprocess_qkv(self, qkv: Tensor, attn_metadata: VideoSparseAttentionMetadata) -> Tensor:
        """Tile q, k, v (and gate) stacked on the batch axis. Aliasing contract: `tile`."""
        return self.tile(qkv, attn_metadata)

    def postprocess_output(self, output: Tensor, attn_metadata: VideoSparseAttentionMetadata) -> Tensor:
        """Undo `preprocess_qkv`."""
        return self.untile(output, attn_metadata)

    def select(self, query: Tensor, key: Tensor, attn_metadata: VideoSparseAttentionMetadata) -> Tensor:
        """Tiles that every query tile keeps, ascending.   tiled q, k [B, S, H, D] -> int32 [B, H, N, k]"""
        md = attn_metadata
        tiles = md.variable_block_sizes.shape[0]
        if md.topk == tiles:
            every = torch.arange(tiles, dtype=torch.int32, device=query.device)
            return every.expand(query.shape[0], query.shape[2], tiles, tiles)
        return select_top_tiles(self._means(query, md), self._means(key, md), md.topk, self.softmax_scale)

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, gate_compress: Tensor | None,
        attn_metadata: VideoSparseAttentionMetadata,
    ) -> Tensor:
        """coarse * gate_compress + fine, on tiled tensors.

        query, key, value, gate_compress: [B, S, H, D], padding slots zero -> [B, S, H, D].
        fine: softmax over the valid tokens of the kept tiles and all tokens that are not video, whose own
        queries attend to everything. coarse: softmax over the tile means, one row per query tile. A gate of
        None counts as 0, so that sparsity 0 is dense attention.
        Raises ValueError for operands that do not fit the metadata, NoKernel when no kernel can run them.
        """
        md = attn_metadata
        if query.shape[1] != md.padded_seq_length:
            raise ValueError(f"forward: found {query.shape[1]} slots, wanted {md.padded_seq_length} "
                             "(the output of preprocess_qkv with this metadata)")
        if gate_compress is not None and gate_compress.shape != query.shape:
            raise ValueError(f"forward: found gate_compress {list(gate_compress.shape)}, wanted {list(query.shape)}")
        tiles = self.select(query, key, md)
        if self.on_selection is not None:
            self.on_selection(tiles, md)
        output = self._fine(query, key, value, tiles, md)
        if gate_compress is not None:
            self._add_coarse(output, query, key, value, gate_compress, md)
        return output

    def _means(self, x: Tensor, md: VideoSparseAttentionMetadata) -> Tensor:
        return block_means(x[:, :md.num_video_slots], md.variable_block_sizes, md.slots_per_tile)

    def _fine(self, query, key, value, tiles, md) -> Tensor:
        blocks = md.kernel_block_sizes.shape[0]
        video_blocks = md.num_video_slots // BLOCK
        others = blocks - video_blocks
        indices, counts = tile_lists_to_blocks(tiles, md.slots_per_tile // BLOCK, tiles.shape[2], others)

        def attend(q, indices, counts):
            return block_sparse_attention(q, key, value, indices, counts, md.kernel_block_sizes,
                                          scale=self.softmax_scale, backend=self.backend)

        if not others:
            return attend(query, indices, counts)
        video = attend(query[:, :md.num_video_slots], indices, counts)
        rows = (*tiles.shape[:2], others)
        every = torch.arange(blocks, dtype=torch.int32, device=query.device).expand(*rows, blocks)
        all_counts = torch.full((1, 1, 1), blocks, dtype=torch.int32, device=query.device).expand(rows)
        return torch.cat([video, attend(query[:, md.num_video_slots:], every, all_counts)], dim=1)

    def _add_coarse(self, output, query, key, value, gate, md) -> None:
        means = (self._means(x, md) for x in (query, key, value))
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
