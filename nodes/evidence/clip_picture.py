"""A picture of two clips: one frame of each beside their difference, and SSIM over the frames."""
from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from .tile_map import (
    GAP,
    HEADLINE_SIZE,
    INK,
    MARGIN,
    OUTLINE,
    PAPER,
    TEXT_SIZE,
    WIDTH,
    colour,
    draw_text,
    font_of,
    frame_picture,
    text_height,
    to_image,
)

_LABEL = 20
_TALLEST = 560
"""Pixels that a panel of an upright clip may be high."""
_CURVE, _RISE = 130, 16
"""Height of the curve, and how far it stays below its title."""
_MOST = 32
"""A difference is made at most so many times as strong: beyond, rounding to 8 bits is all there is to see."""


def draw_pair(reference: Tensor, clip: Tensor, place: str, headline: str, curve: Sequence[float | None],
              marked: int | None) -> Tensor:
    """A frame of both clips and their difference, made stronger, over the curve of SSIM with that frame marked.

    reference, clip: [h, w, 3], one frame of each.   place: what stands beside "reference", such as "frame 17 of 33".
    curve: SSIM per frame, None where there is none; not drawn for fewer than two frames.
    Returns an IMAGE, float32 [1, height, width, 3] in 0..1.
    """
    pair = [frame.float().cpu().nan_to_num(0.0, 1.0, 0.0).unsqueeze(0) for frame in (reference, clip)]
    difference = (pair[0] - pair[1]).abs_()
    factor = strength(difference)
    panels = (("reference, " + place, pair[0]), ("clip", pair[1]),
              (f"difference, {factor} times as strong" if factor > 1 else "difference", difference * factor))
    rows, columns = reference.shape[:2]
    across = (WIDTH - 2 * MARGIN - 2 * GAP) // 3
    scale = min(across / columns, _TALLEST / rows)
    size = max(1, round(columns * scale)), max(1, round(rows * scale))
    text = [(headline, HEADLINE_SIZE)]
    top = text_height(text) + MARGIN + 8
    curve_top = top + _LABEL + 8 + size[1] + GAP
    curve_height = _LABEL + _RISE + _CURVE + _LABEL + GAP if len(curve) > 1 else 0
    image = Image.new("RGB", (WIDTH, curve_top + curve_height), PAPER)
    draw = ImageDraw.Draw(image)
    draw_text(draw, text)
    for number, (label, pixels) in enumerate(panels):
        left = MARGIN + number * (across + GAP)
        draw.text((left, top), label, fill=INK, font=font_of(_LABEL))
        image.paste(frame_picture(pixels, 0, 1, size), (left, top + _LABEL + 8))
    if curve_height:
        _draw_curve(draw, curve, marked, curve_top)
    return to_image(image)


def strength(difference: Tensor) -> int:
    """The power of two that brings all but the largest 1% of the difference up to white, from 1 to 32."""
    values = difference.flatten()
    large = values.kthvalue(max(1, math.ceil(0.99 * values.numel()))).values.item()
    large = large or values.max().item()
    return 1 if large <= 0 else min(_MOST, 2 ** max(0, math.floor(math.log2(1 / large))))


def _draw_curve(draw: ImageDraw.ImageDraw, curve: Sequence[float | None], marked: int | None, top: int) -> None:
    known = [value for value in curve if value is not None]
    floor = min(0.75, math.floor(min(known, default=0.0) * 10) / 10)
    draw.text((MARGIN, top), "SSIM of every frame (1 is identical)", fill=INK, font=font_of(_LABEL))
    top += _LABEL + _RISE
    left, right, bottom = MARGIN + 50, WIDTH - MARGIN - 8, top + _CURVE

    def spot(frame: int, value: float) -> tuple[float, float]:
        return (left + 12 + frame / (len(curve) - 1) * (right - left - 24),
                bottom - (value - floor) / (1 - floor) * _CURVE)
    for value in (1.0, 0.8, floor):
        _, y = spot(0, value)
        draw.line((left, y, right, y), fill=colour(0.15))
        if value != 0.8 or _CURVE * min(0.2, 0.8 - floor) / (1 - floor) > TEXT_SIZE:
            draw.text((left - 8, y), f"{value:g}", fill=INK, font=font_of(TEXT_SIZE), anchor="rm")
    parts: list[list[tuple[float, float]]] = [[]]
    for frame, value in enumerate(curve):
        if value is None:
            parts.append([])
        else:
            parts[-1].append(spot(frame, value))
    for part in parts:
        if len(part) > 1:
            draw.line(part, fill=colour(1), width=3, joint="curve")
        for x, y in part if len(part) == 1 or len(curve) <= 40 else []:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour(1))
    ends = (0, len(curve) - 1)
    row = bottom + _LABEL // 2 + 6
    if marked is not None and curve[marked] is not None:
        x, y = spot(marked, curve[marked])
        draw.ellipse((x - 7, y - 7, x + 7, y + 7), outline=OUTLINE, width=3)
        words = f"frame {marked + 1}"
        half = font_of(TEXT_SIZE).getlength(words) / 2
        x = min(max(x, left + half), right - half)
        draw.text((x, row), words, fill=OUTLINE, font=font_of(TEXT_SIZE), anchor="mm")
        ends = [frame for frame in ends if abs(spot(frame, 0)[0] - x) > 2 * half]
    for frame in ends:
        draw.text((spot(frame, 0)[0], row), str(frame + 1), fill=INK, font=font_of(TEXT_SIZE), anchor="mm")
