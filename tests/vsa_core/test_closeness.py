"""How close sparse came to exact attention, against float64 sums over one query at a time, and what is sampled."""
from itertools import product
from math import ceil, prod

import pytest
import torch

from oracles import other_tokens, tokens_of_tiles, vsa_attention_oracle
from pack.vsa_core import closeness
from pack.vsa_core.backends.sliding_tile_attn import SlidingTileAttentionImpl, SlidingTileAttentionMetadataBuilder
from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder
from pack.vsa_core.closeness import Launch, Place, closeness_of, sampling_rate
from sta_oracle import keys_of_query

WINDOWS = ((1, 1, 1), (3, 1, 3), (9, 9, 9))


def inputs(tokens, heads=3, batch=2, dim=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(3, batch, tokens, heads, dim, generator=generator)
    return (x + torch.randn(3, batch, tokens // 20 + 1, heads, dim, generator=generator)
            .repeat_interleave(20, dim=2)[:, :, :tokens]).to(dtype)


def told(impl, q, k, v, md):
    """The output, the lists that the kernel was given, and their layout."""
    launches, layouts = [], []

    def on_lists(heads, indices, counts, layout):
        launches.append(Launch(heads, indices, counts))
        layouts.append(layout)
    impl.on_lists = on_lists
    return impl.attend(q, k, v, md), launches, layouts[0]


def oracle(q, k, v, out, queries, seen, read, row, head):
    """(tokens, mass kept, relative error) of queries at raster places, in float64."""
    q, k, v, out = (x[row, :, head].double() for x in (q, k, v, out))
    kept, error, norm = 0.0, 0.0, 0.0
    is_read = torch.tensor([key in read for key in seen])
    for place in queries:
        scores = k[seen] @ q[place] * q.shape[-1] ** -0.5
        weights = (scores - scores.max()).exp()
        weights = weights / weights.sum()
        kept += weights[is_read].sum().item()
        exact = weights @ v[seen]
        error, norm = error + (out[place] - exact).square().sum().item(), norm + exact.square().sum().item()
    return len(queries), kept / max(len(queries), 1), (error / norm) ** 0.5 if norm else 0.0


def check(figures, wanted):
    figures, wanted = figures.double(), torch.tensor(wanted, dtype=torch.float64)
    assert torch.equal(figures[:, 0], wanted[:, 0])
    assert ((figures - wanted).abs() <= 1e-5 * wanted.abs() + 1e-7).all(), (figures - wanted).abs().max()


@pytest.mark.parametrize("chunk", [64 << 20, 1], ids=["whole", "in chunks"])
@pytest.mark.parametrize(("thw", "tile", "prefix", "suffix", "hidden", "dtype"), [
    ((5, 9, 7), (2, 4, 4), 0, 0, (), torch.float32),
    ((3, 9, 10), (2, 8, 8), 5, 70, (1, 6, 40), torch.float32),
    ((5, 9, 7), (2, 4, 4), 3, 4, (0, 6), torch.bfloat16),
])
def test_figures_of_windows_per_head_are_those_of_the_definition(
        thw, tile, prefix, suffix, hidden, dtype, chunk, monkeypatch):
    monkeypatch.setattr(closeness, "CHUNK_BYTES", chunk)
    q, k, v = inputs(prefix + prod(thw) + suffix, dtype=dtype)
    md = SlidingTileAttentionMetadataBuilder().build(
        [[list(WINDOWS)]], 0, raw_latent_shape=thw, tile_size=tile, prefix=prefix, suffix=suffix,
        hidden=hidden).at(0, layer=0)
    out, launches, layout = told(SlidingTileAttentionImpl(3, 16), q, k, v, md)
    tiles = tokens_of_tiles(thw, tile, prefix)
    per_tile = ceil(prod(tile) / 64)
    places = [Place(i % 2, i % 3, i) for i in range(len(tiles) * per_tile)]
    gone = {token for i, token in enumerate(other_tokens(thw, prefix, suffix)) if i in hidden}
    seen = [key for key in range(q.shape[1]) if key not in gone]
    wanted = []
    for row, head, block in places:
        queries = tiles[block // per_tile][block % per_tile * 64:][:64]
        read = set(keys_of_query(queries[0], thw, tile, WINDOWS[head], prefix, suffix, hidden)) if queries else set()
        wanted.append(oracle(q, k, v, out, queries, seen, read, row, head))
    check(closeness_of(q, k, v, out, places, launches, layout, 16 ** -0.5), wanted)


def test_figures_of_chosen_tiles_are_those_of_the_definition():
    thw, tile, prefix, suffix = (5, 7, 9), (2, 4, 4), 3, 9
    q, k, v = inputs(prefix + prod(thw) + suffix)
    tiles = tokens_of_tiles(thw, tile, prefix)
    md = VideoSparseAttentionMetadataBuilder().build(
        current_timestep=0, raw_latent_shape=thw, patch_size=(1, 1, 1), device=torch.device("cpu"), tile_size=tile,
        VSA_sparsity=0.7, prefix=prefix, suffix=suffix)
    out, launches, layout = told(VideoSparseAttentionImpl(3, 16), q, k, v, md)
    _, chosen, _ = vsa_attention_oracle(q, k, v, None, thw, tile, md.topk, prefix, suffix)
    others = other_tokens(thw, prefix, suffix)
    places = [Place(*place) for place in product(range(2), range(3), range(len(tiles)))]
    wanted = [oracle(q, k, v, out, tiles[place.block], list(range(q.shape[1])),
                     {token for tile_ in chosen[tuple(place)] for token in tiles[tile_]} | set(others),
                     place.row, place.head) for place in places]
    check(closeness_of(q, k, v, out, places, launches, layout, 16 ** -0.5), wanted)
    assert min(row[1] for row in wanted) < 0.5 and max(row[2] for row in wanted) > 0.05, "nothing was left out"


def test_attention_in_slot_order_tells_the_same_lists():
    q, k, v = inputs(5 * 7 * 9)
    md = VideoSparseAttentionMetadataBuilder().build(0, (5, 7, 9), (1, 1, 1), 0.7, torch.device("cpu"), (2, 4, 4))
    impl = VideoSparseAttentionImpl(3, 16)
    _, (here,), _ = told(impl, q, k, v, md)
    lists = []
    impl.on_lists = lambda *told: lists.append(told)
    impl.forward(*impl.preprocess_qkv(torch.cat([q, k, v]), md).chunk(3), None, md)
    assert len(lists) == 1 and torch.equal(lists[0][1], here.indices) and torch.equal(lists[0][2], here.counts)


def test_values_of_zero_are_no_error():
    q, k, v = inputs(4 * 4 * 8)
    md = VideoSparseAttentionMetadataBuilder().build(0, (4, 4, 8), (1, 1, 1), 0.5, torch.device("cpu"))
    out, launches, layout = told(VideoSparseAttentionImpl(3, 16), q, k, v * 0, md)
    assert closeness_of(q, k, v * 0, out, [Place(0, 0, 1)], launches, layout, 0.25)[0, 2] == 0


@pytest.mark.parametrize(("tokens", "heads"), [(12288, 12), (32760, 12), (32760, 40), (75600, 40), (118800, 24)])
def test_measured_calls_of_a_long_run_take_less_than_a_hundredth_of_the_attention(tokens, heads):
    """Counted in products at a tenth of all pairs, a product in float32 at a fortieth of a tensor core's speed."""
    tiles, every = sampling_rate(tokens, heads, expected_calls=2000)
    measured = tiles * 64 * tokens * 40
    assert measured <= 0.011 * every * 0.1 * heads * tokens ** 2


def test_short_runs_have_measured_calls_too():
    assert sampling_rate(150, 2, 4) == (2, 1) and sampling_rate(32760, 12, 30)[1] <= 30 // 4
