"""A picture of the tiles that one query tile looks at, laid over the clip where its frames are at hand."""
from __future__ import annotations

import math
from functools import lru_cache

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WIDTH = 1000
INK, PAPER, OUTLINE = (32, 36, 44), (250, 250, 247), (226, 74, 51)
_LOW, _HIGH = (231, 233, 236), (18, 78, 138)
MARGIN, GAP = 16, 14
HEADLINE_SIZE, TEXT_SIZE, SMALL_SIZE = 24, 18, 14
"""Sizes of letters: a headline can be read in a node of default size."""
_VEIL = 0.8
"""How much of a frame is covered where no head looks."""
Thw = tuple[int, int, int]


def draw_tile_map(tile_map: Tensor, grid: Thw, tile: Thw, headline: str, images: Tensor | None = None) -> Tensor:
    """One panel per tile along time, each with the tiles of a frame coloured by the share of heads that look there.

    tile_map: [Nt, Nh, Nw] in 0..1, for the query tile in the middle, which is outlined.
    grid, tile: tokens of the clip and of a tile, t x h x w.   images: the decoded clip, IMAGE [frames, h, w, C].
    Returns an IMAGE, float32 [1, height, width, 3] in 0..1.
    """
    (n_t, n_h, n_w), (length, rows, columns) = tile_map.shape, grid
    across = min(n_t, max(1, math.ceil(math.sqrt(n_t * rows / columns * 1.4))))
    token = (WIDTH - 2 * MARGIN - (across - 1) * GAP) / (across * columns)
    width, height = round(columns * token), round(rows * token)
    text = [(headline, HEADLINE_SIZE), (conclusion(tile_map), TEXT_SIZE)]
    top = text_height(text) + 2 * MARGIN + SMALL_SIZE
    label = SMALL_SIZE + 6
    image = Image.new("RGB", (WIDTH, top + -(-n_t // across) * (height + label + GAP) + MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    _draw_legend(draw, MARGIN, draw_text(draw, text), images is not None)
    for t in range(n_t):
        left, upper = MARGIN + t % across * (width + GAP), top + t // across * (height + label + GAP)
        first, last = t * tile[0], min((t + 1) * tile[0], length)
        draw.text((left, upper), _frames_text(first, last, length, images), fill=INK, font=font_of(SMALL_SIZE))
        upper += label
        panel = frame_picture(images, (first + last) // 2, length, (width, height))
        cells = ImageDraw.Draw(panel, "RGBA")
        for h in range(n_h):
            for w in range(n_w):
                share = float(tile_map[t, h, w])
                cells.rectangle(_cell(h, w, tile, grid, token), fill=(*PAPER, round(255 * _VEIL * (1 - share)))
                                if images is not None else colour(share))
        if t == n_t // 2:
            cells.rectangle(_cell(n_h // 2, n_w // 2, tile, grid, token), outline=OUTLINE, width=3)
        image.paste(panel, (left, upper))
    return to_image(image)


def draw_words(headline: str, lines: list[str]) -> Tensor:
    """A card for a run of which there is no map. Returns an IMAGE, float32 [1, height, width, 3] in 0..1."""
    text = [(headline, HEADLINE_SIZE), *((line, TEXT_SIZE) for line in lines)]
    image = Image.new("RGB", (WIDTH, text_height(text) + 2 * MARGIN), PAPER)
    draw_text(ImageDraw.Draw(image), text)
    return to_image(image)


def conclusion(tile_map: Tensor) -> str:
    """What the map says: how much of the clip the middle looks at, and how far away in time that is."""
    total = tile_map.sum().item()
    n_t, n_h, n_w = tile_map.shape
    if total == 0:
        return "The middle of the clip looks at nothing."
    now = tile_map[n_t // 2].sum().item() / total
    near = tile_map[:, max(0, n_h // 2 - 1):n_h // 2 + 2, max(0, n_w // 2 - 1):n_w // 2 + 2].sum().item() / total
    share = total / tile_map.numel()
    return (f"The middle of the clip (outlined) looks at {share:.0%} of it: {now:.0%} of that at the same moment, "
            f"{near:.0%} at the same spot of the frame or beside it, at any time.")


def to_image(picture: Image.Image) -> Tensor:
    """A PIL picture as ComfyUI's IMAGE, float32 [1, height, width, 3] in 0..1."""
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return pixels.view(1, picture.height, picture.width, 3).float() / 255.0


def colour(share: float) -> tuple[int, ...]:
    """Light for a share of 0, dark for 1."""
    return tuple(round(low + (high - low) * share) for low, high in zip(_LOW, _HIGH, strict=True))


def frame_of(token: float, length: int, frames: int) -> int:
    """The frame, from 0 on, that a place in time is decoded to: the first token is one frame where that comes out even,
    as video VAEs have it, else all are as long."""
    if length < 2 or (frames - 1) % (length - 1):
        return min(frames - 1, int(token * frames / length))
    each = (frames - 1) // (length - 1)
    return 0 if token < 1 else min(frames - 1, 1 + int((token - 1) * each))


def _frames_text(first: int, last: int, length: int, images: Tensor | None) -> str:
    if images is None:
        return f"latent frame{_range(first + 1, last)} of {length}"
    frames = len(images)
    end = frames if last == length else frame_of(last, length, frames)
    return f"frame{_range(frame_of(first, length, frames) + 1, end)} of {frames}"


def _range(first: int, last: int) -> str:
    return f"s {first}-{last}" if last > first else f" {first}"


def frame_picture(images: Tensor | None, token: int, length: int, size: tuple[int, int]) -> Image.Image:
    if images is None:
        return Image.new("RGB", size, PAPER)
    pixels = (images[frame_of(token, length, len(images)), ..., :3].float().clamp(0, 1) * 255).round().byte().cpu()
    return Image.fromarray(pixels.numpy(), "RGB").resize(size, Image.Resampling.BILINEAR)


def _cell(h: int, w: int, tile: Thw, grid: Thw, token: float) -> tuple[int, int, int, int]:
    """Corners of a tile in its panel, one pixel of the ground left free."""
    left, right = (round(min(x * tile[2], grid[2]) * token) for x in (w, w + 1))
    upper, lower = (round(min(y * tile[1], grid[1]) * token) for y in (h, h + 1))
    return left, upper, max(left, right - 2), max(upper, lower - 2)


@lru_cache(maxsize=4)
def font_of(size: int):
    return ImageFont.load_default(size=size)


def _wrapped(text: str, size: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font_of(size).getlength(longer) > WIDTH - 2 * MARGIN:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def text_height(text) -> int:
    return sum(len(_wrapped(words, size)) * round(size * 1.35) for words, size in text)


def draw_text(draw: ImageDraw.ImageDraw, text) -> int:
    """Draws (words, size) under each other; returns where the next would begin."""
    top = MARGIN
    for words, size in text:
        for line in _wrapped(words, size):
            draw.text((MARGIN, top), line, fill=INK, font=font_of(size))
            top += round(size * 1.35)
    return top


def _draw_legend(draw: ImageDraw.ImageDraw, left: int, top: int, over_frames: bool) -> None:
    if over_frames:
        draw.text((left, top), "clear: every head looks there; veiled: none does", fill=INK, font=font_of(SMALL_SIZE))
        return
    words = "heads that look there: none"
    draw.text((left, top), words, fill=INK, font=font_of(SMALL_SIZE))
    left += round(font_of(SMALL_SIZE).getlength(words)) + 8
    for i in range(120):
        draw.line((left + i, top + 2, left + i, top + SMALL_SIZE), fill=colour(i / 119))
    draw.text((left + 128, top), "all", fill=INK, font=font_of(SMALL_SIZE))
