"""A picture of a strategy: heads x layers, coloured by window or budget."""
from __future__ import annotations

from collections.abc import Hashable, Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from ...vsa_core.budget_search import BudgetResult
from ...vsa_core.search import SearchResult
from ..evidence.tile_map import INK, PAPER, to_image

_MARGIN, _GAP, _LINE = 16, 22, 18
_TITLE = 96
"""Width that a panel's title takes."""
_PALETTE = ((253, 231, 37), (160, 218, 57), (74, 193, 109), (31, 161, 135), (39, 127, 142), (54, 92, 141),
            (70, 50, 127), (120, 60, 140), (176, 80, 140), (214, 112, 110))
_FULL = (40, 40, 44)
"""Dense attention: what a search could not make sparse should stand out."""


def draw_strategy(result: SearchResult) -> Tensor:
    """A searched strategy: one panel per measured part of the schedule.   -> IMAGE, as `draw_heads`"""
    strategy = result.strategy
    full = result.table[-1]["window"]
    rows = [(row["window"], f"{'x'.join(map(str, row['window']))} tiles, {row['density']:.1%} of attention: "
             f"{row['heads']} heads") for row in result.table]
    title = (f"{result.density:.1%} of attention is computed; a head moves by {result.error:.1%} on average, "
             f"{result.worst_error:.1%} at worst.")
    return draw_heads(title, rows, strategy.sta_param(tuple(full)))


def draw_budgets(result: BudgetResult) -> Tensor:
    """Budgets, likewise."""
    budgets = result.budgets
    rows = [(place, f"{row['share']:.0%} of the tiles, {row['density']:.1%} of attention: {row['heads']} heads")
            for place, row in enumerate(result.rows)]
    title = (f"{result.density:.1%} of attention is computed; on average a head keeps {result.kept:.1%} of its "
             f"attention and moves by {result.error:.1%}.")
    return draw_heads(title, rows, budgets.assignment)


def draw_heads(title: str, choices: Sequence[tuple[Hashable, str]], told: Sequence) -> Tensor:
    """One panel per part of the schedule: a row per layer, a column per head, a colour per choice.

    choices: (choice, its line in the legend), dense attention last.   told: choices as [step][layer][head].
    Returns an IMAGE, float32 [1, height, width, 3] in 0..1.
    """
    colours = {choice: _PALETTE[i % len(_PALETTE)] for i, (choice, _) in enumerate(choices)}
    colours[choices[-1][0]] = _FULL
    steps, layers, heads = len(told), len(told[0]), len(told[0][0])
    cell = max(5, min(22, 900 // heads))
    legend = _LINE * (len(choices) + 3)
    panel = max(_TITLE, heads * cell) + _GAP
    columns = max(1, min(steps, 1100 // panel))
    rows = -(-steps // columns)
    width = max(600, 2 * _MARGIN + columns * panel)
    height = 2 * _MARGIN + legend + rows * (layers * cell + _LINE + _GAP)
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN), f"{title} Rows are layers, columns are heads.", fill=INK)
    for i, (choice, words) in enumerate(choices):
        top = _MARGIN + _LINE * (i + 1) + 4
        draw.rectangle((_MARGIN, top, _MARGIN + 24, top + 11), fill=colours[choice])
        draw.text((_MARGIN + 34, top), words, fill=INK)
    for step in range(steps):
        left = _MARGIN + (step % columns) * panel
        top = _MARGIN + legend + (step // columns) * (layers * cell + _LINE + _GAP)
        draw.text((left, top - _LINE), f"part {step + 1} of {steps}", fill=INK)
        for layer in range(layers):
            for head in range(heads):
                x, y = left + head * cell, top + layer * cell
                draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colours[told[step][layer][head]])
    return to_image(image)
