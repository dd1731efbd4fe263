"""A picture of the tiles that one query tile keeps."""
from __future__ import annotations

import math

import torch
from PIL import Image, ImageDraw
from torch import Tensor

_WIDTH = 1000
INK, PAPER, OUTLINE = (32, 36, 44), (250, 250, 247), (226, 74, 51)
_LOW, _HIGH = (231, 233, 236), (18, 78, 138)
_MARGIN, _GAP, _LINE = 16, 14, 18


def draw_tile_map(tile_map: Tensor, caption: str) -> Tensor:
    """One panel per tile along time, each a grid of tiles coloured by the share of heads that keep it.

    tile_map: [Nt, Nh, Nw] in 0..1, for the query tile in the middle, which is outlined.
    Returns an IMAGE, float32 [1, height, width, 3] in 0..1.
    """
    n_t, n_h, n_w = tile_map.shape
    columns = min(n_t, max(1, round(math.sqrt(n_t * n_h / n_w * 1.4))))
    cell = max(3, int((_WIDTH - 2 * _MARGIN - (columns - 1) * _GAP) / (columns * n_w)))
    rows = -(-n_t // columns)
    lines = caption.split("\n") + ["share of heads that keep a tile, for the outlined query tile:"]
    top = _MARGIN + _LINE * (len(lines) + 1) + 8
    width = max(_WIDTH, 2 * _MARGIN + columns * n_w * cell + (columns - 1) * _GAP)
    height = top + rows * (n_h * cell + _LINE + _GAP) + _MARGIN
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + i * _LINE), line, fill=INK)
    _draw_legend(draw, _MARGIN, _MARGIN + len(lines) * _LINE)
    for t in range(n_t):
        left = _MARGIN + (t % columns) * (n_w * cell + _GAP)
        upper = top + (t // columns) * (n_h * cell + _LINE + _GAP)
        draw.text((left, upper), f"tile {t + 1} of {n_t} in time", fill=INK)
        upper += _LINE - 2
        for h in range(n_h):
            for w in range(n_w):
                box = (left + w * cell, upper + h * cell, left + (w + 1) * cell - 1, upper + (h + 1) * cell - 1)
                draw.rectangle(box, fill=colour(float(tile_map[t, h, w])))
        if t == n_t // 2:
            x, y = left + n_w // 2 * cell, upper + n_h // 2 * cell
            draw.rectangle((x - 2, y - 2, x + cell, y + cell), outline=OUTLINE, width=2)
    return to_image(image)


def to_image(picture: Image.Image) -> Tensor:
    """A PIL picture as ComfyUI's IMAGE, float32 [1, height, width, 3] in 0..1."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3).float() / 255.0


def _draw_legend(draw: ImageDraw.ImageDraw, left: int, top: int) -> None:
    for i in range(120):
        draw.line((left + 34 + i, top + 2, left + 34 + i, top + 12), fill=colour(i / 119))
    draw.text((left, top), "none", fill=INK)
    draw.text((left + 160, top), "all", fill=INK)


def colour(share: float) -> tuple[int, ...]:
    """Light for a share of 0, dark for 1."""
    return tuple(round(low + (high - low) * share) for low, high in zip(_LOW, _HIGH, strict=True))
