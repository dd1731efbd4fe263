"""A picture of a searched strategy: heads x layers, coloured by window."""
from __future__ import annotations

from PIL import Image, ImageDraw
from torch import Tensor

from ...vsa_core.search import SearchResult
from ..evidence.tile_map import INK, PAPER, to_image

_MARGIN, _GAP, _LINE = 16, 22, 18
_TITLE = 96
"""Width that a panel's title takes."""
_PALETTE = ((253, 231, 37), (160, 218, 57), (74, 193, 109), (31, 161, 135), (39, 127, 142), (54, 92, 141),
            (70, 50, 127), (120, 60, 140), (176, 80, 140), (214, 112, 110))
_FULL = (40, 40, 44)
"""The full window: what a search could not make sparse should stand out."""


def draw_strategy(result: SearchResult) -> Tensor:
    """One panel per measured part of the schedule: a row per layer, a column per head, a colour per window.

    Returns an IMAGE, float32 [1, height, width, 3] in 0..1.
    """
    strategy = result.strategy
    full = result.table[-1]["window"]
    colours = {row["window"]: _PALETTE[i % len(_PALETTE)] for i, row in enumerate(result.table)}
    colours[full] = _FULL
    cell = max(5, min(22, 900 // strategy.heads))
    legend = _LINE * (len(result.table) + 3)
    panel = max(_TITLE, strategy.heads * cell) + _GAP
    columns = max(1, min(strategy.steps, 1100 // panel))
    rows = -(-strategy.steps // columns)
    width = max(600, 2 * _MARGIN + columns * panel)
    height = 2 * _MARGIN + legend + rows * (strategy.layers * cell + _LINE + _GAP)
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN), f"{result.density:.1%} of attention is computed; a head moves by "
              f"{result.error:.1%} on average, {result.worst_error:.1%} at worst. Rows are layers, columns are heads.",
              fill=INK)
    for i, row in enumerate(result.table):
        top = _MARGIN + _LINE * (i + 1) + 4
        draw.rectangle((_MARGIN, top, _MARGIN + 24, top + 11), fill=colours[row["window"]])
        draw.text((_MARGIN + 34, top), f"{'x'.join(map(str, row['window']))} tiles, {row['density']:.1%} of attention: "
                  f"{row['heads']} heads", fill=INK)
    param = strategy.sta_param(tuple(full))
    for step in range(strategy.steps):
        left = _MARGIN + (step % columns) * panel
        top = _MARGIN + legend + (step // columns) * (strategy.layers * cell + _LINE + _GAP)
        draw.text((left, top - _LINE), f"part {step + 1} of {strategy.steps}", fill=INK)
        for layer in range(strategy.layers):
            for head in range(strategy.heads):
                x, y = left + head * cell, top + layer * cell
                draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=colours[param[step][layer][head]])
    return to_image(image)
