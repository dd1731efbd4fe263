"""Which transformer blocks stay dense, and which part of the denoising runs sparse."""
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pack.vsa_core.schedule import DenseBlocks, Schedule, parse_dense_blocks


def named_blocks(text, total):
    blocks = parse_dense_blocks(text)
    return {i for i in range(total) if blocks.contains(i, total)}


@pytest.mark.parametrize("text, total, wanted", [
    ("", 40, set()),
    ("   ", 40, set()),
    (",", 40, set()),
    ("0", 40, {0}),
    ("0, 1, 38-39", 40, {0, 1, 38, 39}),
    ("0,1,38-39", 40, {0, 1, 38, 39}),
    (" 7 , 3-5 ", 40, {3, 4, 5, 7}),
    ("1,,2", 40, {1, 2}),
    ("1,2,", 40, {1, 2}),
    ("4-4", 40, {4}),
    ("2-5, 4-7, 5", 40, {2, 3, 4, 5, 6, 7}),
    ("-1", 40, {39}),
    ("-1", 30, {29}),
    ("0, -1, -2", 5, {0, 3, 4}),
    ("-40", 40, {0}),
    ("-41", 40, set()),
    ("40", 40, set()),
    ("38-99", 40, {38, 39}),
])
def test_dense_blocks_are_the_numbers_and_ranges_that_the_text_names(text, total, wanted):
    assert named_blocks(text, total) == wanted


def test_the_last_block_is_dense_only_where_it_is_last():
    blocks = parse_dense_blocks("-1")
    assert isinstance(blocks, DenseBlocks)
    assert blocks.contains(29, 30) and not blocks.contains(29, 40) and not blocks.contains(30, 40)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(-50, 50), st.tuples(st.integers(0, 50), st.integers(0, 9))), max_size=6),
       st.integers(1, 60))
def test_any_list_of_numbers_and_ranges_names_their_union(parts, total):
    text, wanted = [], set()
    for part in parts:
        if isinstance(part, tuple):
            text.append(f"{part[0]}-{part[0] + part[1]}")
            wanted.update(range(part[0], part[0] + part[1] + 1))
        else:
            text.append(str(part))
            wanted.add(part if part >= 0 else total + part)
    assert named_blocks(", ".join(text), total) == wanted & set(range(total))


@pytest.mark.parametrize("text, found", [
    ("a", "a"), ("1.5", "1.5"), ("3-1", "3-1"), ("0, x, 2", "x"), ("1 2", "1 2"), ("1-2-3", "1-2-3"), ("1-", "1-"),
    ("--1", "--1"), ("0-b", "0-b"), ("1;2", "1;2"), ("0x10", "0x10"), ("1e1", "1e1"),
])
def test_unreadable_dense_blocks_say_what_was_found_and_what_is_wanted(text, found):
    with pytest.raises(ValueError) as caught:
        parse_dense_blocks(text)
    assert repr(found) in str(caught.value) and "wanted" in str(caught.value)


@pytest.mark.parametrize("start, end", [(0.0, 1.0), (0, 1), (0.2, 0.9), (0.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_a_schedule_runs_from_start_to_end(start, end):
    schedule = Schedule(start, end)
    assert (schedule.start_percent, schedule.end_percent) == (start, end)
    assert schedule == Schedule(start_percent=start, end_percent=end)


@pytest.mark.parametrize("start, end, found", [
    (-0.1, 1.0, "-0.1"), (0.0, 1.1, "1.1"), (1.5, 2.0, "1.5"), (0.0, -0.5, "-0.5"), (0.7, 0.3, "0.7"),
    (math.nan, 1.0, "nan"), (0.0, math.nan, "nan"), (0.0, math.inf, "inf"),
])
def test_an_impossible_schedule_says_what_was_found_and_what_is_wanted(start, end, found):
    with pytest.raises(ValueError) as caught:
        Schedule(start, end)
    assert found in str(caught.value) and "wanted" in str(caught.value)


def test_the_sparse_part_in_sigmas_is_the_models_own_translation():
    schedule = Schedule(0.25, 0.75)
    assert schedule.sigmas(lambda percent: 10 * (1 - percent)) == (7.5, 2.5)
