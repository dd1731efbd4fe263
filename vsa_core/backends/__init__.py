"""Sparse attention methods, one file each, best known first."""
from .sla import SageSLAAttentionBackend, SLAAttentionBackend
from .sliding_tile_attn import SlidingTileAttentionBackend
from .video_sparse_attn import VideoSparseAttentionBackend
from .vmoba import PooledChunkAttentionBackend, VMOBAAttentionBackend

BACKENDS = (VideoSparseAttentionBackend, SlidingTileAttentionBackend, SLAAttentionBackend, SageSLAAttentionBackend,
            VMOBAAttentionBackend, PooledChunkAttentionBackend)
