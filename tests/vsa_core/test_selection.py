"""Which tiles are kept: exact on scores that floating point represents exactly, else up to near-ties."""
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from oracles import top_indices
from pack.kernels import reference_tiles
from pack.vsa_core.selection import select_top_tiles


def select_by_scores(scores, k):
    """The selection for scores [B, H, Nq, Nk] themselves: queries are unit vectors, keys hold their columns."""
    queries = torch.eye(scores.shape[2], dtype=scores.dtype).expand(*scores.shape[:2], -1, -1)
    return select_top_tiles(queries, scores.transpose(2, 3), k, 1.0)


def wanted_selection(scores, k):
    return [[[top_indices(row, k) for row in head] for head in batch] for batch in scores.tolist()]


def random_means(batch, heads, queries, keys, dim, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, heads, queries, dim, generator=generator).to(dtype),
            torch.randn(batch, heads, keys, dim, generator=generator).to(dtype))


def differing_rows(selected, queries, keys, k, scale):
    """Rows whose set is not the float64 one -> [(score lost, largest score of the row)]."""
    scores = queries.double() @ keys.double().transpose(2, 3) * scale
    rows = []
    for place in torch.cartesian_prod(*map(torch.arange, scores.shape[:3])).tolist():
        row, mine = scores[tuple(place)], selected[tuple(place)].long()
        best = torch.tensor(top_indices(row.tolist(), k))
        if not torch.equal(mine, best):
            rows.append((float(row[best].sum() - row[mine].sum()), float(row.abs().max())))
    return rows


@pytest.mark.parametrize("batch, heads, queries, keys, dim, k", [
    (1, 1, 1, 1, 1, 1), (1, 1, 7, 9, 4, 3), (2, 3, 18, 18, 64, 4), (1, 2, 40, 40, 128, 39), (2, 1, 5, 300, 16, 31),
    (1, 2, 33, 624, 128, 125), (3, 5, 64, 65, 80, 64),
])
def test_selection_is_that_of_float64_scores_except_for_near_ties(batch, heads, queries, keys, dim, k):
    q, key = random_means(batch, heads, queries, keys, dim)
    selected = select_top_tiles(q, key, k, dim ** -0.5)
    assert selected.shape == (batch, heads, queries, k) and selected.dtype == torch.int32
    differing = differing_rows(selected, q, key, k, dim ** -0.5)
    assert all(lost < 1e-5 * max(1.0, largest) for lost, largest in differing)
    assert len(differing) <= 0.02 * batch * heads * queries


@pytest.mark.parametrize("k", [1, 5, 17, 99, 100])
def test_rows_are_ascending_and_hold_exactly_k_distinct_tiles(k):
    q, key = random_means(2, 2, 30, 100, 32, seed=3)
    selected = select_top_tiles(q, key, k, 1.0)
    assert bool((selected[..., 1:] > selected[..., :-1]).all())
    assert int(selected.min()) >= 0 and int(selected.max()) < 100


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 70).flatmap(lambda n: st.tuples(
    st.lists(st.lists(st.integers(-3, 3), min_size=n, max_size=n), min_size=1, max_size=4), st.integers(1, n))))
@example(([[1] * 64], 7))
@example(([[-1, 3, 3, 3, 0]], 2))
def test_equal_scores_go_to_the_lower_index(rows_and_k):
    rows, k = rows_and_k
    scores = torch.tensor(rows, dtype=torch.float32)[None, None]
    assert select_by_scores(scores, k).tolist() == wanted_selection(scores, k)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(
    st.lists(st.sampled_from([-2.0, -1.0, 0.0, 1.0, math.nan]), min_size=n, max_size=n), st.integers(1, n))))
@example(([math.nan] * 9, 4))
@example(([math.nan, -2.0, math.nan, -2.0], 3))
def test_nan_scores_are_the_lowest_and_rows_still_hold_k_distinct_tiles(row_and_k):
    row, k = row_and_k
    keys = torch.tensor(row)[None, None, :, None]
    selected = select_top_tiles(torch.ones(1, 1, 1, 1), keys, k, 1.0)
    assert selected.flatten().tolist() == top_indices(row, k)


def test_a_nan_query_selects_the_first_tiles_and_disturbs_no_other_row():
    q, key = random_means(2, 2, 6, 11, 8)
    clean = select_top_tiles(q, key, 4, 1.0)
    poisoned = q.clone()
    poisoned[1, 0, 3, 5] = math.nan
    selected = select_top_tiles(poisoned, key, 4, 1.0)
    assert selected[1, 0, 3].tolist() == [0, 1, 2, 3]
    selected[1, 0, 3] = clean[1, 0, 3]
    assert torch.equal(selected, clean)


def test_a_nan_key_is_read_only_when_every_tile_is():
    q, key = random_means(1, 2, 6, 11, 8)
    key[:, :, 4] = math.nan
    assert not (select_top_tiles(q, key, 10, 1.0) == 4).any()
    assert (select_top_tiles(q, key, 11, 1.0) == 4).any(-1).all()


def test_infinite_scores_rank_above_and_below_all_numbers():
    scores = torch.tensor([[[[0.0, math.inf, 3e38, -math.inf, math.inf, -3e38]]]])
    keys = scores.transpose(2, 3)
    wanted = {1: [1], 2: [1, 4], 3: [1, 2, 4], 5: [0, 1, 2, 4, 5], 6: [0, 1, 2, 3, 4, 5]}
    for k, row in wanted.items():
        assert select_top_tiles(torch.ones(1, 1, 1, 1), keys, k, 1.0).flatten().tolist() == row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_negative_scale_turns_the_order_round(dtype):
    scores = torch.tensor([[[[3.0, -1.0, 2.0, -4.0, 0.0]]]], dtype=dtype)
    keys = scores.transpose(2, 3)
    assert select_top_tiles(torch.ones(1, 1, 1, 1, dtype=dtype), keys, 2, -0.5).flatten().tolist() == [1, 3]
    assert select_top_tiles(torch.ones(1, 1, 1, 1, dtype=dtype), keys, 2, 0.5).flatten().tolist() == [0, 2]


def test_selection_neither_changes_its_inputs_nor_depends_on_their_strides():
    q, key = random_means(2, 3, 10, 12, 16)
    q_before, key_before = q.clone(), key.clone()
    selected = select_top_tiles(q, key, 5, 0.25)
    assert torch.equal(q, q_before) and torch.equal(key, key_before)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, key)]
    assert torch.equal(select_top_tiles(*strided, 5, 0.25), selected)


def test_the_same_means_give_the_same_selection_twice():
    q, key = random_means(2, 4, 90, 90, 64, seed=9)
    assert torch.equal(select_top_tiles(q, key, 9, 0.125), select_top_tiles(q, key, 9, 0.125))


def test_every_head_and_batch_has_its_own_selection():
    q, key = random_means(2, 3, 6, 30, 16, seed=5)
    together = select_top_tiles(q, key, 4, 1.0)
    for b in range(2):
        for h in range(3):
            alone = select_top_tiles(q[b:b + 1, h:h + 1], key[b:b + 1, h:h + 1], 4, 1.0)
            assert torch.equal(alone[0, 0], together[b, h])


@pytest.mark.parametrize("heads_at_once", [1, 2, 4])
def test_heads_selected_in_parts_are_those_selected_at_once(monkeypatch, heads_at_once):
    q, key = random_means(2, 3, 20, 30, 16, seed=7)
    at_once = select_top_tiles(q, key, 4, 1.0)
    monkeypatch.setattr(reference_tiles, "_CHUNK_BYTES", heads_at_once * 20 * 30 * 24)
    assert torch.equal(select_top_tiles(q, key, 4, 1.0), at_once)
    monkeypatch.setattr(reference_tiles, "_CHUNK_BYTES", 1)
    assert torch.equal(select_top_tiles(q, key, 4, 1.0), at_once)
