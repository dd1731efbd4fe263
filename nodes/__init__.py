"""The only room that knows ComfyUI: nodes, the attention hook, and where each model keeps its video tokens."""
from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .attach_vsa_gates import VSAGatesAttach
from .load_sparse_diffusion_model import SparseDiffusionModelLoader
from .report import SparseAttentionReport
from .sliding_tile_attention import SlidingTileAttentionPatch
from .strategy_files import LoadSTAStrategy, SaveSTAStrategy
from .strategy_search import STAStrategySearch
from .video_sparse_attention import VideoSparseAttentionPatch

NODES: tuple[type[io.ComfyNode], ...] = (
    VideoSparseAttentionPatch, SparseAttentionReport, SparseDiffusionModelLoader, VSAGatesAttach,
    SlidingTileAttentionPatch, LoadSTAStrategy, SaveSTAStrategy, STAStrategySearch)


class VideoSparseAttentionExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)
