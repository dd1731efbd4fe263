"""The node "Video Sparse Attention (VSA)"."""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from .. import kernels
from ..vsa_core.backends.video_sparse_attn import (
    VideoSparseAttentionImpl,
    VideoSparseAttentionMetadata,
    VideoSparseAttentionMetadataBuilder,
)
from ..vsa_core.grid import Thw, TokenGrid
from ..vsa_core.schedule import Schedule, parse_dense_blocks
from ..vsa_core.tiling import auto_tile_size, parse_tile_size
from .hook import LayerCall, Settings, SparseAttentionHook
from .run import GridRecord

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
                io.Combo.Input(
                    "backend", options=[kernels.AUTO, *(spec.name for spec in kernels.KERNELS)],
                    default=kernels.AUTO,
                    tooltip="The kernel that computes attention. auto takes the fastest that can run here and falls "
                            "back to dense, visibly, when none can. A kernel chosen by name runs or raises an error."),
                io.Float.Input(
                    "start_percent", default=0.2, min=0.0, max=1.0, step=0.01,
                    tooltip="Part of the denoising that stays dense at the start, where the composition forms. "
                            "Lower is faster. 0 for VSA-trained checkpoints."),
                io.Float.Input(
                    "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, advanced=True,
                    tooltip="From here to the end attention is dense again. Below 1 it can calm flicker, at a cost."),
                io.String.Input(
                    "dense_blocks", default="", advanced=True,
                    tooltip="Transformer blocks that stay dense, such as: 0, 1, 38-39, -1. The first and last are "
                            "the most sensitive. Each dense block costs its share of the speed-up."),
                io.Int.Input(
                    "min_tokens", default=12288, min=0, max=1 << 24, advanced=True,
                    tooltip="Clips with fewer tokens run dense: there is little to gain on them. 480p of 33 frames "
                            "has about 14000 tokens, of 81 frames 32760."),
                io.Boolean.Input(
                    "strict", default=False, advanced=True,
                    tooltip="Raise an error instead of running dense when no kernel can run or a kernel fails."),
                io.Boolean.Input(
                    "verbose", default=False, advanced=True,
                    tooltip="Adds one line per layer to the report: calls, reasons and milliseconds."),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, tile_size=AUTO_TILE, start_percent=0.0, end_percent=1.0, dense_blocks=""):
        try:
            read_settings(0.0, tile_size, kernels.AUTO, start_percent or 0.0,
                          1.0 if end_percent is None else end_percent, dense_blocks, 0, False, False)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model, sparsity, tile_size=AUTO_TILE, backend=kernels.AUTO, start_percent=0.2, end_percent=1.0,
                dense_blocks="", min_tokens=12288, strict=False, verbose=False) -> io.NodeOutput:
        method, settings = read_settings(sparsity, tile_size, backend, start_percent, end_percent, dense_blocks,
                                         min_tokens, strict, verbose)
        hidden = getattr(cls, "hidden", None)
        return io.NodeOutput(SparseAttentionHook.install(model, method, settings,
                                                         getattr(hidden, "unique_id", None)))


def read_settings(sparsity, tile_size, backend, start_percent, end_percent, dense_blocks, min_tokens, strict,
                  verbose) -> tuple[VideoSparseMethod, Settings]:
    """The node's widgets as a method and settings. Raises ValueError: found, wanted."""
    if not 0.0 <= sparsity <= 0.99:
        raise ValueError(f"sparsity {sparsity}: wanted 0 to 0.99")
    if min_tokens < 0:
        raise ValueError(f"min_tokens {min_tokens}: wanted 0 or more")
    tile = None if tile_size in (None, AUTO_TILE) else parse_tile_size(tile_size)
    settings = Settings(backend=backend, schedule=Schedule(start_percent, end_percent),
                        dense_blocks=parse_dense_blocks(dense_blocks), min_tokens=min_tokens, strict=strict,
                        verbose=verbose)
    return VideoSparseMethod(sparsity, tile), settings
