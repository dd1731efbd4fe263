"""Sliding Tile Attention (STA): every tile of queries attends to a window of tiles around it, per head.

Zhang et al., "Fast Video Generation with Sliding Tile Attention", arXiv 2502.04507; names and rules: FastVideo
attention/backends/sliding_tile_attn.py before its removal in #1124. Wider than upstream: any grid, any tile whose
volume is a multiple of 64 or at most 64, and tokens that are not video before and after the grid.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...kernels import tile_means
from ..far_field import far_field
from ..grid import Thw, TokenGrid
from ..layout import TileLayout, to_sequence, to_slots
from ..lowering import attend_lists, attend_lists_in_sequence
from ..range_dict import RangeDict
from ..selection import block_means
from ..window import Share, check_share, check_window, is_full, window_density, window_of_share
from ..window_lists import WindowLists
from .abstract import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder

STA_TILE_SIZE: Thw = (6, 8, 8)
"""The tile of every published strategy."""


UPSTREAM_SHAPES = RangeDict({(115200, 115456): (30, 48, 80), 82944: (36, 48, 48), 69120: (18, 48, 80)})
"""Token grids that FastVideo recognises by the sequence length; what is longer than the grid is text behind it."""


@dataclass
class SlidingTileAttentionMetadata(AttentionMetadata):
    """The windows of a run, and the token grid that they slide over."""

    STA_param: list[list[Any]] | Thw
    """Windows in tiles as [step][layer][head], as [layer][head] of this step, or one for all."""
    layer: int | None = None
    """Transformer block of the next call, for an implementation that does not know its own."""
    layout: TileLayout | None = None
    """None until the first sequence shows its length, when the metadata was built without a grid."""
    lists: WindowLists | None = field(default=None, repr=False)

    def at(self, current_timestep: int, layer: int | None = None, STA_param=None) -> SlidingTileAttentionMetadata:
        """This metadata for one call: another step, layer and, unless None, other windows. Shares all tensors."""
        return replace(self, current_timestep=current_timestep, layer=layer,
                       STA_param=self.STA_param if STA_param is None else STA_param)

    def on(self, tokens: int, device: torch.device) -> TileLayout:
        """The layout, which metadata without a grid reads off the sequence length as upstream does."""
        if self.layout is None:
            thw = UPSTREAM_SHAPES[tokens]
            grid = TokenGrid(thw, suffix=tokens - thw[0] * thw[1] * thw[2])
            self.layout = TileLayout.of_grid(grid, STA_TILE_SIZE, device)
            self.lists = WindowLists(self.layout)
        return self.layout

    def windows(self, heads: int, layer: int | None = None, first_head: int | None = None) -> tuple[Thw, ...]:
        """The window of every head at this step. Raises ValueError where STA_param has none: found, wanted.

        first_head: the heads are those from there on of a model of more; None: they are all that it has.
        """
        param = self.STA_param
        if isinstance(param[0], int):
            return (tuple(param),) * heads
        layer = self.layer if layer is None else layer
        if layer is None:
            raise ValueError("windows differ per layer and the layer is unknown: wanted metadata.at(step, layer) or "
                             "an implementation with a prefix such as blocks.7.attn1.impl")
        place = f"step {self.current_timestep}, layer {layer}"
        layers = param
        if not _of_one_step(param):
            if not 0 <= self.current_timestep < len(param):
                raise ValueError(f"windows for {place}: STA_param has {len(param)} steps; resample the strategy")
            layers = param[self.current_timestep]
        if not 0 <= layer < len(layers):
            raise ValueError(f"windows for {place}: STA_param has {len(layers)} layers; "
                             "wanted a strategy made for this model")
        row = layers[layer]
        if first_head is not None:
            if not 0 <= first_head <= len(row) - heads:
                raise ValueError(f"windows for {place}: STA_param has {len(row)} heads, wanted those from {first_head} "
                                 f"to {first_head + heads - 1}; wanted a strategy made for this model")
            row = row[first_head:first_head + heads]
        if len(row) != heads:
            raise ValueError(f"windows for {place}: STA_param has {len(row)} heads, the model {heads}; "
                             "wanted a strategy made for this model")
        if None in row:
            raise ValueError(f"windows for {place}: head {list(row).index(None)} has none; wanted one for every head")
        return row if isinstance(row, tuple) and isinstance(row[0], tuple) else tuple(map(tuple, row))

    def density(self, heads: int = 1, layer: int | None = None) -> float:
        """Share of query-key pairs computed at this step and layer, averaged over the heads."""
        windows = self.windows(heads, layer)
        return sum(window_density(self.layout.grid, self.layout.tile_size, window) * windows.count(window)
                   for window in set(windows)) / heads


def _of_one_step(param) -> bool:
    """Whether windows are given as [layer][head], not as [step][layer][head]."""
    head = next((head for layer in param for head in layer if head is not None), None)
    return bool(head) and isinstance(head[0], int)


class SlidingTileAttentionMetadataBuilder(AttentionMetadataBuilder[SlidingTileAttentionMetadata]):
    """Builds the index tensors of one grid."""

    def __init__(self) -> None:
        pass

    def prepare(self) -> None:
        pass

    def build(  # type: ignore[override]
        self, STA_param: list[list[Any]] | Thw | Share, current_timestep: int, raw_latent_shape: Thw | None = None,
        patch_size: Thw = (1, 1, 1), device: torch.device | str = "cpu", tile_size: Thw = STA_TILE_SIZE,
        prefix: int = 0, suffix: int = 0, hidden: tuple[int, ...] = (), layer: int | None = None,
        cache_tile_buf: bool = True, **kwargs,
    ) -> SlidingTileAttentionMetadata:
        """Metadata for a latent of raw_latent_shape (t, h, w) cells, cut by patch_size into tokens, floor.

        STA_param: windows in tiles as [step][layer][head] or, of one step, as [layer][head]; one window for all, or one
        as fractions of the grid.
        raw_latent_shape None: one of upstream's three grids, told by the length of the first sequence.
        prefix, suffix, hidden: the tokens that are not video, as in `TokenGrid`.
        Raises ValueError for a window, tile or grid that is none, TypeError for a keyword that no builder has.
        """
        self.refuse_unknown(kwargs, self.build)
        if not isinstance(STA_param, Sequence) or isinstance(STA_param, str) or not len(STA_param):
            raise ValueError(f"STA_param {STA_param!r}: wanted a window such as (3, 3, 5), or windows as "
                             "[step][layer][head] or [layer][head]")
        layout = None
        if raw_latent_shape is not None:
            shape = tuple(latent // patch for latent, patch in zip(raw_latent_shape, patch_size, strict=True))
            layout = TileLayout.of_grid(TokenGrid(shape, prefix, suffix, hidden), tuple(tile_size), device,
                                        cache_tile_buf=cache_tile_buf)
        if any(isinstance(part, float) for part in STA_param):
            share = check_share(STA_param)
            if layout is None:
                raise ValueError(f"STA_param {list(share)} in fractions of the grid: wanted raw_latent_shape too")
            STA_param = window_of_share(share, layout.num_tiles)
        elif not isinstance(STA_param[0], Sequence):
            STA_param = check_window(STA_param)
        return SlidingTileAttentionMetadata(
            current_timestep=current_timestep, STA_param=STA_param, layer=layer, layout=layout,
            lists=None if layout is None else WindowLists(layout))


class SlidingTileAttentionImpl(AttentionImpl[SlidingTileAttentionMetadata]):
    """STA on tiled tensors [B, S, H, D]."""

    def __init__(
        self, num_heads: int, head_size: int, causal: bool = False, softmax_scale: float | None = None,
        num_kv_heads: int | None = None, prefix: str = "", backend: str = "auto", far_field: bool = False,
        **extra_impl_args,
    ) -> None:
        """backend: the kernel, as in `kernels.block_sparse_attention`.

        far_field: tiles outside of a window count as one key each (`far_field.py`).
        The last number in prefix, such as 7 in blocks.7.attn1.impl, is the layer; without one the metadata says it.
        Raises ValueError for causal attention and for fewer key heads than query heads: STA has neither.
        """
        if causal:
            raise ValueError("sliding tile attention is not causal: found causal=True, wanted False")
        if num_kv_heads not in (None, num_heads):
            raise ValueError(f"found {num_kv_heads} key heads for {num_heads} query heads: wanted as many")
        self.num_heads, self.head_size, self.prefix, self.backend = num_heads, head_size, prefix, backend
        self.softmax_scale = head_size ** -0.5 if softmax_scale is None else softmax_scale
        self.far_field = far_field
        numbers = [int(part) for part in prefix.split(".") if part.isdigit()]
        self.layer = numbers[-1] if numbers else None
        self.first_head: int | None = None
        """The model's head that is the first of these calls, for a rank that has some of them; None: they have all."""
        self._untiled: tuple[int, int] | None = None
        """Slots and tokens of what `tile` last had without metadata, as text behind a grid fills its slots in part."""

    def tile(self, x: Tensor, attn_metadata: SlidingTileAttentionMetadata | None = None) -> Tensor:
        """Tokens in slot order, padding slots zero.   x: [B, tokens, H, D] -> [B, S, H, D]

        Without metadata the grid is upstream's for this length. With it, aliasing contract: `layout.to_slots`.
        """
        tiled = to_slots((x,), self._layout(x, attn_metadata))
        if attn_metadata is None:
            self._untiled = tiled.shape[1], x.shape[1]
        return tiled

    def tile_parts(self, parts: tuple[Tensor, ...], attn_metadata: SlidingTileAttentionMetadata) -> Tensor:
        """`tile` of the parts stacked on the batch axis, without the stacked copy. Same aliasing contract."""
        return to_slots(parts, self._layout(parts[0], attn_metadata))

    def untile(self, x: Tensor, attn_metadata: SlidingTileAttentionMetadata | None = None) -> Tensor:
        """Tokens back in sequence order, padding dropped.   x: [B, S, H, D] -> [B, tokens, H, D]

        Without metadata x has as many slots as what was last tiled without, or is one of upstream's grids and no text.
        """
        if attn_metadata is None and self._untiled is not None and x.shape[1] == self._untiled[0]:
            return to_sequence(x, self._layout_of(self._untiled[1], x.device))
        return to_sequence(x, self._layout(x, attn_metadata))

    def preprocess_qkv(self, qkv: Tensor, attn_metadata: SlidingTileAttentionMetadata) -> Tensor:
        """Tile q, k and v stacked on the batch axis. Aliasing contract: `layout.to_slots`."""
        return self.tile(qkv, attn_metadata)

    def postprocess_output(self, output: Tensor, attn_metadata: SlidingTileAttentionMetadata) -> Tensor:
        """Undo `preprocess_qkv`."""
        return self.untile(output, attn_metadata)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, attn_metadata: SlidingTileAttentionMetadata) -> Tensor:
        """Softmax attention of every query tile over its head's window, on tiled tensors [B, S, H, D] -> the same.

        Tokens that are not video are seen by all queries, and their queries see everything.
        Raises ValueError for operands or windows that do not fit the metadata, NoKernel when no kernel can run them.
        """
        md, layout = attn_metadata, attn_metadata.layout
        if layout is None or q.shape[1] != layout.padded_seq_length:
            wanted = "the output of preprocess_qkv" if layout is None else f"{layout.padded_seq_length}"
            raise ValueError(f"forward: found {q.shape[1]} slots, wanted {wanted} "
                             "(the output of preprocess_qkv with this metadata)")
        def means():
            return tuple(block_means(x[:, :layout.num_video_slots], layout.variable_block_sizes, layout.slots_per_tile)
                         for x in (q, k, v))

        return self._launch(attend_lists, q, k, v, md, means)

    def attend_readable(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: SlidingTileAttentionMetadata,
                        gate_compress: Tensor | None = None) -> Tensor:
        """tile, forward and untile in one, by a kernel that reads tiles out of the sequence where there is one.

        [B, tokens, H, D] -> [B, tokens, H, D]
        """
        if gate_compress is not None:
            raise ValueError("sliding tile attention has no coarse branch: found gate_compress, wanted None")
        layout = self._layout(query, attn_metadata)

        def means():
            return tile_means((query, key, value), layout.token_rows, layout.variable_block_sizes.shape[0],
                              layout.blocks_per_tile, self.backend)

        return self._launch(attend_lists_in_sequence, query, key, value, attn_metadata, means)

    def _launch(self, run, q: Tensor, k: Tensor, v: Tensor, md: SlidingTileAttentionMetadata, means) -> Tensor:
        """means: makes those of q, k and v, called where a far field needs them."""
        launches = md.lists.launches(md.windows(q.shape[2], self.layer, self.first_head))
        tiles, outputs = md.layout.num_tiles, []
        far = [self.far_field and not all(is_full(window, tiles) for window in part.windows) for part in launches]
        found = means() if any(far) else ()
        for part, has_far in zip(launches, far, strict=True):
            lists, start = md.lists.lists(part, q.shape[0]), {}
            if self.on_lists is not None:
                self.on_lists(part.heads, *lists, md.layout)
            if has_far:
                start = dict(zip(("far", "far_lse"), far_field(
                    tuple(x[:, part.heads] for x in found), *lists, md.layout.variable_block_sizes,
                    self.softmax_scale, md.layout.blocks_per_tile), strict=True))
            outputs.append(run(q[:, :, part.heads], k[:, :, part.heads], v[:, :, part.heads], *lists, md.layout,
                               self.softmax_scale, self.backend, **start))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    @classmethod
    def _layout(cls, x: Tensor, md: SlidingTileAttentionMetadata | None) -> TileLayout:
        return cls._layout_of(x.shape[1], x.device) if md is None else md.on(x.shape[1], x.device)

    @staticmethod
    def _layout_of(tokens: int, device: torch.device) -> TileLayout:
        thw = UPSTREAM_SHAPES[tokens]
        return TileLayout.of_grid(TokenGrid(thw, suffix=tokens - thw[0] * thw[1] * thw[2]), STA_TILE_SIZE, device,
                                  cache_tile_buf=False)


class SlidingTileAttentionBackend(AttentionBackend):
    """STA, for the selector and the tables."""

    accept_output_buffer: bool = True

    @staticmethod
    def get_name() -> str:
        return "SLIDING_TILE_ATTN"

    @staticmethod
    def get_impl_cls() -> type[SlidingTileAttentionImpl]:
        return SlidingTileAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[SlidingTileAttentionMetadata]:
        return SlidingTileAttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[SlidingTileAttentionMetadataBuilder]:
        return SlidingTileAttentionMetadataBuilder
