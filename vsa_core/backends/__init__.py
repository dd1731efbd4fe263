"""Sparse attention methods, one file each, best known first."""
from .video_sparse_attn import VideoSparseAttentionBackend

BACKENDS = (VideoSparseAttentionBackend,)
