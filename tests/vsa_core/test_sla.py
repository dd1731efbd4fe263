"""Sparse-linear attention against a float64 oracle, and every point in which upstream leaves a choice."""
import math

import pytest
import torch

from oracles import dense_attention_oracle
from pack.vsa_core.backends.sla import (
    SageSLAAttentionBackend,
    SLAAttentionBackend,
    SLAAttentionImpl,
    SLAAttentionMetadata,
    SLAAttentionMetadataBuilder,
    get_block_map,
    kept_runs,
    mean_pool,
)
from pack.vsa_core.forward_context import set_forward_context
from pack.vsa_core.grid import TokenGrid
from pack.vsa_core.layer import LocalAttention
from pack.vsa_core.selector import AttentionBackendEnum
from sla_oracle import kept_lists, linear_oracle, runs_of, sla_oracle, worst_run

BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4e-3}


def inputs(tokens, batch=1, heads=1, dim=64, dtype=torch.float64, seed=0, offset=0.0):
    """q, k, v whose neighbours resemble each other, so that runs differ in score. offset: of all keys."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, batch, tokens, heads, dim, generator=generator, dtype=torch.float64)
    drift = torch.randn(3, batch, tokens // 48 + 1, heads, dim, generator=generator, dtype=torch.float64)
    x = 0.7 * x + drift.repeat_interleave(48, dim=2)[:, :, :tokens]
    x[1] += offset * torch.randn(dim, generator=generator, dtype=torch.float64)
    return x.to(dtype)


def projection(dim, seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(dim, dim, generator=generator, dtype=torch.float64).mul(dim ** -0.5).to(dtype),
            torch.randn(dim, generator=generator, dtype=torch.float64).mul(0.1).to(dtype))


def affine(weight, bias):
    return lambda x: x @ weight.to(x.dtype).T + bias.to(x.dtype)


def sla(q, k, v, ratio=0.3, weights=None, grid=None, **options):
    """The layer's way, without a projection of its own."""
    impl = SLAAttentionImpl(q.shape[2], q.shape[3], projects=False, backend="reference", **options)
    md = SLAAttentionMetadataBuilder().build(topk_ratio=ratio, grid=grid)
    return impl.attend(q, k, v, md.at(None if weights is None else affine(*weights)))


def lists_of(q, k, ratio, query_run):
    """(b, h, run) -> runs that production keeps."""
    seen = []
    SLAAttentionImpl(q.shape[2], q.shape[3], BLKQ=query_run, projects=False, on_selection=lambda kept, _: seen.append(
        kept)).attend(q, k, k, SLAAttentionMetadata(0, ratio))
    batch, heads, runs, _ = seen[0].shape
    return {(b, h, i): seen[0][b, h, i].tolist() for b in range(batch) for h in range(heads) for i in range(runs)}


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 600, 700, 1024])
@pytest.mark.parametrize("query_run", [64, 128])
@pytest.mark.parametrize(("feature", "dim"), [("softmax", 64), ("softmax", 128), ("elu", 64), ("elu", 128),
                                              ("relu", 64), ("relu", 128)])
def test_it_is_the_oracles_to_the_last_digits(tokens, query_run, feature, dim):
    q, k, v = inputs(tokens, dim=dim)
    weights = projection(dim)
    found = sla(q, k, v, 0.3, weights, BLKQ=query_run, feature_map=feature)
    assert worst_run(found, sla_oracle(q, k, v, 0.3, query_run, feature, *weights)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("feature", ["softmax", "elu", "relu"])
def test_in_narrower_types_it_keeps_to_their_bounds_given_the_same_lists(dtype, feature):
    q, k, v = inputs(700, batch=2, heads=2, dtype=dtype)
    weights = projection(64, dtype=dtype)
    lists = lists_of(q, k, 0.3, 128)
    found = sla(q, k, v, 0.3, weights, feature_map=feature)
    assert found.dtype is dtype and found.is_contiguous()
    assert worst_run(found, sla_oracle(q, k, v, 0.3, 128, feature, *weights, lists=lists)) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("query_run", [64, 128])
@pytest.mark.parametrize("offset", [0.0, 3.0, 30.0])
def test_the_lists_are_upstreams_at_any_offset_of_the_keys_except_where_scores_tie(dtype, query_run, offset):
    q, k, _ = inputs(2000, batch=2, heads=2, dtype=dtype, offset=offset)
    found, (wanted, gaps) = lists_of(q, k, 0.2, query_run), kept_lists(q, k, 0.2, query_run)
    assert found.keys() == wanted.keys() and all(len(kept) == 6 for kept in found.values())
    different = [row for row in wanted if found[row] != wanted[row]]
    assert all(gaps[row] < 1e-3 for row in different) and len(different) <= len(wanted) // 20


def test_runs_of_128_queries_share_one_list_and_runs_of_64_choose_for_themselves():
    q, k, v = inputs(1024)
    coarse, fine = kept_lists(q, k, 0.2, 128)[0], kept_lists(q, k, 0.2, 64)[0]
    assert any(fine[0, 0, 2 * i] != fine[0, 0, 2 * i + 1] for i in range(8)) and len(coarse) == 8
    assert worst_run(sla(q, k, v, 0.2), sla_oracle(q, k, v, 0.2, 128)) <= 1e-12


@pytest.mark.parametrize(("ratio", "runs", "kept"), [
    (0.1, 512, 51), (0.15, 512, 76), (0.1, 1182, 118), (0.15, 1182, 177), (0.1, 256, 25), (0.15, 591, 88),
    (0.29, 100, 28), (1 - 0.9, 480, 47), (1 - 0.8, 480, 95), (1.0, 7, 7), (0.1, 8, 1), (1 / 49, 49, 1), (0.01, 1, 1)])
def test_the_ratio_is_cut_as_upstream_cuts_it_and_one_run_is_always_kept(ratio, runs, kept):
    assert kept_runs(ratio, runs) == kept


def test_a_clip_too_short_for_the_ratio_reads_its_best_run_where_upstream_gives_nan():
    q, k, v = inputs(300)
    found = sla(q, k, v, 0.1)
    assert torch.isfinite(found).all() and all(len(kept) == 1 for kept in lists_of(q, k, 0.1, 64).values())
    assert worst_run(found, sla_oracle(q, k, v, 0.1, 128)) <= 1e-12


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.01, math.nan])
def test_a_ratio_that_is_none_is_refused_wherever_it_comes_in(ratio):
    q, k, v = inputs(64)
    for call in (lambda: SLAAttentionMetadataBuilder().build(topk_ratio=ratio),
                 lambda: SLAAttentionImpl(1, 64, topk_ratio=ratio), lambda: kept_runs(ratio, 4),
                 lambda: SLAAttentionImpl(1, 64).attend(q, k, v, SLAAttentionMetadata(0, ratio)),
                 lambda: get_block_map(q, k, ratio)):
        with pytest.raises(ValueError, match=r"topk_ratio .*: wanted above 0 and at most 1"):
            call()


def test_a_run_may_lose_its_own_keys():
    """Upstream forces no run, and neither does this: q that points away from its own keys does not read them."""
    q, k, _ = inputs(640)
    q[:, :64] = -8 * k[:, :64].mean(1, keepdim=True)
    assert 0 not in lists_of(q, k, 0.3, 64)[0, 0, 0]


def test_a_zero_projection_is_plain_top_k_bit_for_bit():
    q, k, v = inputs(700, heads=2, dtype=torch.float32)
    impl = SLAAttentionImpl(2, 64, backend="reference")
    assert not impl.proj_l.weight.any() and not impl.proj_l.bias.any()
    with torch.no_grad():
        assert torch.equal(impl.attend(q, k, v, SLAAttentionMetadata(0, 0.3)), sla(q, k, v, 0.3))


def test_a_bias_alone_is_added_to_every_token():
    q, k, v = inputs(200)
    bias = projection(64)[1]
    found = sla(q, k, v, 0.5, (torch.zeros(64, 64, dtype=torch.float64), bias))
    assert torch.allclose(found - sla(q, k, v, 0.5), bias.expand_as(found), rtol=0, atol=1e-15)


def test_keeping_everything_is_dense_attention_plus_the_projected_linear_branch():
    q, k, v = inputs(333, heads=2)
    weights = projection(64)
    wanted = dense_attention_oracle(q, k, v) + linear_oracle(q, k, v, *weights, "softmax")
    assert worst_run(sla(q, k, v, 1.0, weights), wanted) <= 1e-12


def test_elements_of_a_batch_do_not_know_of_each_other():
    q, k, v = inputs(500, batch=3)
    together = sla(q, k, v, 0.3, projection(64))
    for b in range(3):
        alone = sla(q[b:b + 1], k[b:b + 1], v[b:b + 1], 0.3, projection(64))
        assert worst_run(alone, together[b:b + 1]) <= 1e-14


def test_moving_tokens_inside_a_run_or_whole_runs_moves_nothing_else():
    q, k, v = inputs(640)
    weights = projection(64)
    before = sla(q, k, v, 0.3, weights, BLKQ=64)
    inside = torch.cat([torch.arange(64), 64 + torch.randperm(64), torch.arange(128, 640)])
    assert worst_run(sla(q[:, inside], k[:, inside], v[:, inside], 0.3, weights, BLKQ=64)[:, 128:],
                     before[:, 128:]) <= 1e-13
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    tokens = (order[:, None] * 64 + torch.arange(64)).flatten()
    assert worst_run(sla(q, k[:, tokens], v[:, tokens], 0.3, weights, BLKQ=64), before) <= 1e-13


def test_no_token_beyond_the_end_is_read_where_upstream_reads_past_it():
    """The last run of keys is short: memory behind it may hold anything."""
    memory = torch.full((3, 1, 128, 1, 64), math.nan, dtype=torch.float32)
    memory[:, :, :70] = inputs(70, dtype=torch.float32)
    q, k, v = memory[:, :, :70]
    assert worst_run(sla(q, k, v, 1.0, projection(64)), sla_oracle(q, k, v, 1.0, 128, "softmax", *projection(64))
                     ) <= 1e-5


def test_fp16_with_elu_at_great_length_stays_finite():
    """Upstream's normaliser is a float16 sum over the keys: it overflows from about 32 thousand on."""
    q, k, v = (x.half() for x in inputs(40000, dtype=torch.float32))
    k = k.abs() + 2
    weights = projection(64)
    found = sla(q[:, :40000], k, v, 0.002, weights, feature_map="elu")
    assert torch.isfinite(found).all()


def test_constant_features_give_the_mean_of_all_values():
    q, k, v = inputs(500)
    eye = torch.eye(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    added = sla(q, torch.zeros_like(k), v, 0.5, eye) - sla(q, torch.zeros_like(k), v, 0.5)
    assert worst_run(added, v.mean(1, keepdim=True).expand_as(v)) <= 1e-5


@pytest.mark.parametrize("hidden", [(), (1, 3, 4)])
def test_tokens_that_are_not_video_are_read_by_all_and_read_everything(hidden):
    q, k, v = inputs(406, heads=2)
    weights, grid = projection(64), TokenGrid((4, 10, 10), suffix=6, hidden=hidden)
    k[:, [400 + place for place in hidden]] = 50.0
    found = sla(q, k, v, 0.3, weights, grid=grid)
    wanted = sla_oracle(q, k, v, 0.3, 128, "softmax", *weights, video=400, hidden=[400 + place for place in hidden])
    assert worst_run(found, wanted) <= 1e-12


def test_tokens_before_the_clip_do_not_shift_its_runs():
    q, k, v = inputs(406)
    turned = [torch.roll(x, 6, dims=1) for x in (q, k, v)]
    after = sla(q, k, v, 0.3, projection(64), TokenGrid((4, 10, 10), suffix=6))
    before = sla(*turned, 0.3, projection(64), TokenGrid((4, 10, 10), prefix=6))
    assert worst_run(torch.roll(before, -6, dims=1), after) <= 1e-13


def test_a_sequence_of_another_length_than_the_metadatas_is_refused():
    with pytest.raises(ValueError, match="found a sequence of 64 tokens, wanted 80"):
        sla(*inputs(64), 0.5, grid=TokenGrid((1, 8, 10)))


@pytest.mark.parametrize(("options", "message"), [
    ({"causal": True}, "not causal"), ({"num_kv_heads": 1}, "found 1 key heads for 2 query heads"),
    ({"BLKQ": 32}, "wanted BLKQ 64 or 128 and BLKK 64"), ({"BLKK": 128}, "BLKK 64"),
    ({"feature_map": "hedgehog"}, "Unknown feature map: hedgehog; wanted one of softmax, elu, relu")])
def test_what_sla_has_no_rule_for_is_refused_where_upstream_ignores_it(options, message):
    with pytest.raises(ValueError, match=message):
        SLAAttentionImpl(2, 64, **options)


def test_queries_and_keys_of_different_length_are_refused():
    q, k, v = inputs(128)
    with pytest.raises(ValueError, match=r"found q \[1, 128, 1, 64\], k \[1, 64, 1, 64\]"):
        SLAAttentionImpl(1, 64).attend(q, k[:, :64], v[:, :64], None)


def test_the_metadatas_ratio_wins_over_the_implementations_and_its_default_is_a_half():
    q, k, v = inputs(640)
    impl = SLAAttentionImpl(1, 64, topk_ratio=0.1, projects=False)
    assert torch.equal(impl.attend(q, k, v, None), sla(q, k, v, 0.1))
    assert torch.equal(impl.attend(q, k, v, SLAAttentionMetadata(0)), sla(q, k, v, 0.5))
    assert SLAAttentionMetadataBuilder().build().topk_ratio == 0.5 and SLAAttentionImpl(1, 64).topk_ratio == 0.1


def test_a_scale_is_honoured_and_zero_means_the_usual_one():
    q, k, v = inputs(300)
    assert worst_run(sla(q, k, v, 0.4, softmax_scale=0.3), sla_oracle(q, k, v, 0.4, 128, scale=0.3)) <= 1e-12
    assert torch.equal(sla(q, k, v, 0.4, softmax_scale=0.0), sla(q, k, v, 0.4))


def test_the_block_map_is_the_selection_in_upstreams_shapes():
    q, k, _ = inputs(700, batch=2, heads=2)
    sparse_map, lut, topk = get_block_map(q.transpose(1, 2), k.transpose(1, 2), 0.3, BLKQ=128)
    assert (sparse_map.shape, sparse_map.dtype) == ((2, 2, 6, 11), torch.int8)
    assert (lut.shape, lut.dtype, topk) == ((2, 2, 6, 3), torch.int64, 3)
    wanted = kept_lists(q, k, 0.3, 128)[0]
    for (b, h, i), kept in wanted.items():
        assert lut[b, h, i].tolist() == kept == sparse_map[b, h, i].nonzero().flatten().tolist()


@pytest.mark.parametrize("run", [16, 64, 100, 128])
def test_pooled_means_are_those_of_the_tokens_that_are_there(run):
    x = inputs(333, batch=2, heads=2, dtype=torch.float32)[0].transpose(1, 2)
    wanted = torch.stack([x[:, :, rows].double().mean(2) for rows in runs_of(333, run)], dim=2)
    found = mean_pool(x, run)
    assert found.shape == wanted.shape and float((found - wanted).norm() / wanted.norm()) <= 1e-6
    assert mean_pool(x.bfloat16(), run).dtype is torch.bfloat16


@pytest.mark.parametrize(("member", "backend", "ratio"), [("SLA_ATTN", SLAAttentionBackend, 0.1),
                                                          ("SAGE_SLA_ATTN", SageSLAAttentionBackend, 0.5)])
def test_a_layer_runs_it_and_has_its_projection_as_a_part(member, backend, ratio):
    q, k, v = inputs(200, dtype=torch.float32)
    layer = LocalAttention(1, 64, supported_attention_backends=(AttentionBackendEnum[member],))
    assert set(layer.state_dict()) == {"attn_impl.proj_l.weight", "attn_impl.proj_l.bias"}
    assert layer.attn_backend is backend and layer.attn_impl.topk_ratio == ratio
    weight, bias = projection(64, dtype=torch.float32)
    md = backend.get_builder_cls()().build(0, topk_ratio=1.0)
    with torch.no_grad(), set_forward_context(md):
        plain = layer(q, k, v)
        layer.load_state_dict({"attn_impl.proj_l.weight": weight, "attn_impl.proj_l.bias": bias})
        found = layer(q, k, v) - plain
    assert worst_run(found, linear_oracle(q, k, v, weight, bias, "softmax")) <= 1e-5


def test_layers_share_what_was_made_for_the_shape():
    q, k, v = inputs(200)
    md = SLAAttentionMetadata(0, 0.5)
    for weights in (projection(64), projection(64, seed=2)):
        SLAAttentionImpl(1, 64, projects=False).attend(q, k, v, md.at(affine(*weights)))
    assert len(md.layouts) == 1
