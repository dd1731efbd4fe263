"""Moving tokens into tiles and back: zero tolerance, against layouts written out token by token."""
from itertools import product
from math import ceil, prod

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oracles import exact_topk, tile_of_token, tiled_layout, tokens_of_tiles
from pack.vsa_core.backends.video_sparse_attn import (
    VideoSparseAttentionImpl,
    VideoSparseAttentionMetadataBuilder,
    compute_topk,
    construct_variable_block_sizes,
    get_non_pad_index,
    get_reverse_tile_partition_indices,
    get_tile_partition_indices,
)
from pack.vsa_core.grid import TokenGrid
from pack.vsa_core.tiling import auto_tile_size, num_tiles, parse_tile_size, tile_slots

CPU = torch.device("cpu")
FULL_TILES = [(t, h, volume // (t * h)) for volume in (64, 128, 256)
              for t, h in product(range(1, volume + 1), repeat=2) if volume % (t * h) == 0]
ODD_TILES = [(3, 8, 8), (1, 3, 64), (4, 4, 12), (5, 8, 8), (6, 8, 8), (7, 8, 8), (64, 3, 1)]

# clip, (t, h, w), tokens, tiles, tiles without padding (None: not counted), tiles kept at sparsity 0.8, 0.9, 0.95.
# Six entries at 0.95 are one less than ceil of the float product, which overshoots there (520 * 0.05 is 26, not 27).
CLIPS = [
    ("Wan 480x832x81", (21, 30, 52), 32760, (6, 8, 13), 455, (125, 63, 32)),
    ("448x832x81", (21, 28, 52), 30576, (6, 7, 13), 455, (110, 55, 28)),
    ("448x832x61", (16, 28, 52), 23296, (4, 7, 13), 364, (73, 37, 19)),
    ("448x832x77", (20, 28, 52), 29120, (5, 7, 13), 455, (91, 46, 23)),
    ("480x832x77", (20, 30, 52), 31200, (5, 8, 13), 455, (104, 52, 26)),
    ("Wan 720x1280x81", (21, 45, 80), 75600, (6, 12, 20), 1100, (288, 144, 72)),
    ("768x1280x81", (21, 48, 80), 80640, (6, 12, 20), None, (288, 144, 72)),
    ("768x1280x77", (20, 48, 80), 76800, (5, 12, 20), 1200, (240, 120, 60)),
    ("768x1280x69", (18, 48, 80), 69120, (5, 12, 20), None, (240, 120, 60)),
    ("Wan2.2-5B 704x1280x121", (31, 22, 40), 27280, (8, 6, 10), 350, (96, 48, 24)),
    ("512x512x81", (21, 32, 32), 21504, (6, 8, 8), None, (77, 39, 20)),
    ("Hunyuan 768x1280x117", (30, 48, 80), 115200, (8, 12, 20), None, (384, 192, 96)),
    ("Hunyuan 720x1280x129", (33, 45, 80), 118800, (9, 12, 20), None, (432, 216, 108)),
    ("HV1.5 720p x121", (31, 45, 80), 111600, (8, 12, 20), None, (384, 192, 96)),
    ("HV 480x848x121", (31, 30, 53), 49290, (8, 8, 14), None, (180, 90, 45)),
    ("LTX-2 768x1280x121", (16, 24, 40), 15360, (4, 6, 10), 240, (48, 24, 12)),
]


def metadata(thw, tile, prefix=0, suffix=0, sparsity=0.5):
    return VideoSparseAttentionMetadataBuilder().build(
        current_timestep=0, raw_latent_shape=thw, patch_size=(1, 1, 1), VSA_sparsity=sparsity, device=CPU,
        tile_size=tile, prefix=prefix, suffix=suffix)


def implementation():
    return VideoSparseAttentionImpl(num_heads=2, head_size=3, causal=False, softmax_scale=1.0)


def bits(x):
    return x.contiguous().view(torch.int32)


@st.composite
def grids(draw, most=3000):
    t = draw(st.integers(1, 40))
    h = draw(st.integers(1, min(40, most // t)))
    return t, h, draw(st.integers(1, min(40, most // (t * h))))


def check_tiling_round_trip(thw, tile, prefix=0, suffix=0, batch=1):
    """Tile twice through one buffer, NaN first; every slot of the second pass is what the layout says, bit for bit."""
    layout = tiled_layout(thw, tile, prefix, suffix)
    tokens = prefix + prod(thw) + suffix
    md, impl = metadata(thw, tile, prefix, suffix), implementation()
    impl.tile(torch.full((batch, tokens, 2, 3), torch.nan), md)
    x = torch.arange(1, batch * tokens * 6 + 1, dtype=torch.float32).view(batch, tokens, 2, 3)
    x[:, ::7, 0] = -0.0
    x[:, 1::7, 1] = torch.nan
    tiled = impl.tile(x, md)
    wanted = torch.zeros(batch, len(layout), 2, 3)
    slots = [slot for slot, place in enumerate(layout) if place is not None]
    wanted[:, slots] = x[:, [layout[slot] for slot in slots]]
    assert torch.equal(bits(tiled), bits(wanted))
    assert torch.equal(bits(impl.untile(tiled, md)), bits(x))


@settings(max_examples=60, deadline=None)
@given(grids(), st.sampled_from(FULL_TILES + ODD_TILES), st.integers(1, 2))
@example((1, 1, 1), (4, 4, 4), 1)
@example((21, 3, 5), (4, 4, 4), 2)
def test_tiling_then_untiling_returns_every_token_exactly(thw, tile, batch):
    check_tiling_round_trip(thw, tile, batch=batch)


@pytest.mark.parametrize("tile", FULL_TILES + ODD_TILES, ids=str)
def test_every_legal_tile_puts_every_token_into_its_slot(tile):
    check_tiling_round_trip((5, 7, 6), tile)
    check_tiling_round_trip((9, 3, 17), tile, prefix=3, suffix=2)


@settings(max_examples=60, deadline=None)
@given(grids(), st.sampled_from([0, 1, 63, 64, 65]), st.sampled_from([0, 1, 63, 64, 65]))
def test_automatic_tiles_and_other_tokens_put_every_token_into_its_slot(thw, prefix, suffix):
    check_tiling_round_trip(thw, auto_tile_size(thw), prefix, suffix)


def test_tile_hands_out_one_buffer_until_its_next_call_and_fresh_ones_without_caching():
    md, impl, x = metadata((5, 5, 6), (4, 4, 4)), implementation(), torch.randn(2, 150, 2, 16)
    first = impl.tile(x, md)
    kept = first.clone()
    assert first is md.tile_buf and torch.equal(impl.untile(first, md), x)
    second = impl.tile(x + 1, md)
    assert second is md.tile_buf and second.data_ptr() == first.data_ptr() and not torch.equal(first, kept)
    assert impl.tile(x.half(), md).dtype == torch.float16 and impl.tile(x[:1], md).shape[0] == 1
    md.cache_tile_buf = False
    third = impl.tile(x, md)
    fourth = impl.tile(x + 1, md)
    assert third.data_ptr() != fourth.data_ptr() and torch.equal(third, kept)


@settings(max_examples=100, deadline=None)
@given(grids(), st.sampled_from(FULL_TILES + ODD_TILES))
def test_tile_order_is_a_permutation_whose_sizes_add_up_to_the_tokens(thw, tile):
    order = get_tile_partition_indices(thw, tile, CPU)
    back = get_reverse_tile_partition_indices(thw, tile, CPU)
    assert order.tolist() == [token for tokens in tokens_of_tiles(thw, tile) for token in tokens]
    assert sorted(order.tolist()) == list(range(prod(thw)))
    assert order[back].tolist() == back[order].tolist() == list(range(prod(thw)))
    sizes = construct_variable_block_sizes(thw, num_tiles(thw, tile), CPU, tile)
    assert sizes.tolist() == [len(tokens) for tokens in tokens_of_tiles(thw, tile)]
    assert int(sizes.sum()) == prod(thw) and int(sizes.min()) >= 1


@settings(max_examples=50, deadline=None)
@given(grids(), st.sampled_from(FULL_TILES + ODD_TILES))
def test_tokens_come_first_in_the_slots_of_their_tile(thw, tile):
    sizes = construct_variable_block_sizes(thw, num_tiles(thw, tile), CPU, tile)
    slots = tile_slots(tile)
    wanted = [i * slots + j for i, size in enumerate(sizes.tolist()) for j in range(size)]
    assert get_non_pad_index(sizes, slots).tolist() == wanted
    assert wanted == [slot for slot, place in enumerate(tiled_layout(thw, tile)) if place is not None]


@pytest.mark.parametrize("clip, thw, tokens, tiles, whole, kept", CLIPS, ids=[row[0] for row in CLIPS])
def test_known_clips_have_their_tiles_and_keep_their_share(clip, thw, tokens, tiles, whole, kept):
    count = prod(tiles)
    md = metadata(thw, (4, 4, 4), sparsity=0.8)
    assert num_tiles(thw, (4, 4, 4)) == tuple(md.num_tiles) == tiles
    assert md.total_seq_length == tokens == TokenGrid(thw).num_video_tokens
    assert int(md.variable_block_sizes.sum()) == tokens and md.variable_block_sizes.shape == (count,)
    assert whole is None or md.variable_block_sizes.eq(64).sum() == whole
    assert implementation().tile(torch.zeros(1, tokens, 1, 1), md).shape[1] == count * 64
    for sparsity, wanted in zip((0.8, 0.9, 0.95), kept):
        assert compute_topk(sparsity, count) == wanted == exact_topk(sparsity, count)


@pytest.mark.parametrize("thw, tile, tiles, padded, kept", [
    ((21, 30, 52), (4, 8, 8), (6, 4, 7), 43008, (34, 17)),
    ((21, 45, 80), (4, 8, 8), (6, 6, 10), 92160, (72, 36)),
    ((21, 30, 52), (4, 4, 8), (6, 8, 7), 43008, (68, 34)),
    ((21, 45, 80), (4, 4, 8), (6, 12, 10), 92160, (144, 72)),
])
def test_larger_tiles_have_their_slots_and_keep_their_share(thw, tile, tiles, padded, kept):
    assert num_tiles(thw, tile) == tiles
    assert implementation().tile(torch.zeros(1, prod(thw), 1, 1), metadata(thw, tile)).shape[1] == padded
    assert tuple(compute_topk(s, prod(tiles)) for s in (0.8, 0.9)) == kept


def test_kept_tiles_are_exact_for_every_sparsity_in_thousandths():
    counts = [1, 2, 3, 7, 64, 100, 125, 240, 480, 520, 624, 999, 1000, 1200, 1440, 1920, 2160]
    wrong = [(n / 1000, count) for n, count in product(range(1000), counts)
             if compute_topk(n / 1000, count) != exact_topk(n / 1000, count)]
    assert not wrong


@pytest.mark.parametrize("sparsity, kept", [(0.0, 624), (0, 624), (-0.5, 624), (1.0, 1), (1, 1), (2.0, 1), (0.9999, 1)])
def test_at_least_one_tile_and_at_most_all_are_kept(sparsity, kept):
    assert compute_topk(sparsity, 624) == kept


@pytest.mark.parametrize("size", [(16, 3), (1, 1), (5, 4)])
def test_a_latent_that_the_patch_does_not_divide_loses_its_last_row(size):
    md = VideoSparseAttentionMetadataBuilder().build(
        current_timestep=7, raw_latent_shape=(3, 2 * size[0] + 1, 2 * size[1]), patch_size=(1, 2, 2),
        VSA_sparsity=0.5, device=CPU)
    assert tuple(md.dit_seq_shape) == (3, *size) and md.total_seq_length == 3 * size[0] * size[1]


@pytest.mark.parametrize("tile, slots", [
    ((4, 4, 4), 64), ((3, 5, 4), 64), ((1, 1, 1), 64), ((4, 4, 8), 128), ((3, 8, 8), 192), ((4, 8, 8), 256)])
def test_a_tile_takes_whole_blocks_of_64_slots(tile, slots):
    assert tile_slots(tile) == slots


@settings(max_examples=100, deadline=None)
@given(grids(), st.tuples(*[st.integers(1, 9)] * 3))
def test_tiles_along_an_axis_are_those_that_hold_a_token(thw, tile):
    assert prod(num_tiles(thw, tile)) == len(set(tile_of_token(thw, tile)))


def blocks_of_64(thw, tile):
    return prod(ceil(size / side) for size, side in zip(thw, tile))


def is_compact(thw, tile):
    cut = [side for side, size in zip(tile, thw) if side < size]
    return not cut or max(tile) <= 2 * min(cut)


def check_auto_tile(thw):
    tile = auto_tile_size(thw)
    shapes = [(t, h, w) for t in range(1, 65) for h in range(1, 64 // t + 1) for w in range(1, 64 // (t * h) + 1)]
    assert tile in shapes, f"{tile} at {thw}: wanted three sides of at most 64 tokens together"
    assert is_compact(thw, tile), f"{tile} at {thw}: wanted sides within a factor of 2"
    fewest = min(blocks_of_64(thw, shape) for shape in shapes if is_compact(thw, shape))
    assert blocks_of_64(thw, tile) == fewest <= blocks_of_64(thw, (4, 4, 4))


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 90)] * 3))
@example((1, 1, 1))
@example((1, 64, 64))
@example((2, 90, 3))
def test_the_automatic_tile_is_compact_and_needs_the_fewest_blocks(thw):
    check_auto_tile(thw)


@pytest.mark.parametrize("thw", [row[1] for row in CLIPS], ids=[row[0] for row in CLIPS])
def test_the_automatic_tile_suits_known_clips(thw):
    check_auto_tile(thw)


def test_the_automatic_tile_of_a_480p_clip_saves_an_eighth_of_the_blocks():
    assert auto_tile_size((21, 30, 52)) == (3, 5, 4)
    assert blocks_of_64((21, 30, 52), (3, 5, 4)) == 546 and blocks_of_64((21, 30, 52), (4, 4, 4)) == 624


@pytest.mark.parametrize("tile", FULL_TILES + ODD_TILES, ids=str)
def test_tile_sizes_are_read_as_time_height_width(tile):
    assert parse_tile_size("x".join(map(str, tile))) == tile


@pytest.mark.parametrize("text", [
    "", "4x4", "4x4x4x1", "axbxc", "4x4x4.0", "-4x-4x4", "4x4x", "0x4x4", "4x4x0", "3x5x4", "2x2x2", "4x4x5"])
def test_an_illegal_tile_size_says_what_it_found_and_what_it_wants(text):
    with pytest.raises(ValueError) as caught:
        parse_tile_size(text)
    assert (repr(text) in str(caught.value)) and "wanted" in str(caught.value)


@pytest.mark.parametrize("tile", [(3, 5, 5), (4, 4, 5), (9, 9, 9), (0, 4, 4), (4, -4, -4)])
def test_a_plan_refuses_an_illegal_tile(tile):
    with pytest.raises(ValueError, match=f"{'x'.join(map(str, tile))}.*wanted"):
        metadata((8, 8, 8), tile)


def test_a_token_grid_counts_its_tokens():
    grid = TokenGrid((21, 30, 52), prefix=77, suffix=3)
    assert (grid.num_video_tokens, grid.num_tokens) == (32760, 32840)
    assert TokenGrid((1, 1, 1)).num_tokens == 1
    assert hash(grid) == hash(TokenGrid((21, 30, 52), 77, 3)) and grid == TokenGrid((21, 30, 52), 77, 3)


@pytest.mark.parametrize("thw, prefix, suffix, found", [
    ((0, 4, 4), 0, 0, "0x4x4"), ((4, -1, 4), 0, 0, "4x-1x4"), ((4, 4, 0), 0, 0, "4x4x0"),
    ((4, 4, 4), -1, 0, "prefix -1"), ((4, 4, 4), 0, -2, "suffix -2")])
def test_an_impossible_token_grid_says_what_it_found_and_what_it_wants(thw, prefix, suffix, found):
    with pytest.raises(ValueError, match=f"{found}.*wanted"):
        TokenGrid(thw, prefix, suffix)


def test_block_sizes_are_cached_and_a_last_tile_that_would_be_empty_counts_as_whole():
    """As upstream: (5, 4, 4) tokens in (3, 1, 1) tiles have none left for the third."""
    with torch.inference_mode():
        sizes = construct_variable_block_sizes((5, 4, 4), (3, 1, 1), CPU, (4, 4, 4))
    assert sizes.tolist() == [64, 64, 64] and not sizes.is_inference()
    assert construct_variable_block_sizes((5, 4, 4), (3, 1, 1), CPU, (4, 4, 4)) is sizes
    assert construct_variable_block_sizes((5, 4, 4), (2, 1, 1), CPU, (4, 4, 4)).tolist() == [64, 16]
