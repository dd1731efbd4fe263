"""The ways of telling a softmax of what it does not read, against the pack's own far field and where they are exact."""
import pytest
import torch

from pack.quality.far_field_orders import DENSE, GRID, WAYS, answers
from pack.quality.gated import TILE, tiles_of, tokens_of
from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder

TOKENS = GRID[0] * GRID[1] * GRID[2]


@pytest.fixture(scope="module")
def tensors():
    return torch.randn(3, 1, TOKENS, 1, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def test_dense_and_the_far_field_are_the_packs_own(tensors):
    q, k, v = tensors
    found = answers(*(tiles_of(x, GRID) for x in tensors), 0.25, (DENSE, "far field"))
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert torch.allclose(tokens_of(found[DENSE], GRID), dense.transpose(1, 2))
    metadata = VideoSparseAttentionMetadataBuilder().build(
        0, raw_latent_shape=GRID, patch_size=(1, 1, 1), VSA_sparsity=0.75, device="cpu", tile_size=TILE)
    own = VideoSparseAttentionImpl(1, 16, backend="reference", far_field=True).attend(q, k, v, metadata)
    assert torch.allclose(tokens_of(found["far field"], GRID), own, atol=1e-7)


def test_every_way_is_exact_where_tiles_are_as_it_takes_them_to_be(tensors):
    q, k, v = (tiles_of(x, GRID) for x in tensors)
    k, v = (x[:, :, :, :1].expand_as(x) for x in (k, v))
    found = answers(q, k, v, 0.25, (DENSE, *WAYS))
    exact = found.pop(DENSE)
    error = {way: float((x - exact).norm() / exact.norm()) for way, x in found.items()}
    assert error["pooled tiles"] < 1e-12 and error["pooled tiles to second order"] < 1e-12
    assert error["mass and value to first order"] > 1e-3 and error["left out"] > error["far field"] > 1e-3
    nearly = q[:, :, :, :1] + 1e-4 * q
    found = answers(nearly, k, v, 0.25, (DENSE, *WAYS))
    exact = found.pop(DENSE)
    error = {way: float((x - exact).norm() / exact.norm()) for way, x in found.items()}
    assert error["mass and value to first order"] < 1e-7 < 1e-6 < error["far field"] < 1e-3
