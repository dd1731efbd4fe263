"""Sparse attention methods, one file each, best known first."""
from .sliding_tile_attn import SlidingTileAttentionBackend
from .video_sparse_attn import VideoSparseAttentionBackend

BACKENDS = (VideoSparseAttentionBackend, SlidingTileAttentionBackend)
