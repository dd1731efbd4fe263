"""Window arithmetic: what a query tile sees, fractions of a grid, and exact densities."""
from fractions import Fraction
from itertools import product
from math import ceil, prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pack.vsa_core.grid import TokenGrid
from pack.vsa_core.window import (
    check_share,
    check_window,
    effective_width,
    effective_window,
    first_seen,
    is_full,
    parse_window,
    share_of_window,
    window_density,
    window_of_density,
    window_of_share,
    window_tile_share,
)
from sta_oracle import keys_of_query, sees_along_axis


def test_every_window_on_every_axis_of_up_to_fourteen_tiles_is_the_clamp_rules():
    for n, width in product(range(1, 15), range(1, 18)):
        for q, first in enumerate(first_seen(width, n)):
            seen = [k for k in range(n) if sees_along_axis(q, k, n, width)]
            assert list(range(first, first + effective_width(width, n))) == seen, (n, width, q)


def test_a_window_shifts_inward_at_the_borders_and_keeps_its_size():
    assert first_seen(3, 6) == [0, 0, 1, 2, 3, 3]


@pytest.mark.parametrize("width, tiles, effective", [(2, 6, 3), (4, 6, 5), (4, 5, 5), (6, 6, 6), (7, 6, 6), (1, 6, 1),
                                                     (2, 2, 2), (1, 1, 1), (100, 3, 3)])
def test_an_even_window_acts_as_the_next_odd_one_and_a_large_one_as_the_axis(width, tiles, effective):
    assert effective_width(width, tiles) == effective


def test_a_window_is_full_when_no_axis_is_left_out():
    assert is_full((5, 6, 10), (5, 6, 10)) and is_full((9, 9, 99), (5, 6, 10))
    assert not is_full((5, 5, 10), (5, 6, 10))
    assert effective_window((4, 5, 10), (5, 6, 10)) == (5, 5, 10)


@pytest.mark.parametrize("share, tiles, window", [
    ((1.0, 0.5, 0.3), (5, 6, 10), (5, 3, 3)), ((0.2, 1.0, 1.0), (5, 6, 10), (1, 6, 10)),
    ((0.4, 0.4, 0.4), (10, 10, 10), (5, 5, 5)), ((0.001, 0.01, 0.1), (3, 6, 10), (1, 1, 1)),
    ((0.667, 0.6667, 0.67), (3, 3, 3), (3, 3, 3)), ((0.333, 1 / 3, 0.3334), (3, 3, 3), (1, 1, 1)),
    ((0.9, 0.91, 1), (10, 10, 10), (9, 10, 10))], ids=str)
def test_a_fraction_gives_the_smallest_window_that_covers_it(share, tiles, window):
    assert window_of_share(share, tiles) == window


@settings(deadline=None)
@given(tiles=st.tuples(*[st.integers(1, 400)] * 3), window=st.tuples(*[st.integers(1, 450)] * 3))
def test_a_window_as_fractions_gives_the_window_back(tiles, window):
    assert window_of_share(share_of_window(window, tiles), tiles) == effective_window(window, tiles)


@settings(max_examples=200, deadline=None)
@given(share=st.tuples(*[st.floats(1e-6, 1.0)] * 3), tiles=st.tuples(*[st.integers(1, 60)] * 3))
def test_a_window_of_a_fraction_covers_it_and_the_next_smaller_one_does_not(share, tiles):
    for part, n, width in zip(share, tiles, window_of_share(share, tiles)):
        needed = Fraction(part) * n
        assert width >= needed - Fraction(2, 1000)
        smaller = [w for w in range(1, n + 1) if effective_width(w, n) == w and w < width]
        assert not smaller or max(smaller) < needed


@settings(max_examples=60, deadline=None)
@given(thw=st.tuples(*[st.integers(1, 6)] * 3), tile=st.tuples(*[st.integers(1, 4)] * 3),
       window=st.tuples(*[st.integers(1, 5)] * 3), prefix=st.integers(0, 3), suffix=st.integers(0, 3),
       hides=st.booleans())
def test_the_density_is_the_counted_share_of_pairs(thw, tile, window, prefix, suffix, hides):
    hidden = (0,) if hides and prefix + suffix else ()
    grid = TokenGrid(thw, prefix, suffix, hidden)
    pairs = sum(len(keys_of_query(place, thw, tile, window, prefix, suffix, hidden))
                for place in range(grid.num_tokens))
    wanted = pairs / (grid.num_tokens * (grid.num_tokens - len(hidden)))
    assert window_density(grid, tile, window) == pytest.approx(wanted, rel=1e-12)


def test_the_density_of_upstreams_hunyuan_windows_is_upstreams():
    grid, tile, tiles = TokenGrid((30, 48, 80)), (6, 8, 8), (5, 6, 10)
    for window, kept in [((5, 6, 10), 300), ((5, 3, 3), 45), ((1, 6, 10), 60), ((3, 3, 5), 45), ((5, 1, 10), 50)]:
        assert window_density(grid, tile, window) == pytest.approx(kept / 300, rel=1e-12)
        assert window_tile_share(tiles, window) == kept / 300


def test_short_tiles_weigh_less_than_whole_ones():
    thw, tile = (9, 8, 8), (4, 8, 8)                     # tiles of 4, 4 and 1 frames
    assert [ceil(a / b) for a, b in zip(thw, tile)] == [3, 1, 1] and prod(thw) == 576
    assert window_density(TokenGrid(thw), tile, (1, 1, 1)) == pytest.approx((4 * 4 + 4 * 4 + 1) / 81)


@pytest.mark.parametrize("text, window", [("3x3x5", (3, 3, 5)), (" 1 x 6 x 10 ", (1, 6, 10)), ("3,3,5", (3, 3, 5)),
                                          ("1.0x0.5x0.3", (1.0, 0.5, 0.3)), ("1.×.5×.25", (1.0, 0.5, 0.25))])
def test_a_window_is_read_in_tiles_or_as_fractions(text, window):
    read = parse_window(text)
    assert read == window and [type(x) for x in read] == [type(x) for x in window]


@pytest.mark.parametrize("text, found", [
    ("0x3x3", r"\[0, 3, 3\]: t is 0, wanted at least 1 tile"), ("3x-1x3", "h is -1"), ("3x3", "'3x3': wanted time"),
    ("1.0x3x3", "mixes tiles and fractions"), ("1.5x1.0x1.0", "t is 1.5, wanted a fraction above 0 and at most 1"),
    ("0.0x1.0x1.0", "t is 0.0"), ("axbxc", "wanted time x height x width"), ("", "''"), ("3x3x3x3", "'3x3x3x3'"),
    ("-0.5x1.0x1.0", "t is -0.5"), ("nanx1.0x1.0", "wanted time")])
def test_a_window_that_cannot_be_is_refused(text, found):
    with pytest.raises(ValueError, match=found):
        parse_window(text)


@pytest.mark.parametrize("window", [(1, 2), (1, 2, 3, 4), 3, None, "333", (True, 1, 1), (1.0, 1, 1), ("1", 1, 1)])
def test_a_window_of_the_wrong_kind_is_refused(window):
    with pytest.raises(ValueError, match="wanted"):
        check_window(window)


@pytest.mark.parametrize("share", [(0.5, 0.5), (float("nan"), 1, 1), (float("inf"), 1, 1), (True, 1, 1), ("1", 1, 1),
                                   (0, 1, 1), (1.0000001, 1, 1), None])
def test_fractions_of_the_wrong_kind_are_refused(share):
    with pytest.raises(ValueError, match="wanted"):
        check_share(share)


@pytest.mark.parametrize("density", [0.001, 0.1, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("window", [(1, 1, 1), (5, 3, 3), (1, 3, 7)], ids=str)
def test_the_smallest_window_of_some_proportions_that_computes_a_density(window, density):
    grid, tile = TokenGrid((20, 24, 52)), (4, 4, 4)
    found = window_of_density(grid, tile, window, density)
    assert window_density(grid, tile, found) >= density
    scaled = [effective_window(tuple(max(1, round(n / 100 * w)) for w in window), (5, 6, 13)) for n in range(1, 1400)]
    enough = [other for other in scaled if window_density(grid, tile, other) >= density]
    assert found == min(enough, key=lambda other: window_density(grid, tile, other))
