"""Video Mixture of Block Attention (VMoBA): every query reads its own chunk of the clip and those it chooses.

Wu et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", arXiv 2506.23858; names, signatures and
rules: FastVideo attention/backends/vmoba.py at 2f3d4074, after KwaiVGI/VMoBA. Layers take turns: chunks of frames,
columns through time, boxes. Unlike upstream `topk` 1 reads the own chunk alone, a share that is never reached reads
all, and elements of a batch choose for themselves. Wider: any grid, tokens that are not video, no flash-attn.
`first_full_step` is kept and has no effect, as upstream: which steps stay dense is the caller's.
"""
from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..chunk_attention import OnSelection, attend_exactly, attend_pooled
from ..chunk_gate import ChunkRule
from ..chunks import AXES, Chunks, ChunkSize, check_chunk_size, process_moba_input, process_moba_output
from ..grid import Thw, TokenGrid
from ..lowering import readable
from .abstract import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder

__all__ = ["KINDS", "PooledChunkAttentionBackend", "PooledChunkAttentionImpl", "VMOBAAttentionBackend",
           "VMOBAAttentionImpl", "VideoMobaAttentionMetadata", "VideoMobaAttentionMetadataBuilder",
           "process_moba_input", "process_moba_output"]

KINDS = {"temporal": 1, "spatial": 2, "st": 3}
"""Kinds of chunks in the order in which layers take turns, with the sides that a size has."""


@dataclass
class VideoMobaAttentionMetadata(AttentionMetadata):
    """Chunks and rules of every kind. What depends on a grid is made at the first call and shared by all layers."""

    temporal_chunk_size: float
    temporal_topk: int
    spatial_chunk_size: tuple[int, int]
    spatial_topk: int
    st_chunk_size: tuple[int, int, int]
    st_topk: int
    moba_select_mode: str
    moba_threshold: float
    moba_threshold_type: str
    patch_resolution: list[int]
    """Tokens along time, height and width."""
    first_full_step: int = 12
    first_full_layer: int = 0
    """The layer with which the turns begin; those before it have kinds too, counted backwards."""
    temporal_layer: int = 1
    spatial_layer: int = 1
    st_layer: int = 1
    grid: TokenGrid | None = None
    """None: the sequence is the video alone."""
    layer: int | None = None
    """Transformer block of the next call, for an implementation that does not know its own."""
    layouts: dict = field(default_factory=dict, repr=False)

    def at(self, layer: int | None) -> VideoMobaAttentionMetadata:
        """This metadata for one layer. Shares all tensors."""
        return replace(self, layer=layer)

    @property
    def kinds(self) -> list[str]:
        """The kinds that any layer has."""
        return [kind for kind in KINDS if getattr(self, f"{kind}_layer")]

    def kind(self, layer: int) -> str:
        """The kind of chunks of a layer."""
        turns = [kind for kind in self.kinds for _ in range(getattr(self, f"{kind}_layer"))]
        return turns[(layer - self.first_full_layer) % len(turns)]

    def chunk_size(self, kind: str) -> ChunkSize:
        return getattr(self, f"{kind}_chunk_size")

    def rule(self, kind: str) -> ChunkRule:
        """How layers of a kind choose. Raises ValueError for a rule that is none."""
        return ChunkRule(self.moba_select_mode, getattr(self, f"{kind}_topk"), self.moba_threshold,
                         self.moba_threshold_type)

    def chunks(self, kind: str, device: torch.device) -> Chunks:
        """The clip in chunks of a kind."""
        key = kind, device
        if key not in self.layouts:
            grid = self.grid or TokenGrid(tuple(self.patch_resolution))
            self.layouts[key] = Chunks.of(grid, self.chunk_size(kind), device)
        return self.layouts[key]


class VideoMobaAttentionMetadataBuilder(AttentionMetadataBuilder[VideoMobaAttentionMetadata]):
    def __init__(self) -> None:
        pass

    def prepare(self) -> None:
        pass

    def build(  # type: ignore[override]
        self, current_timestep: int, raw_latent_shape: Thw, patch_size: Thw, temporal_chunk_size: float,
        temporal_topk: int, spatial_chunk_size: Sequence[int], spatial_topk: int, st_chunk_size: Sequence[int],
        st_topk: int, moba_select_mode: str = "threshold", moba_threshold: float = 0.25,
        moba_threshold_type: str = "query_head", device: torch.device | str | None = None, first_full_layer: int = 0,
        first_full_step: int = 12, temporal_layer: int = 1, spatial_layer: int = 1, st_layer: int = 1,
        prefix: int = 0, suffix: int = 0, hidden: tuple[int, ...] = (), **kwargs,
    ) -> VideoMobaAttentionMetadata:
        """Metadata for a latent of raw_latent_shape (t, h, w) cells, cut by patch_size into tokens.

        Chunk sizes in tokens: frames, (height, width), (time, height, width). prefix, suffix, hidden: the tokens that
        are not video, as in `TokenGrid`. device has no effect: tensors are made where the first call's are.
        Raises ValueError for a latent that patches do not divide and for settings that are none, TypeError for a
        keyword that no builder has.
        """
        self.refuse_unknown(kwargs, self.build)
        for axis, cells, patch in zip(AXES, raw_latent_shape, patch_size, strict=True):
            if cells % patch:
                raise ValueError(f"raw_latent_shape along {axis}: found {cells} cells, wanted a multiple of {patch}")
        thw = tuple(cells // patch for cells, patch in zip(raw_latent_shape, patch_size, strict=True))
        sizes = {"temporal": temporal_chunk_size, "spatial": spatial_chunk_size, "st": st_chunk_size}
        for kind, sides in KINDS.items():
            name = f"{kind}_chunk_size"
            sizes[kind] = check_chunk_size(sizes[kind], name)
            if (len(sizes[kind]) if isinstance(sizes[kind], tuple) else 1) != sides:
                raise ValueError(f"{name} {list(sizes[kind]) if sides == 1 else sizes[kind]}: wanted "
                                 + ("a number of frames", "height and width", "time, height and width")[sides - 1])
        layers = {"temporal_layer": temporal_layer, "spatial_layer": spatial_layer, "st_layer": st_layer}
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in layers.values()) or not any(
                layers.values()):
            raise ValueError(f"layers per turn {layers}: wanted whole numbers of 0 or more, and one above 0")
        md = VideoMobaAttentionMetadata(
            current_timestep, sizes["temporal"], temporal_topk, sizes["spatial"], spatial_topk, sizes["st"], st_topk,
            moba_select_mode, moba_threshold, moba_threshold_type, list(thw), first_full_step, first_full_layer,
            **layers, grid=TokenGrid(thw, prefix, suffix, hidden))
        for kind in KINDS:
            md.rule(kind)
        return md


class VMOBAAttentionImpl(AttentionImpl[VideoMobaAttentionMetadata]):
    """VMoBA in the order of the sequence, [B, S, H, D]. Exact, by gathered queries: see `chunk_attention`."""

    attend_chunks = staticmethod(attend_exactly)

    def __init__(
        self, num_heads: int, head_size: int, softmax_scale: float | None = None, causal: bool = False,
        num_kv_heads: int | None = None, prefix: str = "", backend: str = "auto",
        on_selection: OnSelection | None = None, **extra_impl_args,
    ) -> None:
        """backend: the kernel, as in `kernels.block_sparse_attention`.

        The number behind "blocks." in prefix is the layer; without one the metadata says it.
        Raises ValueError for causal attention and for fewer key heads than query heads: VMoBA has neither.
        """
        if causal:
            raise ValueError("VMoBA is not causal: found causal=True, wanted False")
        if num_kv_heads not in (None, num_heads):
            raise ValueError(f"found {num_kv_heads} key heads for {num_heads} query heads: wanted as many")
        self.num_heads, self.head_size, self.prefix, self.backend = num_heads, head_size, prefix, backend
        self.softmax_scale = head_size ** -0.5 if softmax_scale is None else softmax_scale
        self.layer_idx, self.on_selection = self._get_layer_idx(prefix), on_selection

    @staticmethod
    def _get_layer_idx(prefix: str) -> int | None:
        match = re.search(r"blocks\.(\d+)", prefix)
        return int(match[1]) if match else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: VideoMobaAttentionMetadata) -> Tensor:
        """Attention of every query to its own chunk and those it chooses, [B, S, H, D] -> the same, contiguous.

        Tokens that are not video are read by all queries, and their queries read everything.
        Raises ValueError for operands of different shapes or that do not fit the metadata, and for a layer that is not
        known; NoKernel when no kernel can run them.
        """
        if not query.shape == key.shape == value.shape or query.dim() != 4:
            raise ValueError(f"VMoBA: found q {list(query.shape)}, k {list(key.shape)}, v {list(value.shape)}, "
                             "wanted one shape [batch, sequence, heads, head_dim]")
        md, layer = attn_metadata, self.layer_idx
        layer = md.layer if layer is None else layer
        if layer is None:
            raise ValueError("chunks differ per layer and the layer is unknown: wanted metadata.at(layer) or an "
                             "implementation with a prefix such as blocks.7.attn1.impl")
        kind = md.kind(layer)
        chunks = md.chunks(kind, query.device)
        if query.shape[1] != chunks.layout.total_seq_length:
            raise ValueError(f"VMoBA: found a sequence of {query.shape[1]} tokens, wanted "
                             f"{chunks.layout.total_seq_length}")
        return self.attend_chunks(*readable(query, key, value), chunks, md.rule(kind), self.softmax_scale, self.backend,
                                  self.on_selection)


class PooledChunkAttentionImpl(VMOBAAttentionImpl):
    """VMoBA's chunks, turns and rules for blocks of 64 queries, which choose by their mean: cheaper, and not VMoBA."""

    attend_chunks = staticmethod(attend_pooled)


class VMOBAAttentionBackend(AttentionBackend):
    """VMoBA, for the selector and the tables."""

    accept_output_buffer: bool = True

    @staticmethod
    def get_name() -> str:
        return "VMOBA_ATTN"

    @staticmethod
    def get_impl_cls() -> type[VMOBAAttentionImpl]:
        return VMOBAAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[VideoMobaAttentionMetadata]:
        return VideoMobaAttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[VideoMobaAttentionMetadataBuilder]:
        return VideoMobaAttentionMetadataBuilder


class PooledChunkAttentionBackend(VMOBAAttentionBackend):
    """The cheaper form, for the selector and the tables; FastVideo has none."""

    @staticmethod
    def get_name() -> str:
        return "POOLED_CHUNK_ATTN"

    @staticmethod
    def get_impl_cls() -> type[PooledChunkAttentionImpl]:
        return PooledChunkAttentionImpl
