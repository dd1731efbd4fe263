"""What the tokens that are not video may hide, for every sparse method alike."""
import pytest
import torch

from pack.vsa_core.backends.sliding_tile_attn import SlidingTileAttentionImpl, SlidingTileAttentionMetadataBuilder
from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder
from pack.vsa_core.grid import TokenGrid
from pack.vsa_core.layout import TileLayout, to_sequence, to_slots

THW = (5, 6, 7)


def video_sparse(q, k, v, prefix, suffix, hidden):
    md = VideoSparseAttentionMetadataBuilder().build(0, THW, (1, 1, 1), 0.0, torch.device("cpu"), (4, 4, 4), prefix,
                                                     suffix, hidden=hidden)
    return VideoSparseAttentionImpl(q.shape[2], q.shape[3]).attend(q, k, v, md)


def sliding_tile(q, k, v, prefix, suffix, hidden):
    md = SlidingTileAttentionMetadataBuilder().build((9, 9, 9), 0, raw_latent_shape=THW, tile_size=(4, 4, 4),
                                                     prefix=prefix, suffix=suffix, hidden=hidden)
    return SlidingTileAttentionImpl(q.shape[2], q.shape[3]).attend(q, k, v, md)


@pytest.mark.parametrize("method", [video_sparse, sliding_tile])
@pytest.mark.parametrize("prefix, suffix, hidden", [
    (5, 0, (0, 4)), (0, 130, tuple(range(40, 130))), (70, 70, (0, 1, 69, 70, 139)), (0, 3, (0, 1, 2)), (64, 64, ())],
    ids=["prefix", "padded text", "both sides", "all of it", "none"])
def test_hidden_tokens_are_masked_keys_whose_own_queries_still_see_the_rest(method, prefix, suffix, hidden):
    tokens = prefix + 210 + suffix
    q, k, v = torch.randn(3, 2, tokens, 2, 8, generator=torch.Generator().manual_seed(0))
    seen = torch.ones(tokens, dtype=torch.bool)
    seen[[i if i < prefix else i + 210 for i in hidden]] = False
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), attn_mask=seen.expand(tokens, tokens)).transpose(1, 2)
    out = method(q, k, v, prefix, suffix, hidden)
    errors = torch.linalg.vector_norm(out - wanted, dim=(0, 2, 3)) / torch.linalg.vector_norm(wanted, dim=(0, 2, 3))
    assert float(errors.max()) <= 1e-5
    v[:, ~seen] = torch.nan
    assert torch.equal(method(q, k, v, prefix, suffix, hidden), out)


@pytest.mark.parametrize("hidden", [(), (0, 3, 5)])
def test_tokens_come_back_from_their_slots_where_they_were(hidden):
    layout = TileLayout.of_grid(TokenGrid(THW, 2, 5, hidden), (4, 4, 8), torch.device("cpu"))
    x = torch.arange(217.).view(1, 217, 1, 1)
    assert torch.equal(to_sequence(to_slots((x,), layout), layout), x)
    assert int(layout.kernel_block_sizes.sum()) == 217 - len(hidden)


@pytest.mark.parametrize("hidden", [(3,), (-1,), (1, 0), (1, 1)])
def test_hidden_places_that_are_none_are_refused(hidden):
    with pytest.raises(ValueError, match="wanted ascending places among its 3 tokens"):
        TokenGrid(THW, 1, 2, hidden)
