"""A judge of finished clips: which shapes are there, told by their colours, and how far a clip is from another.

It knows the colours of `scenes.COLOURS` and nothing of any model.
"""
from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from . import scenes

NEAR = 0.75                  # rgb distance to a colour of the palette within which a pixel is of that colour
LEAST_AREA = 8               # pixels of a blob that counts as a shape
ROUND_BELOW = 0.85           # squareness: 1 for squares, 2 / 3 for discs
MOST_FRAMES = 0.75           # share of the frames that a shape has to be seen in


@dataclass(frozen=True)
class Found:
    """One shape that a clip shows in most of its frames."""
    colour: str
    kind: str
    blobs: float             # pieces of that colour per frame in which there is any


def blobs_of(frame):
    """(colour, area, squareness) of every blob of one frame, rgb [3, H, W]. Squareness: the mean of y^2 x^2 about the
    middle over that of y^2 times that of x^2, which any upright rectangle has at 1, whatever pixels it falls on."""
    palette = torch.tensor(list(scenes.COLOURS.values()))
    far = (frame.movedim(0, -1)[..., None, :] - palette).norm(dim=-1)             # [H, W, colours]
    nearest, distance = far.argmin(-1), far.amin(-1)
    for number, colour in enumerate(scenes.COLOURS):
        labels, _ = ndimage.label(((nearest == number) & (distance < NEAR)).numpy(), np.ones((3, 3)))
        for label, box in enumerate(ndimage.find_objects(labels), 1):
            y, x = np.nonzero(labels[box] == label)
            if len(y) >= LEAST_AREA:
                y, x = (y - y.mean()) ** 2, (x - x.mean()) ** 2
                yield colour, len(y), (y * x).mean() / max(y.mean() * x.mean(), 1e-9)


def shapes_in(rgb):
    """What a clip, rgb [3, T, H, W], shows in most of its frames: a list of Found, one per colour."""
    frames = [list(blobs_of(rgb[:, t])) for t in range(rgb.shape[1])]
    found = []
    for colour in scenes.COLOURS:
        seen = [[b for b in blobs if b[0] == colour] for blobs in frames]
        shown = [blobs for blobs in seen if blobs]
        if len(shown) < MOST_FRAMES * len(frames):
            continue
        largest = [max(blobs, key=lambda b: b[1]) for blobs in shown]
        whole = sorted(largest, key=lambda b: b[1])[len(largest) // 2:]            # a covered shape has no kind
        square = sorted(b[2] for b in whole)[len(whole) // 2]
        found.append(Found(colour, "disc" if square < ROUND_BELOW else "square",
                           sum(map(len, shown)) / len(shown)))
    return found


@dataclass(frozen=True)
class Judged:
    """One clip against what its prompt asked for."""
    count_right: bool        # as many shapes as asked for, none in pieces
    colours_right: bool      # exactly the colours asked for
    kinds: float             # share of the shapes asked for that are there with colour and kind


def judge(rgb, asked):
    """A clip, rgb [3, T, H, W], against the scene whose words made it."""
    found = shapes_in(rgb)
    pieces = Counter({shape.colour: round(shape.blobs) for shape in found})
    wanted = {(shape.colour, shape.kind) for shape in asked.shapes}
    return Judged(
        pieces.total() == len(asked.shapes), {s.colour for s in found} == {colour for colour, _ in wanted},
        len(wanted & {(s.colour, s.kind) for s in found}) / len(wanted))


def content(rgb):
    """What a clip shows: colour and pieces of every shape. Its kinds do not count, a covered shape has none."""
    return {shape.colour: round(shape.blobs) for shape in shapes_in(rgb)}


def likeness(reference, rgb):
    """{"psnr", "ssim"} of a clip, [3, T, H, W] in [-1, 1], as the mean of its frames."""
    from kornia.metrics import psnr, ssim
    a, b = (as_images(x).permute(0, 3, 1, 2) for x in (reference, rgb))
    return {"psnr": sum(psnr(x, y, 1.0).clamp(max=100).item() for x, y in zip(a, b, strict=True)) / len(a),
            "ssim": ssim(a, b, 7).mean().item()}


def relative(a, b):
    """||a - b|| / ||b||"""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def flicker(rgb):
    """Mean second difference in time over the mean first one: 0 for even motion, 1.7 for noise that changes every
    frame (its second differences have three times the variance of its first)."""
    first = rgb.diff(dim=1)
    return (first.diff(dim=1).abs().mean() / first.abs().mean().clamp(min=1e-9)).item()


def as_images(rgb, times=1):
    """[3, T, H, W] in [-1, 1] -> [T, H, W, 3] in 0..1, every pixel `times` by `times`."""
    images = ((rgb + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0)
    return images.repeat_interleave(times, 1).repeat_interleave(times, 2)


def interval(right, total, z=1.96):
    """Wilson's interval of a share, as two numbers."""
    if not total:
        return 0.0, 1.0
    p, n = right / total, total
    middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)
