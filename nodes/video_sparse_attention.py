"""The node "Video Sparse Attention (VSA)"."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..vsa_core.backends.video_sparse_attn import (
    VideoSparseAttentionImpl,
    VideoSparseAttentionMetadata,
    VideoSparseAttentionMetadataBuilder,
)
from ..vsa_core.grid import Thw, TokenGrid
from ..vsa_core.tiling import auto_tile_size, parse_tile_size
from .hook import LayerCall, SparseAttentionHook
from .run import GridRecord
from .settings import read_settings, settings_inputs, why_invalid

AUTO_TILE = "auto"
TILE_SIZES = (AUTO_TILE, "4x4x4", "1x8x8", "2x4x8", "2x8x4", "4x2x8", "4x8x2", "8x2x4", "8x4x2", "4x4x8", "4x8x4",
              "8x4x4", "2x8x8", "4x8x8", "8x8x4")


@dataclass(frozen=True)
class VideoSparseMethod:
    """VSA with its settings. tile_size None: `auto_tile_size` of the grid at hand."""

    sparsity: float
    tile_size: Thw | None
    name: str = "VSA"

    def plan(self, grid: TokenGrid, device: torch.device) -> VideoSparseAttentionMetadata:
        # No reused tile buffer: between layers it would hold three q-sized tensors that the host needs for itself.
        return VideoSparseAttentionMetadataBuilder().build(
            current_timestep=0, raw_latent_shape=grid.thw, patch_size=(1, 1, 1), VSA_sparsity=self.sparsity,
            device=device, tile_size=self.tile_size or auto_tile_size(grid.thw), prefix=grid.prefix,
            suffix=grid.suffix, cache_tile_buf=False)

    def facts(self, plan: VideoSparseAttentionMetadata) -> dict[str, Any]:
        others = plan.padded_seq_length - plan.num_video_slots
        computed = (plan.num_video_slots * (plan.topk * plan.slots_per_tile + others)
                    + others * plan.padded_seq_length)
        return {"tile": list(plan.tile_size), "tiles": math.prod(plan.num_tiles), "kept": plan.topk,
                "sparsity": self.sparsity, "work": computed / plan.total_seq_length ** 2}

    def attend(self, plan: VideoSparseAttentionMetadata, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        record = call.record
        on_selection = None if record is None else lambda tiles, md: _observe(tiles, md, record)
        impl = VideoSparseAttentionImpl(q.shape[2], q.shape[3], backend=call.kernel, on_selection=on_selection)
        tiled = impl.tile_parts((q, k, v), plan)
        return impl.postprocess_output(impl.forward(*tiled.chunk(3), None, plan), plan)


def _observe(tiles: Tensor, plan: VideoSparseAttentionMetadata, record: GridRecord) -> None:
    """Put the density of a selection, int32 [B, H, N, k], and its map of the middle query tile into the record."""
    sizes = plan.variable_block_sizes.float()
    others, total = plan.grid.num_other_tokens, plan.total_seq_length
    keys = sizes[tiles.long()].sum(-1) + others                        # [B, H, N]
    pairs = (keys * sizes).sum(-1).mean() + others * total
    record.densities.append(pairs / total ** 2)
    n_t, n_h, n_w = plan.num_tiles
    middle = (n_t // 2 * n_h + n_h // 2) * n_w + n_w // 2
    kept = tiles[:, :, middle].flatten().long()
    counts = torch.zeros(n_t * n_h * n_w, device=tiles.device).index_add_(
        0, kept, torch.ones(kept.shape, device=tiles.device))
    record.tile_map = (counts / (tiles.shape[0] * tiles.shape[1])).view(n_t, n_h, n_w)


class VideoSparseAttentionPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="VideoSparseAttentionPatch",
            display_name="Video Sparse Attention (VSA)",
            category="model/patch",
            description=(
                "Makes a video model sample faster: in self-attention every tile of the clip attends only to the "
                "tiles that matter most to it. Works at any resolution and length. After a run the node says what "
                "ran sparse, what ran dense and why, and the time both took."),
            search_aliases=["VSA", "sparse attention", "FastVideo", "speed up video", "Wan"],
            inputs=[
                io.Model.Input("model"),
                io.Float.Input(
                    "sparsity", default=0.8, min=0.0, max=0.99, step=0.01,
                    tooltip="Share of the clip that a tile does not look at. Higher is faster and further from the "
                            "dense result. 0.8 is a good start for models that were not trained for it; above 0.85 "
                            "expect visible changes. Models trained with VSA take 0.8 to 0.9. 0 is dense attention."),
                io.Combo.Input(
                    "tile_size", options=list(TILE_SIZES), default=AUTO_TILE,
                    tooltip="Tokens per tile as time x height x width. auto takes the compact shape that wastes "
                            "least at this resolution. 4x4x4 is what VSA checkpoints were trained with. 128 and 256 "
                            "tokens choose more coarsely. Any tile of 64, 128, 192, ... tokens is accepted."),
                *settings_inputs(),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, tile_size=None, start_percent=None, end_percent=None, dense_blocks=None):
        return why_invalid(lambda: read_method(0.0, AUTO_TILE if tile_size is None else tile_size),
                           start_percent, end_percent, dense_blocks)

    @classmethod
    def execute(cls, model, sparsity, tile_size=AUTO_TILE, **settings) -> io.NodeOutput:
        hidden = getattr(cls, "hidden", None)
        return io.NodeOutput(SparseAttentionHook.install(
            model, read_method(sparsity, tile_size), read_settings(**settings), getattr(hidden, "unique_id", None)))


def read_method(sparsity: float, tile_size: str) -> VideoSparseMethod:
    """The node's own widgets as a method. Raises ValueError: found, wanted."""
    if not 0.0 <= sparsity <= 0.99:
        raise ValueError(f"sparsity {sparsity}: wanted 0 to 0.99")
    return VideoSparseMethod(sparsity, None if tile_size == AUTO_TILE else parse_tile_size(tile_size))
