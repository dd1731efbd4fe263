"""How alike two clips are, as numbers: SSIM and PSNR of every frame, and how much each clip moves."""
from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

WINDOW = 11
"""Pixels across the Gaussian window of SSIM, as in Wang et al. 2004 and most published numbers."""
STILL = 1e-6
"""Mean change from frame to frame below which a clip does not move."""


@dataclass
class ClipNumbers:
    """One entry per frame. None: the frame holds NaN or infinite values (`ssim`), or has no finite PSNR (`psnr`)."""
    size: tuple[int, int]
    """Width and height in pixels."""
    window: int
    ssim: list[float | None] = field(default_factory=list)
    psnr: list[float | None] = field(default_factory=list)
    identical: list[bool] = field(default_factory=list)
    broken: dict[str, list[int]] = field(default_factory=dict)
    """Of "reference" and "clip": the frames, from 0 on, that hold NaN or infinite values."""
    moves: dict[str, list[float]] = field(default_factory=dict)
    """Of "reference" and "clip": the mean absolute change between two consecutive frames."""
    low: float = math.inf
    high: float = -math.inf

    @property
    def known(self) -> list[float]:
        """SSIM of the frames that could be compared."""
        return [value for value in self.ssim if value is not None]

    @property
    def worst(self) -> int | None:
        """The frame of least SSIM, from 0 on; None where no frame could be compared."""
        places = [(value, math.inf if decibels is None else decibels, frame) for frame, (value, decibels)
                  in enumerate(zip(self.ssim, self.psnr, strict=True)) if value is not None]
        return min(places)[2] if places else None

    def mean_move(self, clip: str) -> float | None:
        return mean(self.moves[clip])

    @property
    def motion_ratio(self) -> float | None:
        """How many times as much the clip moves as the reference; None for a still reference or a single frame."""
        reference = self.mean_move("reference")
        return None if reference is None or reference < STILL else self.mean_move("clip") / reference


def mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def compare(reference: Tensor, clip: Tensor, done: Callable[[int], None] = lambda frames: None) -> ClipNumbers:
    """The numbers of two clips of one shape, [frames, height, width, 3] in 0..1 of any floating dtype and device.

    Holds one frame of each clip and the one before as float32, whatever the length. done: called after every frame.
    """
    psnr, ssim = metrics()
    height, width = reference.shape[1:3]
    least = min(WINDOW, height, width)
    numbers = ClipNumbers((width, height), least - (least + 1) % 2)
    numbers.broken, numbers.moves = ({"reference": [], "clip": []} for _ in range(2))
    clips, before = {"reference": reference, "clip": clip}, None
    for frame in range(len(reference)):
        pair = {name: _planes(frames[frame].to(reference.device)) for name, frames in clips.items()}
        broken = [name for name, planes in pair.items() if not planes.isfinite().all()]
        for name in broken:
            numbers.broken[name].append(frame)
        same = not broken and torch.equal(pair["reference"], pair["clip"])
        numbers.identical.append(same)
        if broken or same:
            numbers.ssim.append(None if broken else 1.0)
            numbers.psnr.append(None)
        else:
            both = pair["reference"], pair["clip"]
            found = ssim(*both, numbers.window, max_val=1.0, eps=0.0, padding="valid").mean().item()
            decibels = psnr(*both, 1.0).item()
            numbers.ssim.append(min(1.0, found))
            numbers.psnr.append(decibels if math.isfinite(decibels) else None)
        if not broken:
            numbers.low = min(numbers.low, *(planes.min().item() for planes in pair.values()))
            numbers.high = max(numbers.high, *(planes.max().item() for planes in pair.values()))
            if before is not None:
                for name, planes in pair.items():
                    numbers.moves[name].append((planes - before[name]).abs_().mean().item())
        before = None if broken else pair
        done(frame + 1)
    return numbers


def metrics() -> tuple[Callable, Callable]:
    """kornia's `psnr` and `ssim`. Imported on first use, so that the pack loads without it."""
    try:
        from kornia.metrics import psnr, ssim
    except Exception as error:
        raise RuntimeError(
            f"found no kornia that works here ({type(error).__name__}: {error}), wanted the one of ComfyUI's "
            f'requirements.txt. Install it with: "{sys.executable}" -m pip install --upgrade kornia, then restart '
            "ComfyUI") from error
    return psnr, ssim


def _planes(frame: Tensor) -> Tensor:
    """[h, w, 3] -> [1, 3, h, w], float32."""
    return frame.permute(2, 0, 1).unsqueeze(0).contiguous().float()
