"""Strategy search: measured errors, and the two ways of choosing by them."""
from itertools import product

import pytest
import torch

from oracles import dense_attention_oracle
from pack.vsa_core import search
from pack.vsa_core.backends.sliding_tile_attn import SlidingTileAttentionImpl, SlidingTileAttentionMetadataBuilder
from pack.vsa_core.choosing import choose_under_density, choose_under_error
from pack.vsa_core.grid import TokenGrid
from pack.vsa_core.search import (
    ErrorTable,
    candidate_errors,
    default_candidates,
    search_result,
)
from pack.vsa_core.strategy_files import parse_strategy, to_json
from pack.vsa_core.window import window_of_share
from sta_oracle import sta_attention_oracle

THW, TILE, TILES = (6, 8, 8), (2, 2, 2), (3, 4, 4)
CANDIDATES = ((1, 1, 1), (3, 1, 1), (1, 3, 1), (1, 1, 3), (3, 3, 1))


def metadata(prefix=0, suffix=0, thw=THW, window=TILES):
    return SlidingTileAttentionMetadataBuilder().build(window, 0, raw_latent_shape=thw, tile_size=TILE,
                                                       prefix=prefix, suffix=suffix)


def random_inputs(tokens, heads=2, dim=8, batch=1, seed=0):
    return torch.randn(3, batch, tokens, heads, dim, generator=torch.Generator().manual_seed(seed))


def heads_that_look_inside(windows, seed=0):
    """q, k, v of heads whose queries give keys outside their own window no weight: a key says where it is.

    Every axis has a pair of dims per tile. A query scores 30 wherever a key's tile is in its window on that axis.
    """
    dim = sum(TILES) + 4
    tokens = THW[0] * THW[1] * THW[2]
    q, k = torch.zeros(1, tokens, len(windows), dim), torch.zeros(1, tokens, len(windows), dim)
    for place, where in enumerate(product(*map(range, THW))):
        first = 0
        for x, side, n, axis in zip(where, TILE, TILES, range(3)):
            k[0, place, :, first + x // side] = 1
            for head, window in enumerate(windows):
                half = window[axis] // 2
                centre = min(max(x // side, half), n - 1 - half)
                for tile in range(n):
                    q[0, place, head, first + tile] = 30.0 * dim ** 0.5 * (abs(tile - centre) <= half)
            first += n
    generator = torch.Generator().manual_seed(seed)
    q[..., -4:], k[..., -4:] = torch.randn(2, 1, tokens, len(windows), 4, generator=generator)
    return q, k, torch.randn(1, tokens, len(windows), dim, generator=generator)


@pytest.mark.parametrize("prefix, suffix, thw, chunk", [(0, 0, THW, 1 << 27), (3, 5, (5, 7, 8), 1 << 27),
                                                        (3, 5, (5, 7, 8), 1)], ids=str)
def test_errors_are_the_oracles_whatever_the_chunks(monkeypatch, prefix, suffix, thw, chunk):
    monkeypatch.setattr(search, "_CHUNK_BYTES", chunk)
    video = thw[0] * thw[1] * thw[2]
    q, k, v = random_inputs(prefix + video + suffix, batch=2)
    dense = dense_attention_oracle(q, k, v)
    errors, norms = candidate_errors(q, k, v, dense.float(), metadata(prefix, suffix, thw), CANDIDATES)
    mine = slice(prefix, prefix + video)
    torch.testing.assert_close(norms, dense[:, mine].square().sum(dim=(0, 1, 3)), rtol=1e-5, atol=0)
    for window, row in zip(CANDIDATES, errors):
        out = sta_attention_oracle(q, k, v, thw, TILE, [window] * 2, prefix, suffix)
        wanted = (out - dense)[:, mine].square().sum(dim=(0, 1, 3))
        torch.testing.assert_close(row, wanted, rtol=1e-4, atol=0)


def test_the_measured_error_is_that_of_running_the_window():
    q, k, v = random_inputs(384, heads=3)
    dense = SlidingTileAttentionImpl(3, 8).attend(q, k, v, metadata())
    errors, norms = candidate_errors(q, k, v, dense, metadata(), CANDIDATES)
    for window, row in zip(CANDIDATES, errors):
        out = SlidingTileAttentionImpl(3, 8).attend(q, k, v, metadata(window=window))
        ran = ((out - dense).double().square().sum(dim=(0, 1, 3)) / norms).sqrt()
        torch.testing.assert_close((row / norms).sqrt(), ran, rtol=1e-5, atol=0)


def test_the_search_finds_the_windows_that_were_planted():
    planted = [(1, 1, 1), (3, 1, 1), (1, 3, 1), (1, 1, 3), (3, 3, 1), TILES]
    table = ErrorTable(CANDIDATES, TokenGrid(THW), TILE, steps=2, layers=1, heads=6)
    for step in range(2):
        order = planted if step == 0 else planted[::-1]
        q, k, v = heads_that_look_inside(order, seed=step)
        dense = SlidingTileAttentionImpl(6, q.shape[-1]).attend(q, k, v, metadata())
        table.add(step, 0, *candidate_errors(q, k, v, dense, metadata(), table.candidates))
    choice = choose_under_error(table.relative(), table.densities, 0.01)
    result = search_result(table, choice, "planted")
    found = result.strategy.sta_param(TILES)
    assert [rows[0] for rows in found] == [tuple(planted), tuple(planted[::-1])]
    assert result.worst_error < 1e-3 and parse_strategy(to_json(result.strategy)) == result.strategy
    by_budget = choose_under_density(table.relative(), table.densities, result.density)
    assert torch.equal(by_budget, choice)
    assert result.density == pytest.approx(result.strategy.density(TokenGrid(THW), TILE))


def test_the_table_is_reproduced_by_running_the_strategy():
    heads, grid = 4, TokenGrid(THW, suffix=7)
    table = ErrorTable(CANDIDATES, grid, TILE, steps=1, layers=2, heads=heads)
    calls = [random_inputs(391, heads, seed=layer) * 2 for layer in range(2)]
    denses = [SlidingTileAttentionImpl(heads, 8).attend(*call, metadata(suffix=7)) for call in calls]
    for layer, (call, dense) in enumerate(zip(calls, denses)):
        table.add(0, layer, *candidate_errors(*call, dense, metadata(suffix=7), table.candidates))
    result = search_result(table, choose_under_density(table.relative(), table.densities, 0.4))
    assert result.density <= 0.4 and len({row["window"] for row in result.table if row["heads"]}) > 1
    md, ran, costs = metadata(suffix=7, window=result.strategy.sta_param(TILES)), [], []
    for layer, (call, dense) in enumerate(zip(calls, denses)):
        out = SlidingTileAttentionImpl(heads, 8).attend(*call, md.at(0, layer))[:, :384].double()
        dense = dense[:, :384].double()
        ran.append(((out - dense).square().sum(dim=(0, 1, 3)) / dense.square().sum(dim=(0, 1, 3))).sqrt())
        costs.append(md.at(0, layer).density(heads))
    assert float(torch.stack(ran).mean()) == pytest.approx(result.error, rel=1e-4)
    assert float(torch.stack(ran).max()) == pytest.approx(result.worst_error, rel=1e-4)
    assert sum(costs) / 2 == pytest.approx(result.density, rel=1e-9)
    assert [row["density"] for row in result.table] == sorted(row["density"] for row in result.table)
    assert sum(row["heads"] for row in result.table) == 2 * heads


def random_table(items, windows, seed):
    """Errors in any order of cost, [1, 1, items, windows], and the costs; the last window is full."""
    generator = torch.Generator().manual_seed(seed)
    costs = torch.rand(windows - 1, generator=generator).mul(0.9).tolist() + [1.0]
    errors = torch.rand(items, windows, generator=generator, dtype=torch.float64)
    errors[:, -1] = 0
    return errors.view(1, 1, items, windows), costs


def test_under_an_error_the_cheapest_window_is_taken_and_a_tie_goes_to_the_smaller_error():
    errors = torch.tensor([[0.3, 0.1, 0.05, 0.0], [0.2, 0.3, 0.25, 0.0], [0.5, 0.5, 0.5, 0.0]]).view(1, 1, 3, 4)
    costs = [0.1, 0.2, 0.2, 1.0]
    assert choose_under_error(errors, costs, 0.2).tolist() == [[[2, 0, 3]]]
    assert choose_under_error(errors, costs, 0.0).tolist() == [[[3, 3, 3]]]
    assert choose_under_error(errors, costs, 9.0).tolist() == [[[0, 0, 0]]]
    with pytest.raises(ValueError, match="error bound -0.1: wanted 0 or more"):
        choose_under_error(errors, costs, -0.1)


@pytest.mark.parametrize("seed", range(12))
def test_under_a_density_the_loss_is_the_best_one_up_to_one_upgrade(seed):
    errors, costs = random_table(items=5, windows=4, seed=seed)
    cost, loss = torch.tensor(costs, dtype=torch.float64), errors[0, 0].square()
    sets = torch.cartesian_prod(*[torch.arange(4)] * 5)
    for budget in (min(costs), (min(costs) + 1) / 3, (min(costs) + 1) / 2, 0.95, 1.0):
        choice = choose_under_density(errors, costs, max(budget, min(costs)))[0, 0]
        spent, lost = float(cost[choice].mean()), float(loss.gather(1, choice[:, None]).sum())
        assert spent <= max(budget, min(costs)) + 1e-9
        affordable = sets[cost[sets].mean(1) <= max(budget, min(costs)) + 1e-9]
        best = float(loss[torch.arange(5), affordable].sum(1).min())
        assert best - 1e-12 <= lost < best + float(loss.max())
        if budget == 1.0:
            assert lost == best == 0
    with pytest.raises(ValueError, match="density 0.0: the cheapest choice has 0"):
        choose_under_density(errors, costs, 0.0)


def test_a_strategy_of_seventy_two_thousand_heads_is_chosen_in_seconds():
    errors = torch.rand(50, 60, 24, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    errors[..., -1] = 0
    costs = [0.05, 0.1, 0.15, 0.15, 0.17, 0.2, 0.3, 0.5, 1.0]
    choice = choose_under_density(errors, costs, 0.25)
    assert 0.249 < float(torch.tensor(costs)[choice].mean()) <= 0.25 + 1e-6


def test_a_head_whose_numbers_are_not_finite_stays_full_and_a_silent_one_has_no_error():
    table = ErrorTable(((1, 1, 1),), TokenGrid(THW), TILE, steps=1, layers=1, heads=3)
    table.add(0, 0, torch.tensor([[float("nan"), 0.0, 1.0]]), torch.tensor([1.0, 0.0, 4.0]))
    assert table.relative().tolist() == [[[[float("inf"), 0.0], [0.0, 0.0], [0.5, 0.0]]]]
    assert choose_under_error(table.relative(), table.densities, 10.0).tolist() == [[[1, 0, 0]]]
    assert choose_under_density(table.relative(), table.densities, 0.36).tolist() == [[[1, 0, 0]]]


def test_an_infinite_error_does_not_hide_which_window_is_worth_its_price():
    errors = torch.tensor([float("inf"), 0.9, 0.1, 0.0]).view(1, 1, 1, 4)
    assert choose_under_density(errors, [0.1, 0.5, 0.4, 1.0], 0.45).tolist() == [[[2]]]


def test_calls_of_one_layer_are_pooled_and_a_missing_one_is_named():
    table = ErrorTable(((1, 1, 1), (3, 4, 4), (9, 9, 9), (1, 1, 1)), TokenGrid(THW), TILE, 2, 1, 1)
    assert table.candidates == ((1, 1, 1),) and table.windows == ((1, 1, 1), (3, 4, 4))
    assert table.work == pytest.approx(1 + 1 / 48)
    table.add(0, 0, torch.tensor([[1.0]]), torch.tensor([4.0]))
    table.add(0, 0, torch.tensor([[3.0]]), torch.tensor([12.0]))
    with pytest.raises(ValueError, match="step 1, layer 0 was never measured: found 1 of 2"):
        table.relative()
    again = ErrorTable(((1, 1, 1),), TokenGrid(THW), TILE, 2, 1, 1)
    again.restore(table.state())
    again.add(1, 0, torch.tensor([[0.0]]), torch.tensor([1.0]))
    assert again.relative()[..., 0].flatten().tolist() == [0.5, 0.0]
    with pytest.raises(ValueError, match=r"squared_errors \[2, 1, 1, 1\], wanted \[1, 1, 1, 1\]"):
        ErrorTable(((1, 1, 1),), TokenGrid(THW), TILE, 1, 1, 1).restore(table.state())


@pytest.mark.parametrize("tiles", [(5, 6, 10), (3, 6, 10), (1, 2, 2), (1, 1, 1), (6, 12, 20)], ids=str)
def test_default_candidates_are_distinct_narrower_than_the_grid_and_cheapest_first(tiles):
    windows = default_candidates(tiles)
    assert len(set(windows)) == len(windows) and tiles not in windows
    sizes = [a * b * c for a, b, c in windows]
    assert sizes == sorted(sizes) and all(window_of_share(
        tuple(a / n for a, n in zip(window, tiles)), tiles) == window for window in windows)
    assert len(windows) == {(5, 6, 10): 8, (3, 6, 10): 8, (1, 1, 1): 0}.get(tiles, len(windows))
