"""The lists that windows lower to: their contract, their sharing, their time and memory."""
import random
import time
from math import prod

import pytest
import torch

from pack.vsa_core import window_lists
from pack.vsa_core.backends.sliding_tile_attn import SlidingTileAttentionImpl, SlidingTileAttentionMetadataBuilder
from pack.vsa_core.grid import TokenGrid
from pack.vsa_core.layout import TileLayout
from pack.vsa_core.window import effective_window
from pack.vsa_core.window_lists import MAX_BYTES, WindowLists, window_blocks
from sta_oracle import sees_along_axis

CPU = torch.device("cpu")
HUNYUAN = [(5, 3, 3), (1, 6, 10), (3, 3, 5), (5, 1, 10), (5, 6, 1)]
"""The windows of the published HunyuanVideo strategy after its first, full steps."""


def lists_of(thw, tile, suffix=0):
    return WindowLists(TileLayout.of_grid(TokenGrid(thw, suffix=suffix), tile, CPU))


def only_launch(lists, windows, batch=1):
    (launch,) = lists.launches(tuple(windows))
    return lists.lists(launch, batch)


@pytest.mark.parametrize("tiles", [(5, 6, 10), (6, 6, 6), (3, 6, 10), (1, 1, 1), (4, 1, 7)], ids=str)
def test_lists_name_the_blocks_of_the_tiles_that_the_clamp_rule_names(tiles):
    place = [(t, h, w) for t in range(tiles[0]) for h in range(tiles[1]) for w in range(tiles[2])]
    for window in [*HUNYUAN, (3, 3, 3), (2, 4, 6), (9, 9, 99), (1, 1, 1)]:
        rows = window_blocks(tiles, window, 6, 2, CPU)
        for q in random.Random(0).sample(range(prod(tiles)), min(12, prod(tiles))):
            seen = [i for i, key in enumerate(place)
                    if all(sees_along_axis(a, b, n, w) for a, b, n, w in zip(place[q], key, tiles, window))]
            last = prod(tiles) * 6
            assert rows[q].tolist() == [6 * i + j for i in seen for j in range(6)] + [last, last + 1]


def test_lists_fit_the_kernels_contract_with_a_count_per_head():
    lists = lists_of((30, 48, 80), (6, 8, 8), suffix=100)
    windows = [HUNYUAN[i % 5] for i in range(24)]
    indices, counts = only_launch(lists, windows, batch=2)
    assert indices.shape == (2, 24, 1800, 60 * 6 + 2) and counts.shape == (2, 24, 1800)
    assert indices.dtype == counts.dtype == torch.int32 and indices.stride(0) == counts.stride(0) == 0
    for head in (0, 1, 23):
        count = prod(effective_window(windows[head], (5, 6, 10))) * 6 + 2
        assert counts[:, head].unique().tolist() == [count]
        alone = window_blocks((5, 6, 10), windows[head], 6, 2, CPU).repeat_interleave(6, 0)
        assert torch.equal(indices[1, head, :, :count], alone)


def test_heads_that_share_a_window_share_one_list_and_a_full_window_one_row():
    lists = lists_of((30, 48, 80), (6, 8, 8), suffix=64)
    indices, counts = only_launch(lists, [(5, 3, 3)] * 24, batch=2)
    assert indices.shape == (2, 24, 1800, 271) and indices.stride()[:2] == (0, 0)
    again, _ = only_launch(lists, [(5, 3, 3)] * 24, batch=2)
    assert again.data_ptr() == indices.data_ptr()
    indices, counts = only_launch(lists, [(5, 6, 10)] * 24)
    assert indices.shape == (1, 24, 1800, 1801) and indices.stride()[:3] == (0, 0, 0)
    assert indices[0, 0, 0].tolist() == list(range(1801)) and counts.unique().tolist() == [1801]


def test_a_window_larger_than_the_grid_is_the_full_one_and_shares_its_lists():
    lists = lists_of((6, 8, 8), (2, 4, 4))
    launch, = lists.launches(((3, 2, 2), (99, 2, 4), (4, 4, 4)))
    assert launch.windows == ((3, 2, 2),)


def test_hunyuan_lists_with_a_window_per_head_take_under_200_ms_and_64_mib():
    lists, rng, times = lists_of((30, 48, 80), (6, 8, 8), suffix=256), random.Random(1), []
    for _ in range(7):
        windows = tuple(rng.choice(HUNYUAN) for _ in range(24))
        start = time.thread_time()
        indices, counts = only_launch(lists, windows)
        times.append(time.thread_time() - start)
        assert indices.untyped_storage().nbytes() + counts.untyped_storage().nbytes() + lists.kept_bytes < 64 << 20
        del indices, counts
    assert min(times) < 0.2, f"{[round(t * 1e3, 1) for t in times]} ms"


def test_full_windows_among_narrow_ones_split_the_heads_so_that_no_launch_exceeds_its_bound():
    lists = lists_of((30, 48, 80), (6, 8, 8), suffix=256)
    windows = tuple([(5, 6, 10), *HUNYUAN][i % 6] for i in range(24))
    launches = lists.launches(windows)
    assert [part.heads for part in launches] == [slice(0, 5), slice(5, 10), slice(10, 15), slice(15, 20), slice(20, 24)]
    for part in launches:
        indices, counts = lists.lists(part, 1)
        assert indices.untyped_storage().nbytes() <= MAX_BYTES and lists.kept_bytes <= MAX_BYTES
        assert counts[0, :, 0].tolist() == [prod(window) * 6 + 4 for window in windows[part.heads]]


@pytest.mark.parametrize("bound", [1, 5000, 12000])
def test_heads_in_several_launches_give_what_one_launch_gives(monkeypatch, bound):
    windows = [(1, 1, 1), (3, 3, 3), (3, 1, 1), (1, 3, 1), (9, 9, 9)]
    q, k, v = torch.randn(3, 2, 217, 5, 8, generator=torch.Generator().manual_seed(0))
    impl = SlidingTileAttentionImpl(5, 8)

    def run():
        md = SlidingTileAttentionMetadataBuilder().build([[windows]], 0, raw_latent_shape=(6, 6, 6), suffix=1,
                                                         tile_size=(2, 2, 2)).at(0, 0)
        return impl.attend(q, k, v, md), len(md.lists.launches(tuple(windows)))

    at_once, launches = run()
    assert launches == 1
    monkeypatch.setattr(window_lists, "MAX_BYTES", bound)
    parted, launches = run()
    assert launches > 1 and torch.equal(parted, at_once)


def test_what_is_kept_stays_below_its_bound_however_many_windows_come_by(monkeypatch):
    monkeypatch.setattr(window_lists, "MAX_BYTES", 1 << 20)
    lists, rng = lists_of((24, 24, 24), (4, 4, 4)), random.Random(2)
    for _ in range(60):
        windows = tuple(tuple(rng.choice([1, 3, 5]) for _ in range(3)) for _ in range(3))
        for part in lists.launches(windows):
            lists.lists(part, 1)
            assert lists.lists(part, 1)[0].untyped_storage().nbytes() <= 1 << 20
        assert lists.kept_bytes == sum(size for _, size in lists._kept.values()) <= 1 << 20
    assert len(lists._kept) > 1


def test_the_lists_of_the_last_call_outlive_those_of_earlier_ones(monkeypatch):
    monkeypatch.setattr(window_lists, "MAX_BYTES", 45_000)
    lists = lists_of((24, 24, 24), (4, 4, 4))
    for width in (1, 3, 1, 3, 5):
        launch, = lists.launches(((width, 3, 3),) * 2)
        kept, _ = lists.lists(launch, 1)
        assert lists.lists(launch, 1)[0].data_ptr() == kept.data_ptr()
