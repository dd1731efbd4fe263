"""The only room that knows ComfyUI: nodes, the attention hook, and where each model keeps its video tokens."""
from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .report import SparseAttentionReport
from .video_sparse_attention import VideoSparseAttentionPatch

NODES: tuple[type[io.ComfyNode], ...] = (VideoSparseAttentionPatch, SparseAttentionReport)


class VideoSparseAttentionExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)
