"""Budgets: heads that keep different numbers of tiles, what measuring them finds, and their files."""
import json
import math

import pytest
import torch

from oracles import dense_attention_oracle, relative_l2_per_tile, tokens_of_tiles, vsa_attention_oracle
from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder
from pack.vsa_core.budget_search import BudgetTable, budget_result, try_shares
from pack.vsa_core.budgets import Budgets, share_density, tiles_kept
from pack.vsa_core.choosing import choose_under_density, choose_under_error
from pack.vsa_core.grid import TokenGrid
from pack.vsa_core.strategy_files import load_strategy, parse_strategy, save_strategy, to_json

THW, TILE, PREFIX, SUFFIX = (5, 6, 8), (4, 4, 4), 3, 7
TILES, TOKENS = 8, 3 + 240 + 7
KEPT = (1, 5, 8, 2)


def metadata(sparsity=0.5, tile=TILE, **others):
    return VideoSparseAttentionMetadataBuilder().build(
        0, raw_latent_shape=THW, patch_size=(1, 1, 1), VSA_sparsity=sparsity, device="cpu", tile_size=tile,
        **{"prefix": PREFIX, "suffix": SUFFIX, **others})


def inputs(batch=2, heads=4, dim=16, tokens=TOKENS):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, tokens, heads, dim, generator=generator) for _ in range(4)]


def three_steps(impl, q, k, v, gate, md):
    parts = impl.preprocess_qkv(torch.cat([q, k, v, gate]), md).chunk(4)
    return impl.postprocess_output(impl.forward(*parts, md), md)


@pytest.mark.parametrize("steps", [VideoSparseAttentionImpl.attend_readable, three_steps], ids=["sequence", "slots"])
def test_every_head_reads_its_own_number_of_tiles(steps):
    q, k, v, gate = inputs()
    impl = VideoSparseAttentionImpl(4, 16)
    impl.kept_by_head = KEPT
    args = (q, k, v, metadata(), gate) if steps is not three_steps else (q, k, v, gate, metadata())
    found = steps(impl, *args)
    for head, kept in enumerate(KEPT):
        own = slice(head, head + 1)
        wanted, _, gaps = vsa_attention_oracle(*(x[:, :, own] for x in (q, k, v, gate)), THW, TILE, kept, PREFIX,
                                               SUFFIX)
        assert min(gaps.values()) > 1e-5, "the oracle's choice must not hang on rounding"
        assert relative_l2_per_tile(found[:, :, own], wanted, THW, TILE, PREFIX, SUFFIX).max() <= 1e-5


@pytest.mark.parametrize("tile", [TILE, (4, 4, 8)], ids=["a block per tile", "two"])
def test_a_head_computes_what_it_would_beside_heads_like_itself(tile):
    q, k, v, gate = inputs()
    impl = VideoSparseAttentionImpl(4, 16, far_field=True)
    impl.kept_by_head = kept = tuple(min(n, 8 if tile == TILE else 4) for n in KEPT)
    found, told = impl.attend_readable(q, k, v, metadata(tile=tile), gate), []
    impl.on_selection = lambda tiles, md: told.append(tiles)
    assert torch.equal(impl.attend_readable(q, k, v, metadata(tile=tile), gate), found)
    for head, n in enumerate(kept):
        same = VideoSparseAttentionImpl(4, 16, far_field=True, on_selection=lambda tiles, md: told.append(tiles))
        alike = metadata(1 - n / (8 if tile == TILE else 4), tile=tile)
        assert alike.topk == n
        alone = same.attend_readable(q, k, v, alike, gate)[:, :, head]
        assert (alone - found[:, :, head]).norm() <= 1e-6 * alone.norm()
        assert torch.equal(told[0][:, head, :, :n], told.pop()[:, head]) and (told[0][:, head, :, n:] == -1).all()


def test_as_many_numbers_as_heads_are_needed():
    q, k, v, _ = inputs()
    impl = VideoSparseAttentionImpl(4, 16)
    impl.kept_by_head = (1, 2)
    with pytest.raises(ValueError, match="tiles kept by 2 heads: found 4 heads"):
        impl.attend_readable(q, k, v, metadata())


@pytest.mark.parametrize("far_field", [False, True], ids=["tiles alone", "far field"])
def test_a_trial_gives_the_errors_of_running_it_and_the_exact_masses(far_field):
    shares = (0.2, 0.5)
    q, k, v, _ = inputs()
    dense = dense_attention_oracle(q, k, v)
    trial = try_shares(q, k, v, dense.float(), metadata(), shares, far_field)
    video = slice(PREFIX, PREFIX + 240)
    torch.testing.assert_close(trial.squared_norms, dense[:, video].square().sum((0, 1, 3)), rtol=1e-5, atol=0)
    tiles = tokens_of_tiles(THW, TILE, PREFIX)
    weights = (torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) / 4).softmax(-1)
    slot = metadata().non_pad_index[torch.arange(64) * 240 // 64]
    asked = metadata().token_rows[slot].tolist()
    for place, share in enumerate(shares):
        kept = math.ceil(share * TILES)
        impl = VideoSparseAttentionImpl(4, 16, far_field=far_field)
        ran = impl.attend_readable(q, k, v, metadata(1 - kept / TILES)).double()
        wanted = (ran - dense)[:, video].square().sum((0, 1, 3))
        torch.testing.assert_close(trial.squared_errors[place], wanted, rtol=1e-4, atol=0)
        _, chosen, _ = vsa_attention_oracle(q, k, v, None, THW, TILE, kept, PREFIX, SUFFIX)
        for head in range(4):
            held = []
            for b in range(2):
                for token in asked:
                    own = next(i for i, tokens in enumerate(tiles) if token in tokens)
                    left = [t for j in range(TILES) if j not in chosen[b, head, own] for t in tiles[j]]
                    held.append(1 - float(weights[b, head, token, left].sum()))
            assert float(trial.masses[place, head]) == pytest.approx(sum(held) / len(held), abs=1e-5)
    assert len(trial.milliseconds) == 2 and min(trial.milliseconds) > 0


def measured(far_field=False):
    """A table of two steps and one layer whose four heads look at 1, 3, 5 and all of the eight tiles."""
    table = BudgetTable((0.125, 0.4, 0.7, 0.39), TokenGrid(THW), TILE, TILES, far_field, 2, 1, 4)
    q, k, v, _ = inputs(batch=1, dim=32, tokens=240)
    for step in range(2):
        for head, sharpness in enumerate((0.0, 1.0, 2.0, 4.0)):
            k[:, :, head] *= sharpness
        dense = dense_attention_oracle(q, k, v).float()
        table.add_trial(step, 0, try_shares(q, k, v, dense, metadata(prefix=0, suffix=0), table.candidates, far_field),
                        5.0, noise=0.9 - 0.5 * step)
    return table


def test_shares_of_one_number_of_tiles_are_tried_once_and_dense_is_always_there():
    table = measured()
    assert table.shares == (0.125, 0.39, 0.7, 1.0)
    assert table.densities == (1 / 8, 4 / 8, 6 / 8, 1.0)
    with pytest.raises(ValueError, match="a clip of 2 tiles is too small for these shares"):
        BudgetTable((0.6, 0.9), TokenGrid((2, 4, 8)), (2, 4, 4), 2, False, 1, 1, 1)


def test_a_bound_on_every_head_holds_for_every_head_and_a_smaller_share_would_break_it():
    table = measured()
    for lost in (table.relative(), table.unkept()):
        bound = float(lost[..., 1].median())
        choice = choose_under_error(lost, table.densities, bound)
        assert len(set(choice.flatten().tolist())) > 1
        assert (lost.gather(-1, choice[..., None]) <= bound).all()
        cheaper = (choice - 1).clamp(min=0)[..., None]
        assert (lost.gather(-1, cheaper)[..., 0][choice > 0] > bound).all()


def test_with_emphasis_a_noisy_step_gets_more_of_the_same_work():
    table = measured()
    table.add_trial(1, 0, try_shares(*inputs(batch=1, dim=32, tokens=240)[:3], torch.ones(1, 240, 4, 32),
                                     metadata(prefix=0, suffix=0), table.candidates, False), 5.0, noise=0.3)
    table.squared_errors[1], table.squared_norms[1] = table.squared_errors[0], table.squared_norms[0]
    assert table.noise.tolist() == [0.9, 0.3]
    alike, graded = (budget_result(table, choose_under_density(table.emphasised(power), table.densities, 0.5)).by_step
                     for power in (0, 8))
    assert abs(alike[0] - alike[1]) <= 0.25 < graded[0] - graded[1] and sum(graded) <= 1.0 + 1e-9


def test_a_result_says_what_its_budgets_come_to():
    table = measured(far_field=True)
    result = budget_result(table, choose_under_density(table.relative(), table.densities, 0.6), "Tiny")
    shares = [result.budgets.shares[place] for rows in result.budgets.assignment for row in rows for place in row]
    density = sum(share_density(share, TokenGrid(THW), TILES) for share in shares) / 8
    assert result.density == pytest.approx(density) and density <= 0.6
    assert sum(row["heads"] for row in result.rows) == 8
    assert result.budgets.far_field and result.budgets.model == "Tiny"
    assert 0 < result.error <= result.worst_error and result.kept < 1
    assert table.times()[:-1] == sorted(table.times()[:-1]) and table.times()[-1] == 1.0


def test_a_table_goes_on_from_its_state_and_refuses_another_ones():
    table = measured()
    again = BudgetTable((0.125, 0.4, 0.7), TokenGrid(THW), TILE, TILES, False, 2, 1, 4)
    again.restore(table.state())
    assert torch.equal(again.relative(), table.relative()) and torch.equal(again.unkept(), table.unkept())
    with pytest.raises(ValueError, match="made with other steps, layers, heads or candidates"):
        BudgetTable((0.125, 0.4), TokenGrid(THW), TILE, TILES, False, 2, 1, 4).restore(table.state())


BUDGETS = Budgets((0.05, 0.3, 1.0), (((0, 1), (2, 2)), ((2, 2), (2, 2)), ((1, 1), (0, 0))), (5, 6, 8), TILE, "Wan",
                  True)


def test_budgets_hold_at_any_size_and_length():
    assert BUDGETS.kept(0, 0, 20) == (1, 6) and BUDGETS.kept(0, 0, 1000) == (50, 300)
    assert BUDGETS.kept(0, 1, 7) == (7, 7)
    assert tiles_kept(0.05, 1200) == 60, "on the decimal: no 61st from rounding"
    assert [BUDGETS.step_of(step, 6) for step in range(6)] == [0, 0, 1, 1, 2, 2]
    assert BUDGETS.mean_share == pytest.approx((0.05 + 0.3 + 1 + 1 + 4 + 0.6 + 0.1) / 12)


def test_a_file_gives_back_the_budgets_that_were_written(tmp_path):
    save_strategy(BUDGETS, tmp_path / "b.json")
    assert load_strategy(tmp_path / "b.json") == BUDGETS
    with pytest.raises(ValueError, match="budgets have no form of FastVideo's: leave grid_tiles empty"):
        save_strategy(BUDGETS, tmp_path / "c.json", (5, 6, 10))


@pytest.mark.parametrize(("change", "message"), [
    ({"shares": [0.0, 0.3, 1.0]}, "share 0.0: wanted a number above 0"),
    ({"shares": [0.1, 0.3, True]}, "share True: wanted a number"),
    ({"shares": []}, r"shares \[\]: wanted a list of numbers above 0 and at most 1"),
    ({"assignment": [[[0, 3]]]}, "layer 0, head 1 has budget number 3, wanted 0 to 2"),
    ({"steps": 4}, "the file says 4, 2, 2: the file may be cut short"),
    ({"far_field": 1}, "far_field 1: wanted true or false"),
    ({"version": 2}, "A newer file needs a newer node pack"),
    ({"format": "other"}, "wanted 'sliding tile attention strategy' or 'video sparse attention budgets'"),
])
def test_a_file_that_holds_no_budgets_is_refused_in_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        parse_strategy(json.dumps({**json.loads(to_json(BUDGETS)), **change}))
