"""Video sparse attention against a float64 oracle, judged per (batch, head, tile of queries)."""
from itertools import product
from math import prod

import pytest
import torch

from oracles import (
    dense_attention_oracle,
    exact_topk,
    query_groups,
    relative_l2_per_tile,
    selection_by_probe,
    tokens_of_tiles,
    vsa_attention_oracle,
    vsa_one_query_oracle,
)
from pack.vsa_core.backends.video_sparse_attn import (
    VSA_TILE_SIZE,
    VideoSparseAttentionBackend,
    VideoSparseAttentionImpl,
    VideoSparseAttentionMetadata,
    VideoSparseAttentionMetadataBuilder,
    compute_topk,
)
from pack.vsa_core.tiling import auto_tile_size

CPU = torch.device("cpu")
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4e-3}
"""Largest relative L2 error of a query group."""


def metadata(thw, tile=VSA_TILE_SIZE, sparsity=0.7, prefix=0, suffix=0):
    return VideoSparseAttentionMetadataBuilder().build(
        current_timestep=0, raw_latent_shape=thw, patch_size=(1, 1, 1), VSA_sparsity=sparsity, device=CPU,
        tile_size=tile, prefix=prefix, suffix=suffix)


def random_inputs(thw, prefix=0, suffix=0, batch=1, heads=2, dim=16, dtype=torch.float32, seed=0):
    """q, k, v, gate in which neighbours resemble each other a little, so that tiles differ in score."""
    generator = torch.Generator().manual_seed(seed)
    tokens = prefix + prod(thw) + suffix
    x = torch.randn(4, batch, tokens, heads, dim, generator=generator, dtype=torch.float64)
    drift = torch.randn(4, batch, tokens // 16 + 1, heads, dim, generator=generator, dtype=torch.float64)
    return (x + 0.5 * drift.repeat_interleave(16, dim=2)[:, :, :tokens]).to(dtype)


def attention(q, k, v, gate, md, scale=None, **options):
    """The whole way of a layer: stack, tile, forward, untile."""
    impl = VideoSparseAttentionImpl(num_heads=q.shape[2], head_size=q.shape[3], causal=False, softmax_scale=scale,
                                    **options)
    stacked = torch.cat([q, k, v] if gate is None else [q, k, v, gate])
    parts = impl.preprocess_qkv(stacked, md).chunk(3 if gate is None else 4)
    return impl.postprocess_output(impl.forward(*parts, *([None] if gate is None else []), md), md)


def check_against_oracle(thw, tile, sparsity=0.7, prefix=0, suffix=0, gated=True, scale=None, loudness=1, **inputs):
    """Production's selection is the oracle's up to near-ties; its output is the oracle's for that selection."""
    q, k, v, gate = random_inputs(thw, prefix, suffix, **inputs)
    q, gate = q * loudness, gate if gated else None
    md = metadata(thw, tile, sparsity, prefix, suffix)
    place = (thw, tile)
    selection = selection_by_probe(lambda *qkv: attention(*qkv, None, md, scale), q, k, *place, prefix, suffix)
    out = attention(q, k, v, gate, md, scale)
    assert out.dtype == q.dtype and out.shape == q.shape
    _, best, gaps = vsa_attention_oracle(q, k, v, gate, *place, sparsity, prefix, suffix, scale)
    if loudness == 1:
        assert all(selection[row] == best[row] or gaps[row] < 1e-5 for row in best)
        assert all(len(tiles) == exact_topk(sparsity, len(tokens_of_tiles(*place))) for tiles in selection.values())
    wanted, *_ = vsa_attention_oracle(q, k, v, gate, *place, sparsity, prefix, suffix, scale, selection)
    errors = relative_l2_per_tile(out, wanted, *place, prefix, suffix)
    assert float(errors.max()) <= BOUND[q.dtype]
    return out


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_oracle_that_keeps_every_tile_is_torch_attention(scale):
    q, k, v, _ = random_inputs((3, 5, 4), 2, 3, batch=2, dtype=torch.float64)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)
    sparse, *_ = vsa_attention_oracle(q, k, v, None, (3, 5, 4), (2, 2, 2), 0.0, 2, 3, scale)
    for out in (dense_attention_oracle(q, k, v, scale), sparse):
        torch.testing.assert_close(out, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gated", [True, False])
def test_the_oracle_is_what_one_query_at_a_time_computes_in_plain_floats(gated):
    thw, tile, prefix, suffix = (3, 5, 4), (2, 2, 2), 2, 1
    q, k, v, gate = random_inputs(thw, prefix, suffix, batch=2, dim=4, dtype=torch.float64)
    gate = gate if gated else None
    out, selection, _ = vsa_attention_oracle(q, k, v, gate, thw, tile, 5, prefix, suffix)
    assert len(selection) == 2 * 2 * 12 and all(len(tiles) == 5 for tiles in selection.values())
    for place in range(prefix, prefix + prod(thw), 7):
        one = torch.tensor(vsa_one_query_oracle(q, k, v, gate, thw, tile, 5, place, prefix, suffix))
        torch.testing.assert_close(out[:, place], one.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "no gate"])
@pytest.mark.parametrize("thw, tile", [((5, 5, 6), (4, 4, 4)), ((7, 9, 11), (4, 4, 4)), ((7, 9, 11), (4, 4, 8)),
                                       ((9, 9, 17), (4, 8, 8)), ((7, 9, 11), "auto")], ids=str)
def test_output_is_the_oracles_in_every_dtype(thw, tile, gated, dtype):
    tile = auto_tile_size(thw) if tile == "auto" else tile
    check_against_oracle(thw, tile, gated=gated, dtype=dtype, batch=2, heads=3)


@pytest.mark.parametrize("thw", [(1, 1, 1), (4, 4, 4), (8, 8, 8), (1, 13, 21), (17, 1, 5), (3, 2, 40)], ids=str)
@pytest.mark.parametrize("tile", [(4, 4, 4), (1, 8, 8), (16, 4, 2), (3, 8, 8)], ids=str)
def test_grids_of_any_proportion_match_the_oracle(thw, tile):
    check_against_oracle(thw, tile)


@pytest.mark.parametrize("prefix, suffix", [*product([0, 1, 63, 64, 65], [0, 1, 65]), (0, 63), (0, 64), (1, 63)])
def test_other_tokens_are_read_by_all_and_read_all(prefix, suffix):
    check_against_oracle((5, 5, 6), (4, 4, 4), prefix=prefix, suffix=suffix, batch=2)


@pytest.mark.parametrize("tile", [(4, 4, 8), (4, 8, 8), (3, 5, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_tokens_go_with_every_kind_of_tile(tile, dtype):
    check_against_oracle((7, 9, 11), tile, prefix=65, suffix=3, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_logits_thirty_times_as_large_match_the_oracle(dtype):
    check_against_oracle((7, 9, 11), (4, 4, 4), prefix=3, suffix=1, dtype=dtype, loudness=30)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tile_means_and_coarse_scores_are_not_rounded_to_half_precision(dtype):
    check_against_oracle((7, 9, 11), (4, 4, 4), dtype=dtype, loudness=500)


def test_logits_beyond_the_range_of_exp_stay_finite():
    q, k, v, gate = random_inputs((7, 9, 11))
    assert bool(attention(q * 1e4, k, v, gate, metadata((7, 9, 11))).isfinite().all())


@pytest.mark.parametrize("dim", [1, 8, 80, 96, 128])
def test_any_head_size_matches_the_oracle(dim):
    check_against_oracle((5, 6, 7), (4, 4, 4), dim=dim, sparsity=0.5)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.8, 0.9, 0.95, 0.99])
def test_every_sparsity_keeps_its_tiles(sparsity):
    check_against_oracle((9, 9, 9), (4, 4, 4), sparsity=sparsity, prefix=2)


@pytest.mark.parametrize("scale", [0.05, 0.5])
def test_the_scale_is_the_one_that_was_asked_for(scale):
    check_against_oracle((5, 6, 7), (4, 4, 4), scale=scale)


@pytest.mark.parametrize("tile", [(4, 4, 4), (4, 4, 8), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("prefix, suffix", [(0, 0), (5, 70)])
def test_sparsity_zero_without_gate_is_dense_attention(tile, prefix, suffix):
    q, k, v, _ = random_inputs((5, 6, 7), prefix, suffix, batch=2)
    out = attention(q, k, v, None, metadata((5, 6, 7), tile, 0.0, prefix, suffix))
    errors = relative_l2_per_tile(out, dense_attention_oracle(q, k, v), (5, 6, 7), tile, prefix, suffix)
    assert float(errors.max()) <= BOUND[torch.float32]


def test_a_gate_of_zero_is_no_gate():
    q, k, v, gate = random_inputs((5, 6, 7), prefix=2)
    md = metadata((5, 6, 7), prefix=2)
    assert torch.equal(attention(q, k, v, torch.zeros_like(gate), md), attention(q, k, v, None, md))


def test_the_gate_of_other_tokens_changes_nothing():
    q, k, v, gate = random_inputs((5, 6, 7), prefix=2, suffix=66)
    md, others = metadata((5, 6, 7), prefix=2, suffix=66), [0, 1, *range(212, 278)]
    out, changed = attention(q, k, v, gate, md), gate.clone()
    changed[:, others] = 1e6
    assert torch.equal(attention(q, k, v, changed, md), out)


def test_sparsity_near_one_keeps_one_tile():
    q, k, _, _ = random_inputs((9, 9, 9))
    md = metadata((9, 9, 9), sparsity=0.99)
    selection = selection_by_probe(lambda *qkv: attention(*qkv, None, md), q, k, (9, 9, 9), (4, 4, 4))
    assert {len(tiles) for tiles in selection.values()} == {1} and compute_topk(0.99, 27) == 1


def test_video_tokens_that_no_query_tile_keeps_do_not_matter_without_a_gate():
    thw = (8, 8, 8)
    q, k, v, _ = random_inputs(thw, heads=1)
    md = metadata(thw, sparsity=0.9)
    selection = selection_by_probe(lambda *qkv: attention(*qkv, None, md), q, k, thw, (4, 4, 4))
    unread = set(range(8)) - {tile for tiles in selection.values() for tile in tiles}
    assert unread, "wanted a seed that leaves a tile unread"
    out, poisoned = attention(q, k, v, None, md), v.clone()
    poisoned[:, [token for i in unread for token in tokens_of_tiles(thw, (4, 4, 4))[i]]] = torch.nan
    assert torch.equal(attention(q, k, poisoned, None, md), out)


def test_a_nan_query_token_disturbs_only_its_own_tile():
    thw = (5, 6, 7)
    q, k, v, _ = random_inputs(thw, prefix=2, batch=2)
    md = metadata(thw, prefix=2)
    clean = attention(q, k, v, None, md)
    q[1, 50, 0, 3] = torch.nan
    out = attention(q, k, v, None, md)
    mine = next(group for group in query_groups(thw, (4, 4, 4), 2) if 50 in group)
    assert bool(out[1, 50, 0].isnan().all())
    out[1, mine, 0] = clean[1, mine, 0]
    assert torch.equal(out, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_same_input_gives_the_same_bits_twice(dtype):
    q, k, v, gate = random_inputs((7, 9, 11), prefix=5, dtype=dtype)
    md = metadata((7, 9, 11), prefix=5)
    out = attention(q, k, v, gate, md)
    assert torch.equal(attention(q, k, v, gate, md), out)
    assert torch.equal(attention(q, k, v, gate, metadata((7, 9, 11), prefix=5)), out)


def test_forward_leaves_its_operands_as_they_were():
    inputs = random_inputs((5, 6, 7), prefix=3)
    md, before = metadata((5, 6, 7), prefix=3), inputs.clone()
    impl = VideoSparseAttentionImpl(num_heads=2, head_size=16, causal=False, softmax_scale=None)
    tiled = impl.preprocess_qkv(inputs.flatten(0, 1), md)
    tiled_before = tiled.clone()
    impl.forward(*tiled.chunk(4), md)
    assert torch.equal(inputs, before) and torch.equal(tiled, tiled_before)


@pytest.mark.parametrize("bound", [BOUND[torch.float32], BOUND[torch.float16]])
def test_the_metric_notices_one_dropped_tile_and_nothing_else(bound):
    thw, tile = (7, 9, 11), (4, 4, 4)
    q, k, v, gate = random_inputs(thw)
    right, selection, _ = vsa_attention_oracle(q, k, v, gate, thw, tile, 0.5)
    selection[0, 1, 5] = selection[0, 1, 5][:-1]
    wrong, *_ = vsa_attention_oracle(q, k, v, gate, thw, tile, 0.5, selection=selection)
    errors = relative_l2_per_tile(wrong, right, thw, tile)
    assert float(errors[0, 1, 5]) > 10 * bound
    errors[0, 1, 5] = 0
    assert float(errors.max()) == 0


def test_the_metric_notices_one_padding_key_that_was_not_masked():
    thw, tile = (7, 9, 11), (4, 4, 4)
    q, k, v, gate = random_inputs(thw)
    right, *_ = vsa_attention_oracle(q, k, v, gate, thw, tile, 0.5)
    padded = [torch.cat([x, torch.zeros(1, 1, 2, 16)], dim=1) for x in (q, k, v, gate)]      # a zero key, read by all
    wrong, *_ = vsa_attention_oracle(*padded, thw, tile, 0.5, suffix=1)
    assert float(relative_l2_per_tile(wrong[:, :-1], right, thw, tile).min()) > BOUND[torch.float16]


def test_metadata_holds_the_fields_of_its_model_and_shares_them():
    md = metadata((5, 5, 6), sparsity=0.6)
    assert isinstance(md, VideoSparseAttentionMetadata) and VSA_TILE_SIZE == (4, 4, 4)
    assert list(md.dit_seq_shape) == [5, 5, 6] and list(md.num_tiles) == [2, 2, 2]
    assert (md.current_timestep, md.total_seq_length, md.VSA_sparsity) == (0, 150, 0.6)
    assert md.cache_tile_buf is True and md.tile_buf is None
    assert md.tile_partition_indices[md.reverse_tile_partition_indices].tolist() == list(range(150))
    assert md.variable_block_sizes.tolist() == [64, 32, 16, 8, 16, 8, 4, 2] and md.non_pad_index.shape == (150,)
    shared = md.asdict_zerocopy({"tile_buf"})
    assert "tile_buf" not in shared and shared["non_pad_index"] is md.non_pad_index


def test_the_backend_names_its_classes():
    backend = VideoSparseAttentionBackend
    assert (backend.get_name(), backend.accept_output_buffer) == ("VIDEO_SPARSE_ATTN", True)
    assert backend.get_impl_cls() is VideoSparseAttentionImpl
    assert backend.get_metadata_cls() is VideoSparseAttentionMetadata
    assert backend.get_builder_cls() is VideoSparseAttentionMetadataBuilder
    assert {64, 128} <= set(backend.get_supported_head_sizes())
    assert VideoSparseAttentionMetadataBuilder().prepare() is None


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_a_plan_refuses_an_impossible_sparsity(sparsity):
    with pytest.raises(ValueError, match=f"{sparsity}.*wanted"):
        metadata((5, 5, 6), sparsity=sparsity)


def test_a_latent_smaller_than_its_patch_is_refused():
    with pytest.raises(ValueError, match="3x0x4.*wanted"):
        VideoSparseAttentionMetadataBuilder().build(0, (3, 1, 8), (1, 2, 2), 0.5, CPU)


@pytest.mark.parametrize("options, found", [({"causal": True}, "causal=True"), ({"num_kv_heads": 1}, "1 key heads")])
def test_an_implementation_refuses_what_the_method_has_not(options, found):
    with pytest.raises(ValueError, match=f"{found}.*wanted"):
        VideoSparseAttentionImpl(**{"num_heads": 2, "head_size": 16, "causal": False, "softmax_scale": None, **options})


def test_tensors_that_do_not_fit_the_plan_are_refused():
    md, x = metadata((5, 5, 6)), torch.zeros(1, 512, 2, 16)
    impl = VideoSparseAttentionImpl(num_heads=2, head_size=16, causal=False, softmax_scale=None)
    with pytest.raises(ValueError, match="149.*wanted 150"):
        impl.tile(x[:, :149], md)
    with pytest.raises(ValueError, match="448 slots.*wanted 512"):
        impl.forward(x[:, :448], x[:, :448], x[:, :448], None, md)
    with pytest.raises(ValueError, match=r"gate_compress \[1, 512, 2, 1\].*wanted \[1, 512, 2, 16\]"):
        impl.forward(x, x, x, x[..., :1], md)
    with pytest.raises(ValueError, match="no such kernel"):
        attention(*random_inputs((5, 5, 6))[:3], None, md, backend="no such kernel")
