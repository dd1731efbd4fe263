"""Clips and layouts for the tests of masses and of lists made of them."""
from __future__ import annotations

import torch

from mass_oracle import tile_masses_oracle
from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionMetadataBuilder

LAYOUTS = [((7, 9, 11), (4, 4, 4), {}), ((7, 9, 11), (3, 5, 4), dict(prefix=3, suffix=70)),
           ((7, 9, 11), (4, 4, 8), dict(suffix=65)), ((9, 9, 17), (4, 8, 8), dict(prefix=1)),
           ((1, 13, 21), (1, 8, 8), dict(prefix=2, suffix=4, hidden=(1, 4)))]


def metadata(thw, tile=(4, 4, 4), **others):
    return VideoSparseAttentionMetadataBuilder().build(
        0, raw_latent_shape=thw, patch_size=(1, 1, 1), VSA_sparsity=0.7, device="cpu", tile_size=tile, **others)


def peaked(md, batch=2, heads=3, dim=16, dtype=torch.float32, seed=0):
    """q, k, v whose heads look ever closer: the first spreads its attention, the last looks at few tiles."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, md.total_seq_length, heads, dim, generator=generator, dtype=torch.float64)
    for x in (q, k):
        x += torch.randn(batch, md.total_seq_length // 8 + 1, heads, dim, generator=generator).repeat_interleave(
            8, 1)[:, :md.total_seq_length]
    q = q * (0.2 + 1.5 * torch.arange(heads))[:, None]
    return q.to(dtype), k.to(dtype), v.to(dtype)


def oracle_of(q, k, md):
    grid = md.grid
    return tile_masses_oracle(q, k, grid.thw, md.tile_size, grid.prefix, grid.suffix, grid.hidden)
