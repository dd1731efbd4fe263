"""The only room that knows ComfyUI: nodes, the attention hook, and where each model keeps its video tokens."""
from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .evidence.compare_clips import CompareClips
from .evidence.report import SparseAttentionReport
from .methods.sliding_tile_attention import SlidingTileAttentionPatch
from .methods.sparse_linear_attention import SparseLinearAttentionPatch
from .methods.video_mixture_of_block_attention import VideoMixtureOfBlockAttentionPatch
from .methods.video_sparse_attention import VideoSparseAttentionPatch
from .split.raylight import SparseAttentionForRaylight
from .split.sequence_split import MultiGPUSequenceSplit
from .strategies.calibrate import SparseAttentionCalibrate
from .strategies.strategy_files import LoadSTAStrategy, SaveSTAStrategy
from .strategies.strategy_search import STAStrategySearch
from .trained.attach_vsa_gates import VSAGatesAttach
from .trained.load_sparse_diffusion_model import SparseDiffusionModelLoader

NODES: tuple[type[io.ComfyNode], ...] = (
    VideoSparseAttentionPatch, SparseAttentionReport, SparseDiffusionModelLoader, VSAGatesAttach,
    SlidingTileAttentionPatch, LoadSTAStrategy, SaveSTAStrategy, STAStrategySearch, CompareClips,
    SparseLinearAttentionPatch, VideoMixtureOfBlockAttentionPatch, SparseAttentionCalibrate,
    MultiGPUSequenceSplit, SparseAttentionForRaylight)


class VideoSparseAttentionExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return list(NODES)
