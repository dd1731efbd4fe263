"""Trainable Video Sparse Attention against the pack's own."""
import pytest
import torch

from pack.quality import gated
from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder

GRID = (4, 8, 12)


@pytest.fixture
def operands():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4 * 8 * 12, 2, 16, generator=generator) for _ in range(4)]


def test_tiles_and_back_move_every_token(operands):
    tiles = gated.tiles_of(operands[0], GRID)
    assert tiles.shape == (2, 2, 6, 64, 16) and torch.equal(gated.tokens_of(tiles, GRID), operands[0])


@pytest.mark.parametrize("sparsity", [0.9, 0.5])
def test_it_computes_what_the_packs_attention_computes(operands, sparsity):
    metadata = VideoSparseAttentionMetadataBuilder().build(0, GRID, (1, 1, 1), sparsity, torch.device("cpu"))
    q, k, v, gate = operands
    theirs = VideoSparseAttentionImpl(2, 16, backend="reference").attend_readable(q, k, v, metadata, gate)
    ours = gated.attend(q, k, v, gate, GRID, sparsity)
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_every_operand_gets_a_gradient(operands):
    for x in operands:
        x.requires_grad_()
    gated.attend(*operands, GRID).square().sum().backward()
    assert all(x.grad.abs().sum() > 0 for x in operands)
