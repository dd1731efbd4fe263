"""Sliding tile attention against a float64 oracle per query, against FlexAttention, and at upstream's own shapes."""
from math import prod

import pytest
import torch
from einops import rearrange
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oracles import dense_attention_oracle, relative_l2_per_tile
from pack.vsa_core.backends.sliding_tile_attn import (
    UPSTREAM_SHAPES,
    RangeDict,
    SlidingTileAttentionBackend,
    SlidingTileAttentionImpl,
    SlidingTileAttentionMetadata,
    SlidingTileAttentionMetadataBuilder,
)
from sta_oracle import sta_attention_oracle, sta_one_query

BOUND = {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4e-3}


def metadata(thw, window=(1, 1, 1), tile=(4, 4, 4), prefix=0, suffix=0, hidden=()):
    return SlidingTileAttentionMetadataBuilder().build(
        window, 0, raw_latent_shape=thw, tile_size=tile, prefix=prefix, suffix=suffix, hidden=hidden)


def random_inputs(tokens, heads=2, dim=8, batch=1, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, batch, tokens, heads, dim, generator=generator, dtype=torch.float64).to(dtype)


def attention(q, k, v, md, **options):
    """The whole way of a layer: stack, tile, forward, untile."""
    impl = SlidingTileAttentionImpl(num_heads=q.shape[2], head_size=q.shape[3], **options)
    tiled = impl.preprocess_qkv(torch.cat([q, k, v]), md)
    return impl.postprocess_output(impl.forward(*tiled.chunk(3), md), md)


def check_against_oracle(thw, tile, windows, prefix=0, suffix=0, hidden=(), dtype=torch.float32, batch=1, scale=None):
    q, k, v = random_inputs(prefix + prod(thw) + suffix, len(windows), batch=batch, dtype=dtype)
    md = metadata(thw, [[list(windows)]], tile, prefix, suffix, hidden).at(0, layer=0)
    out = attention(q, k, v, md, softmax_scale=scale)
    wanted = sta_attention_oracle(q, k, v, thw, tile, windows, prefix, suffix, hidden, scale)
    assert out.dtype == dtype and out.shape == q.shape
    assert float(relative_l2_per_tile(out, wanted, thw, tile, prefix, suffix).max()) <= BOUND[dtype]


tile_sizes = st.sampled_from([(4, 4, 4), (2, 4, 8), (1, 8, 8), (4, 4, 8), (3, 5, 4), (2, 2, 2), (6, 8, 8), (1, 3, 64)])
widths = st.tuples(*[st.integers(1, 7)] * 3)


@settings(max_examples=40, deadline=None)
@given(thw=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9)), tile=tile_sizes,
       windows=st.lists(widths, min_size=1, max_size=3), prefix=st.integers(0, 70), suffix=st.integers(0, 70),
       hides=st.booleans())
@example(thw=(5, 9, 9), tile=(1, 2, 2), windows=[(4, 2, 2), (2, 4, 4)], prefix=0, suffix=0, hides=False)
@example(thw=(7, 9, 11), tile=(2, 2, 2), windows=[(1, 1, 1), (9, 9, 9), (3, 2, 5)], prefix=0, suffix=256, hides=True)
@example(thw=(1, 1, 1), tile=(6, 8, 8), windows=[(1, 1, 1)], prefix=0, suffix=1, hides=True)
def test_output_is_the_oracles_for_any_grid_tile_window_and_text(thw, tile, windows, prefix, suffix, hides):
    hidden = tuple(range(1, prefix + suffix, 3)) if hides else ()
    check_against_oracle(thw, tile, windows, prefix, suffix, hidden)


@pytest.mark.parametrize("dtype", list(BOUND), ids=str)
def test_output_is_the_oracles_in_every_dtype(dtype):
    check_against_oracle((7, 9, 11), (4, 4, 4), [(1, 3, 1), (2, 1, 3), (1, 1, 1)], suffix=5, dtype=dtype, batch=2)


@pytest.mark.parametrize("text", [0, 1, 63, 64, 65, 255, 256])
def test_text_of_every_length_is_seen_by_all_and_sees_all(text):
    check_against_oracle((5, 6, 7), (2, 4, 4), [(1, 1, 1), (3, 1, 1)], suffix=text)


def test_the_scale_is_the_one_that_was_asked_for():
    check_against_oracle((5, 6, 7), (4, 4, 4), [(1, 1, 1)], scale=0.9)


def test_a_six_by_eight_by_eight_tile_with_other_windows_per_head_matches_the_oracle():
    check_against_oracle((13, 9, 9), (6, 8, 8), [(1, 2, 1), (3, 1, 1), (1, 1, 2)], suffix=3)


def test_the_oracle_of_a_full_window_is_dense_attention_and_of_a_narrow_one_is_not():
    q, k, v = random_inputs(5 * 6 * 7 + 3, dtype=torch.float64)
    full = sta_attention_oracle(q, k, v, (5, 6, 7), (2, 2, 2), [(3, 3, 4), (9, 9, 9)], suffix=3)
    torch.testing.assert_close(full, dense_attention_oracle(q, k, v), rtol=1e-12, atol=1e-12)
    narrow = sta_attention_oracle(q, k, v, (5, 6, 7), (2, 2, 2), [(3, 3, 3), (3, 3, 3)], suffix=3)
    assert float((narrow - full).norm() / full.norm()) > 0.1


@pytest.mark.parametrize("window", [(2, 2, 2), (8, 8, 8), (1.0, 1.0, 1.0)], ids=str)
@pytest.mark.parametrize("text", [0, 70])
def test_a_window_of_the_whole_grid_is_dense_attention(window, text):
    thw = (5, 6, 7)
    q, k, v = random_inputs(prod(thw) + text, batch=2)
    errors = relative_l2_per_tile(attention(q, k, v, metadata(thw, window, suffix=text)),
                                  dense_attention_oracle(q, k, v), thw, (4, 4, 4), suffix=text)
    assert float(errors.max()) <= BOUND[torch.float32]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("thw, tile, text", [((6, 8, 12), (2, 4, 4), 0), ((5, 9, 7), (2, 3, 2), 13)], ids=str)
def test_output_is_flex_attentions_with_upstreams_mask(thw, tile, text):
    flex = pytest.importorskip("torch.nn.attention.flex_attention", reason="FlexAttention came with torch 2.5")
    windows = torch.tensor([(1, 1, 3), (3, 2, 1), (2, 4, 4), (1, 3, 1)])
    video = prod(thw)
    q, k, v = random_inputs(video + text, heads=4, dim=16, batch=2)
    place = torch.arange(video + text).clamp(max=video - 1)
    axis = [place // (thw[1] * thw[2]) // tile[0], place // thw[2] % thw[1] // tile[1], place % thw[2] // tile[2]]
    tiles = [-(-size // side) for size, side in zip(thw, tile)]

    def mask(b, h, q_idx, kv_idx):
        inside = (q_idx < video) & (kv_idx < video)
        for a in range(3):
            half = windows[h, a] // 2
            centre = torch.minimum(torch.maximum(axis[a][q_idx], half), tiles[a] - 1 - half)
            inside = inside & ((centre - axis[a][kv_idx]).abs() <= half)
        return inside | (q_idx >= video) | (kv_idx >= video)

    wanted = flex.flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=flex.create_block_mask(
        mask, None, 4, video + text, video + text, device="cpu", BLOCK_SIZE=32)).transpose(1, 2)
    md = metadata(thw, [[windows.tolist()]], tile, suffix=text).at(0, layer=0)
    errors = relative_l2_per_tile(attention(q, k, v, md), wanted, thw, tile, suffix=text)
    assert float(errors.max()) <= BOUND[torch.float32]


@pytest.mark.parametrize("tokens, thw", [(115200, (30, 48, 80)), (82944, (36, 48, 48)), (69120, (18, 48, 80))])
def test_upstreams_grids_are_tiled_in_upstreams_order(tokens, thw):
    x = torch.arange(tokens, dtype=torch.float32).view(1, tokens, 1, 1)
    impl = SlidingTileAttentionImpl(num_heads=1, head_size=1)
    tiled = impl.tile(x)
    wanted = rearrange(x, "b (n_t t n_h h n_w w) a d -> b (n_t n_h n_w t h w) a d", t=6, h=8, w=8,
                       n_t=thw[0] // 6, n_h=thw[1] // 8, n_w=thw[2] // 8)
    assert torch.equal(tiled, wanted) and torch.equal(impl.untile(tiled), x)


@pytest.mark.parametrize("tokens", [115201, 115210, 115264, 115456])
def test_text_behind_upstreams_grid_comes_back_without_metadata(tokens):
    x = torch.arange(tokens, dtype=torch.float32).view(1, tokens, 1, 1)
    impl = SlidingTileAttentionImpl(num_heads=1, head_size=1)
    tiled = impl.tile(x)
    assert tiled.shape[1] % 64 == 0 and torch.equal(impl.untile(tiled), x)


def test_a_full_hunyuan_sequence_with_text_is_the_oracles_without_being_told_its_grid():
    windows, text = [(1, 1, 3), (3, 1, 1)], 77
    q, k, v = random_inputs(115200 + text, heads=2, dim=4)
    md = SlidingTileAttentionMetadataBuilder().build([[windows]], 0)
    out = attention(q, k, v, md, prefix="blocks.0.attn1.impl")
    assert list(md.layout.dit_seq_shape) == [30, 48, 80] and md.layout.grid.suffix == text
    for place in (0, 79, 3840 * 5 + 47 * 80, 57637, 115199, 115200, 115276):
        wanted = sta_one_query(q, k, v, (30, 48, 80), (6, 8, 8), windows, place, suffix=text)
        assert float((out[:, place] - wanted).norm() / wanted.norm()) <= 1e-5


@pytest.mark.parametrize("step, layer, window",
                         [(0, 0, (1, 1, 1)), (0, 1, (2, 2, 2)), (1, 0, (3, 1, 1)), (1, 1, (1, 1, 3))])
def test_the_windows_are_those_of_the_step_and_the_layer(step, layer, window):
    thw, heads = (6, 6, 6), 2
    table = [[[(1, 1, 1)] * heads, [(2, 2, 2)] * heads], [[(3, 1, 1)] * heads, [(1, 1, 3)] * heads]]
    q, k, v = random_inputs(216)
    wanted = attention(q, k, v, metadata(thw, window, (2, 2, 2)))
    md = metadata(thw, table, (2, 2, 2))
    assert torch.equal(attention(q, k, v, md.at(step, layer=layer)), wanted)
    assert torch.equal(attention(q, k, v, md.at(step), prefix=f"blocks.{layer}.attn1.impl"), wanted)
    assert torch.equal(attention(q, k, v, md.at(step, layer, STA_param=window)), wanted)


def test_a_range_dict_finds_numbers_in_ranges_and_names_its_keys_otherwise():
    shapes = RangeDict({(10, 20): "range", 5: "one"})
    assert [shapes[10], shapes[20], shapes[15], shapes[5]] == ["range"] * 3 + ["one"]
    assert [number in shapes for number in (9, 10, 20, 21, 5, (10, 20), "x")] == [False, True, True, False, True, True,
                                                                                  False]
    assert [shapes.get(15), shapes.get(21), shapes.get(21, "none"), shapes.get(5)] == ["range", None, "none", "one"]
    with pytest.raises(KeyError, match="21 tokens: wanted 10 to 20, 5"):
        shapes[21]
    assert UPSTREAM_SHAPES[115456] == (30, 48, 80)
    with pytest.raises(KeyError, match="115457"):
        UPSTREAM_SHAPES[115457]


def test_the_same_input_gives_the_same_bits_twice_and_is_left_alone():
    q, k, v = random_inputs(7 * 9 * 11 + 5)
    md = metadata((7, 9, 11), (1, 3, 1), suffix=5)
    before = [x.clone() for x in (q, k, v)]
    out = attention(q, k, v, md)
    assert torch.equal(attention(q, k, v, md), out)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before))
    assert torch.equal(SlidingTileAttentionImpl(2, 8).attend(q, k, v, md), out)


def test_values_outside_the_window_do_not_matter_even_when_they_are_nan():
    q, k, v = random_inputs(216)
    md = metadata((6, 6, 6), (1, 1, 1), (2, 2, 2))
    out = attention(q, k, v, md)
    v[0, -1] = torch.nan                                           # the last token, in the last tile
    poisoned = attention(q, k, v, md)
    last_tile = [(t * 6 + h) * 6 + w for t in (4, 5) for h in (4, 5) for w in (4, 5)]
    assert bool(poisoned[0, last_tile].isnan().all())
    poisoned[0, last_tile] = out[0, last_tile]
    assert torch.equal(poisoned, out)


def test_the_density_of_a_call_is_the_share_of_pairs_that_it_computes():
    md = metadata((7, 9, 11), [[[(1, 1, 1), (2, 3, 3)]]], suffix=10).at(0, 0)
    q, k, v = random_inputs(703, dim=1)
    seen = torch.zeros(2)
    for first in range(0, 703, 64):                                # a value of 1 for one key at a time, 64 columns
        v = torch.eye(703)[None, :, None, first:first + 64].expand(1, 703, 2, -1)
        width = v.shape[-1]
        flat = [torch.zeros(1, 703, 2, width)] * 2
        seen += (attention(*flat, v.contiguous(), md) > 0).sum(dim=(0, 1, 3))
    assert md.density(2) == pytest.approx(float(seen.sum()) / 2 / 703 ** 2, rel=1e-9)


@pytest.mark.parametrize("options, found", [({"causal": True}, "causal=True"), ({"num_kv_heads": 1}, "1 key heads")])
def test_an_implementation_refuses_what_the_method_has_not(options, found):
    with pytest.raises(ValueError, match=f"{found}.*wanted"):
        SlidingTileAttentionImpl(**{"num_heads": 2, "head_size": 16, **options})


@pytest.mark.parametrize("window, found", [
    ((0, 1, 1), "t is 0, wanted at least 1"), ((1, -3, 1), "h is -3"), ((1, 1), r"\(1, 1\): wanted three"),
    ((1.0, 1.5, 1.0), "h is 1.5, wanted a fraction above 0 and at most 1"), ((0.0, 1.0, 1.0), "t is 0.0"),
    (None, "STA_param None"), ([], r"STA_param \[\]"), ("333", "STA_param '333'")])
def test_a_window_that_is_none_is_refused(window, found):
    with pytest.raises(ValueError, match=found):
        metadata((5, 5, 6), window)


def test_windows_of_one_step_are_taken_as_layers_of_heads_whatever_the_step():
    row = [[(1, 1, 1), (2, 2, 2)], [(3, 1, 1), (1, 1, 3)]]
    q, k, v = random_inputs(150)
    of_step, of_run = metadata((5, 5, 6), row), metadata((5, 5, 6), [row])
    assert torch.equal(attention(q, k, v, of_step.at(7, 1)), attention(q, k, v, of_run.at(0, 1)))
    with pytest.raises(ValueError, match="step 7, layer 2: STA_param has 2 layers"):
        of_step.at(7, 2).windows(2)


@pytest.mark.parametrize("param", [lambda row: [[row]], lambda row: [row]], ids=["of a run", "of a step"])
def test_a_rank_with_some_heads_uses_their_windows(param):
    row = [(1, 1, 1), (2, 2, 2), (3, 1, 1), (1, 1, 3)]
    q, k, v = random_inputs(150, heads=4)
    whole = attention(q, k, v, metadata((5, 5, 6), param(row)).at(0, 0))
    for first in (0, 2):
        impl = SlidingTileAttentionImpl(num_heads=2, head_size=8)
        impl.first_head, part = first, slice(first, first + 2)
        out = impl.attend(q[:, :, part], k[:, :, part], v[:, :, part], metadata((5, 5, 6), param(row)).at(0, 0))
        assert torch.equal(out, whole[:, :, part])
    with pytest.raises(ValueError, match="STA_param has 4 heads, wanted those from 3 to 4"):
        metadata((5, 5, 6), param(row)).at(0, 0).windows(2, first_head=3)


def test_windows_that_a_strategy_lacks_are_named():
    md = metadata((5, 5, 6), [[[(1, 1, 1), (1, 1, 1)]], [[(1, 1, 1), None]]])
    for call, found in [(md.at(2, 0), "step 2, layer 0: STA_param has 2 steps"),
                        (md.at(0, 1), "step 0, layer 1: STA_param has 1 layers"),
                        (md.at(1, 0), "step 1, layer 0: head 1 has none"), (md.at(0), "layer is unknown")]:
        with pytest.raises(ValueError, match=found):
            call.windows(2)
    with pytest.raises(ValueError, match="2 heads, the model 3"):
        md.at(0, 0).windows(3)
    with pytest.raises(ValueError, match="t is 0, wanted at least 1"):
        attention(*random_inputs(150), md.at(0, 0, STA_param=[[[(0, 1, 1), (1, 1, 1)]]]))


def test_tensors_that_do_not_fit_the_plan_are_refused():
    md, x = metadata((5, 5, 6)), torch.zeros(1, 512, 2, 16)
    impl = SlidingTileAttentionImpl(num_heads=2, head_size=16)
    with pytest.raises(ValueError, match="149.*wanted 150"):
        impl.tile(x[:, :149], md)
    with pytest.raises(ValueError, match="448 slots, wanted 512"):
        impl.forward(*[x[:, :448]] * 3, md)
    with pytest.raises(ValueError, match="wanted the output of preprocess_qkv"):
        impl.forward(x, x, x, SlidingTileAttentionMetadataBuilder().build((1, 1, 1), 0))
    with pytest.raises(ValueError, match="no coarse branch"):
        impl.attend(x, x, x, md, x)
    with pytest.raises(ValueError, match="wanted raw_latent_shape"):
        SlidingTileAttentionMetadataBuilder().build((0.5, 0.5, 0.5), 0)


def test_the_backend_names_its_classes():
    backend = SlidingTileAttentionBackend
    assert (backend.get_name(), backend.accept_output_buffer) == ("SLIDING_TILE_ATTN", True)
    assert backend.get_impl_cls() is SlidingTileAttentionImpl
    assert backend.get_metadata_cls() is SlidingTileAttentionMetadata
    assert backend.get_builder_cls() is SlidingTileAttentionMetadataBuilder
    assert SlidingTileAttentionMetadataBuilder().prepare() is None
