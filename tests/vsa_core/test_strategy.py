"""Mask strategies: upstream's file, our own, what is converted and what is refused."""
import json
import random
import time
from collections import Counter

import pytest

from pack.vsa_core.grid import TokenGrid
from pack.vsa_core.strategy import Strategy
from pack.vsa_core.strategy_files import (
    load_strategy,
    parse_strategy,
    save_strategy,
    to_json,
    to_upstream_json,
)

HUNYUAN = {(5, 6, 10): 21600, (5, 3, 3): 20380, (1, 6, 10): 15916, (3, 3, 5): 7396, (5, 1, 10): 5244, (5, 6, 1): 1464}
"""How often the published HunyuanVideo strategy has each window; the first 15 of its 50 steps are full."""


@pytest.fixture(scope="module")
def hunyuan():
    """A file with the layout and the counts of the published one: 50 steps, 60 layers, 24 heads."""
    narrow = [list(window) for window, count in HUNYUAN.items() if window != (5, 6, 10) for _ in range(count)]
    random.Random(0).shuffle(narrow)
    narrow = iter(narrow)
    return json.dumps({f"{t}_{layer}_{head}": [5, 6, 10] if t < 15 else next(narrow)
                       for t in range(50) for layer in range(60) for head in range(24)})


def upstream(steps=2, layers=2, heads=3, **changes):
    """A small strategy of full and narrow windows on 3x6x10 tiles, as a dict; changes replace or, with None, drop."""
    table = {f"{t}_{i}_{h}": [3, 6, 10] if (t + i + h) % 2 else [1, 3, 5]
             for t in range(steps) for i in range(layers) for h in range(heads)}
    table.update({key.removeprefix("at_"): value for key, value in changes.items()})
    return {key: value for key, value in table.items() if value is not None}


def test_the_published_layout_is_read_whole_and_in_a_few_seconds(hunyuan):
    start = time.thread_time()
    strategy = parse_strategy(hunyuan)
    assert time.thread_time() - start < 4.0
    assert (strategy.steps, strategy.layers, strategy.heads) == (50, 60, 24)
    windows = strategy.sta_param((5, 6, 10))
    assert Counter(window for rows in windows for row in rows for window in row) == HUNYUAN
    raw = json.loads(hunyuan)
    assert all(list(windows[t][i][h]) == raw[f"{t}_{i}_{h}"] for t, i, h in [(0, 0, 0), (20, 7, 3), (49, 59, 23)])
    assert sum(strategy.uses.values()) == 72000
    assert strategy.density(TokenGrid((30, 48, 80)), (6, 8, 8)) == pytest.approx(0.41625, abs=5e-6)


def test_upstreams_file_comes_back_as_it_was(hunyuan):
    assert json.loads(to_upstream_json(parse_strategy(hunyuan), (5, 6, 10))) == json.loads(hunyuan)


def test_our_own_form_comes_back_as_it_was_with_all_it_says(hunyuan, tmp_path):
    strategy = Strategy(parse_strategy(hunyuan).windows, parse_strategy(hunyuan).assignment, grid=(30, 48, 80),
                        tile=(6, 8, 8), model="HunyuanVideo")
    assert parse_strategy(to_json(strategy)) == strategy
    save_strategy(strategy, tmp_path / "own.json")
    assert load_strategy(tmp_path / "own.json") == strategy and len(to_json(strategy)) < 200_000
    save_strategy(strategy, tmp_path / "upstream.json", tiles=(5, 6, 10))
    assert load_strategy(tmp_path / "upstream.json").assignment == strategy.assignment
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.json", "upstream.json"]


def test_a_strategy_goes_to_another_grid_by_fractions():
    strategy = parse_strategy(json.dumps(upstream()))
    assert strategy.windows == ((1 / 3, 0.5, 0.5), (1.0, 1.0, 1.0))
    assert strategy.sta_param((6, 12, 20))[0][0] == ((3, 7, 11), (6, 12, 20), (3, 7, 11))
    assert strategy.sta_param((3, 6, 10))[0][0] == ((1, 3, 5), (3, 6, 10), (1, 3, 5))
    assert strategy.sta_param((1, 1, 1))[0][0] == ((1, 1, 1),) * 3


@pytest.mark.parametrize("steps, taken", [(4, [0, 1, 2, 3]), (2, [1, 3]), (8, [0, 0, 1, 1, 2, 2, 3, 3]), (1, [2]),
                                          (3, [0, 2, 3])])
def test_steps_are_taken_at_the_same_fraction_of_the_schedule(steps, taken):
    four = Strategy(((1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), (0.1, 0.1, 0.1)),
                    tuple((((step,) * 2,)) for step in range(4)))
    assert [four.step_of(step, steps) for step in range(steps)] == taken
    assert [rows[0][0] for rows in four.resampled(steps).assignment] == taken
    assert four.resampled(steps).sta_param((10, 10, 10)) == four.sta_param((10, 10, 10), steps)
    with pytest.raises(ValueError, match=f"step {steps} of {steps}: wanted 0 to"):
        four.step_of(steps, steps)


def test_a_model_with_other_layers_or_heads_is_refused_naming_both_sides(hunyuan):
    strategy = parse_strategy(hunyuan)
    strategy.require(60, 24)
    strategy.require(None, 24)
    with pytest.raises(ValueError, match="made for 60 layers of 24 heads, this model has 40 layers of 24 heads"):
        strategy.require(40, 24)
    with pytest.raises(ValueError, match="made for 60 layers of 24 heads, this model has 12 heads"):
        strategy.require(None, 12)
    named = Strategy(strategy.windows, strategy.assignment, model="HunyuanVideo")
    with pytest.raises(ValueError, match=r"24 heads \(HunyuanVideo\), this model"):
        named.require(60, 40)


def test_an_even_window_is_kept_as_what_it_acts_as():
    strategy = parse_strategy(json.dumps(upstream(at_0_0_0=[2, 4, 4])))
    assert strategy.sta_param((3, 6, 10))[0][0][0] == (3, 5, 5)


def test_a_file_that_spans_no_published_grid_needs_to_be_told_its_own():
    text = json.dumps({f"0_0_{head}": [3, 3, 3] for head in range(2)})
    with pytest.raises(ValueError, match="widest window is 3x3x3 tiles.*5x6x10, 6x6x6, 3x6x10.*say how many tiles"):
        parse_strategy(text)
    assert parse_strategy(text, tiles=(6, 6, 6)).windows == ((0.5, 0.5, 0.5),)
    with pytest.raises(ValueError, match="up to 3x3x3 tiles on a grid of 2x6x6"):
        parse_strategy(text, tiles=(2, 6, 6))


@pytest.mark.parametrize("changes, found", [
    ({"at_0_1_2": [0, 6, 10]}, r"entry '0_1_2': window \[0, 6, 10\]: t is 0, wanted at least 1"),
    ({"at_0_1_2": [3, -6, 10]}, "'0_1_2'.*h is -6"), ({"at_0_1_2": [3, 6, 1.5]}, "w is 1.5, wanted a whole number"),
    ({"at_0_1_2": [3.0, 6, 10]}, "t is 3.0, wanted a whole"), ({"at_0_1_2": [True, 6, 10]}, "t is True"),
    ({"at_0_1_2": [3, 6]}, r"'0_1_2'.*\[3, 6\]: wanted three"), ({"at_0_1_2": "full"}, "'0_1_2'.*'full'"),
    ({"at_0_1_2": None}, "found 11 entries.*wanted 12: '0_1_2' is missing"),
    ({"at_9_0_0": [3, 6, 10]}, "found 13 entries for 10 steps.*'2_0_0' is missing"),
    ({"at_0_1": [3, 6, 10]}, "entry '0_1': wanted three numbers"),
    ({"at_00_1_2": [3, 6, 10]}, "entry '00_1_2'"), ({"at_0_-1_2": [3, 6, 10]}, "entry '0_-1_2'")])
def test_a_wrong_entry_of_upstreams_form_is_named(changes, found):
    with pytest.raises(ValueError, match=found):
        parse_strategy(json.dumps(upstream(**changes)))


@pytest.mark.parametrize("text, found", [
    ("", "no JSON at line 1, column 1"), ("[1, 2]", "found a JSON list"), ("3", "found a JSON int"),
    ("{}", "empty object"), ('{"a": ', "no JSON at line 1.*cut short"), ("[" * 100000, "nested too deeply|no JSON"),
    ('{"0_0_0": [3, 6, 10], "0_0_0": [3, 6, 10]}', "'0_0_0' is there twice"), ('{"x": [3, 6, 10]}', "entry 'x'"),
    ('{"format": "something else"}', "format 'something else': wanted 'sliding tile attention strategy'")])
def test_a_text_that_is_no_strategy_is_refused(text, found):
    with pytest.raises(ValueError, match=found):
        parse_strategy(text)


def test_a_file_cut_anywhere_is_refused(hunyuan):
    for text in (json.dumps(upstream()), to_json(parse_strategy(json.dumps(upstream())))):
        for end in range(len(text)):
            with pytest.raises(ValueError, match="wanted|cut short"):
                parse_strategy(text[:end])
    with pytest.raises(ValueError, match="cut short"):
        parse_strategy(hunyuan[:1_000_000])


@pytest.mark.parametrize("changes, found", [
    ({"version": 2}, "version 2 of the strategy's format: this reads 1"), ({"version": None}, "version None"),
    ({"windows": [[1.0, 1.0, 1.5], [1, 1, 1]]}, "w is 1.5, wanted a fraction above 0 and at most 1"),
    ({"windows": [[0, 1, 1], [1, 1, 1]]}, "t is 0, wanted a fraction"), ({"windows": []}, r"windows \[\]: wanted"),
    ({"windows": [[1, 1, 1]]}, "window number 1, wanted 0 to 0"), ({"steps": 3}, "2 steps.*the file says 3"),
    ({"assignment": [[[0]], [[0, 1]]]}, "step 1, layer 0 has 2 heads, wanted 1"),
    ({"assignment": [[[0]], [[0], [0]]]}, "step 1 has 2 layers, wanted 1"), ({"assignment": []}, "without steps"),
    ({"assignment": [[["0"]]]}, "window number '0'"), ({"assignment": [[[-1]]]}, "window number -1"),
    ({"assignment": [[[True]]]}, "window number True"), ({"assignment": [3]}, "assignment: wanted a list of steps"),
    ({"grid": [1, 2]}, r"grid \[1, 2\]: wanted three"), ({"tile": [6, 8, 0]}, "tile"), ({"model": 3}, "model 3"),
    ({"heads": None, "layers": None}, "file says 2, None, None")])
def test_a_wrong_part_of_our_own_form_is_named(changes, found):
    data = json.loads(to_json(parse_strategy(json.dumps(upstream()))))
    with pytest.raises(ValueError, match=found):
        parse_strategy(json.dumps({**data, **changes}))


def test_our_own_form_without_a_part_says_which():
    with pytest.raises(ValueError, match="without steps, windows: wanted all of"):
        parse_strategy('{"format": "sliding tile attention strategy", "version": 1, "layers": 1, "heads": 1, '
                       '"assignment": [[[0]]]}')


def test_errors_of_a_file_name_it(tmp_path):
    (tmp_path / "mine.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="^mine.json: "):
        load_strategy(tmp_path / "mine.json")
    (tmp_path / "short.json").write_text("{")
    with pytest.raises(ValueError, match="^short.json: no JSON"):
        load_strategy(tmp_path / "short.json")
