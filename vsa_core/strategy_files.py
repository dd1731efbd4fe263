"""Strategies as files: FastVideo's JSON, whose windows count the tiles of one grid, and our own, in fractions: windows
of Sliding Tile Attention, or budgets of Video Sparse Attention.

Every error says what was found and what was wanted.
"""
from __future__ import annotations

import json
import os
import re
from pathlib import Path

from .budgets import Budgets, check_kept
from .grid import Thw
from .strategy import Strategy
from .window import check_share, check_window

FORMAT, BUDGET_FORMAT, VERSION = "sliding tile attention strategy", "video sparse attention budgets", 1

UPSTREAM_TILES: tuple[Thw, ...] = ((5, 6, 10), (6, 6, 6), (3, 6, 10))
"""Tiles of 6x8x8 on the grids of FastVideo's published strategies: HunyuanVideo, StepVideo, Wan2.1."""

_ENTRY = re.compile(r"(0|[1-9]\d{0,6})_(0|[1-9]\d{0,6})_(0|[1-9]\d{0,6})")


def load_strategy(path: str | os.PathLike, tiles: Thw | None = None) -> Strategy | Budgets:
    """`parse_strategy` of a file, whose name is in the errors."""
    try:
        return parse_strategy(Path(path).read_text(encoding="utf-8-sig"), tiles)
    except ValueError as error:
        raise ValueError(f"{Path(path).name}: {error}") from error


def save_strategy(strategy: Strategy | Budgets, path: str | os.PathLike, tiles: Thw | None = None) -> None:
    """Write a file in our own form or, with `tiles`, in FastVideo's for a grid of so many tiles; whole or not.

    Raises ValueError for budgets with `tiles`: FastVideo's form has windows only.
    """
    if tiles is not None and isinstance(strategy, Budgets):
        raise ValueError("budgets have no form of FastVideo's: leave grid_tiles empty")
    path = Path(path)
    part = path.with_name(path.name + ".part")
    part.write_text(to_json(strategy) if tiles is None else to_upstream_json(strategy, tiles), encoding="utf-8")
    part.replace(path)


def parse_strategy(text: str, tiles: Thw | None = None) -> Strategy | Budgets:
    """The strategy that a text of any form holds.

    tiles: the grid, in tiles, that windows in FastVideo's form count on. None: the published grid that the widest
    window spans; when none fits, the text alone does not say how large a window is, and this raises.
    Raises ValueError for everything that is not a whole strategy.
    """
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON at line {error.lineno}, column {error.colno} ({error.msg}): "
                         "wanted a strategy; the file may be cut short") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply: wanted a strategy") from error
    if not isinstance(data, dict):
        raise ValueError(f"found a JSON {type(data).__name__}: wanted an object, either {{\"step_layer_head\": "
                         f"[t, h, w], ...}} or one with \"format\": \"{FORMAT}\"")
    return _parse_own(data) if "format" in data else _parse_upstream(data, tiles)


def to_json(strategy: Strategy | Budgets) -> str:
    """Our own form: windows as fractions of the grid, or shares of the tiles, and for every step and layer the numbers
    of the heads' windows or shares."""
    if isinstance(strategy, Budgets):
        form, choices = BUDGET_FORMAT, {"far_field": strategy.far_field, "shares": strategy.shares}
    else:
        form, choices = FORMAT, {"windows": strategy.windows}
    return json.dumps({
        "format": form, "version": VERSION, "model": strategy.model, "steps": strategy.steps,
        "layers": strategy.layers, "heads": strategy.heads, "grid": strategy.grid, "tile": strategy.tile,
        **choices, "assignment": strategy.assignment}, separators=(",", ":"))


def to_upstream_json(strategy: Strategy, tiles: Thw) -> str:
    """FastVideo's form for a grid of `tiles`. An even window comes back as the odd one that it acts as."""
    return json.dumps({f"{step}_{layer}_{head}": window for step, rows in enumerate(strategy.sta_param(tiles))
                       for layer, row in enumerate(rows) for head, window in enumerate(row)})


def _without_duplicates(pairs: list) -> dict:
    data = dict(pairs)
    if len(data) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"entry {twice!r} is there twice: wanted every entry once")
    return data


def _parse_upstream(data: dict, tiles: Thw | None) -> Strategy:
    if not data:
        raise ValueError("found an empty object: wanted entries \"step_layer_head\": [t, h, w]")
    windows, checked = {}, {}
    for key, value in data.items():
        match = _ENTRY.fullmatch(key)
        if not match:
            raise ValueError(f"entry {key!r}: wanted three numbers as step_layer_head, such as 0_12_3, or a "
                             f"\"format\" of \"{FORMAT}\"")
        text = str(value)                   # tells True and 1.0 from 1, which their hashes do not
        if text not in checked:
            try:
                checked[text] = check_window(value)
            except ValueError as error:
                raise ValueError(f"entry {key!r}: {error}") from error
        step, layer, head = match.groups()
        windows[int(step), int(layer), int(head)] = checked[text]
    steps, layers, heads = (max(place[axis] for place in windows) + 1 for axis in range(3))
    if len(windows) != steps * layers * heads:
        missing = next(f"{t}_{i}_{h}" for t in range(steps) for i in range(layers) for h in range(heads)
                       if (t, i, h) not in windows)
        raise ValueError(f"found {len(windows)} entries for {steps} steps of {layers} layers of {heads} heads, wanted "
                         f"{steps * layers * heads}: {missing!r} is missing; the file may be cut short")
    tiles = _upstream_tiles(checked.values(), tiles)
    return Strategy.of_windows([[[windows[t, i, h] for h in range(heads)] for i in range(layers)]
                                for t in range(steps)], tiles)


def _upstream_tiles(windows, tiles: Thw | None) -> Thw:
    widest = tuple(max(axis) for axis in zip(*windows, strict=True))
    if tiles is None:
        if widest not in UPSTREAM_TILES:
            raise ValueError(
                f"the widest window is {_x(widest)} tiles, and none of the published grids "
                f"({', '.join(map(_x, UPSTREAM_TILES))}) is: say how many tiles the grid has that it was made for")
        return widest
    tiles = check_window(tiles)
    if any(width > n for width, n in zip(widest, tiles, strict=True)):
        raise ValueError(f"windows of up to {_x(widest)} tiles on a grid of {_x(tiles)}: wanted the grid that the "
                         "strategy was made for")
    return tiles


def _parse_own(data: dict) -> Strategy | Budgets:
    if data["format"] not in (FORMAT, BUDGET_FORMAT):
        raise ValueError(f"format {data['format']!r}: wanted {FORMAT!r} or {BUDGET_FORMAT!r}")
    if data.get("version") != VERSION:
        raise ValueError(f"version {data.get('version')!r} of the strategy's format: this reads {VERSION}. "
                         "A newer file needs a newer node pack")
    named, check = ("windows", check_share) if data["format"] == FORMAT else ("shares", check_kept)
    wanted = ("steps", "layers", "heads", named, "assignment")
    absent = [name for name in wanted if name not in data]
    if absent:
        raise ValueError(f"strategy without {', '.join(absent)}: wanted all of {', '.join(wanted)}")
    choices, table = data[named], data["assignment"]
    if not isinstance(choices, list) or not choices:
        of = "three fractions each" if named == "windows" else "numbers above 0 and at most 1"
        raise ValueError(f"{named} {choices!r}: wanted a list of {of}")
    if not isinstance(table, list) or not all(isinstance(rows, list) and all(isinstance(row, list) for row in rows)
                                              for rows in table):
        raise ValueError(f"assignment: wanted a list of steps of layers of heads' {named[:-1]} numbers")
    model = data.get("model") or ""
    if not isinstance(model, str):
        raise ValueError(f"model {model!r}: wanted a name")
    facts = {name: None if data.get(name) is None else _whole(name, data[name]) for name in ("grid", "tile")}
    kind = Strategy
    if named == "shares":
        kind, facts["far_field"] = Budgets, data.get("far_field", False)
        if not isinstance(facts["far_field"], bool):
            raise ValueError(f"far_field {facts['far_field']!r}: wanted true or false")
    strategy = kind(tuple(check(choice) for choice in choices), table, model=model, **facts)
    said = tuple(data[name] for name in ("steps", "layers", "heads"))
    found = (strategy.steps, strategy.layers, strategy.heads)
    if said != found:
        raise ValueError("assignment holds {} steps, {} layers, {} heads".format(*found)
                         + ", the file says {}, {}, {}: the file may be cut short".format(*said))
    return strategy


def _whole(name: str, value) -> Thw:
    if not (isinstance(value, list) and len(value) == 3 and all(type(x) is int and x > 0 for x in value)):
        raise ValueError(f"{name} {value!r}: wanted three positive whole numbers, time, height, width")
    return tuple(value)


def _x(window) -> str:
    return "x".join(map(str, window))
