"""Which layers and which part of the denoising stay dense."""
from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

ROUNDING = 1e-5
"""A sigma that differs by less from a boundary lies on it."""


@dataclass(frozen=True)
class DenseBlocks:
    """A set of transformer blocks, given as ranges; negative numbers count from the last block."""

    ranges: tuple[tuple[int, int], ...] = ()

    def contains(self, block_index: int, total_blocks: int | None) -> bool:
        """Whether the block is in the set. A negative number needs `total_blocks`; without it, it matches nothing."""
        return any(self._within(block_index, total_blocks, first, last) for first, last in self.ranges)

    def beyond(self, total_blocks: int) -> list[str]:
        """The ranges, as text, that name no block of a model of so many."""
        return [str(first) if first == last else f"{first}-{last}" for first, last in self.ranges
                if first >= total_blocks or last < -total_blocks]

    @staticmethod
    def _within(block_index: int, total_blocks: int | None, first: int, last: int) -> bool:
        if first < 0:
            if total_blocks is None:
                return False
            first, last = first + total_blocks, last + total_blocks
        return first <= block_index <= last


def parse_dense_blocks(text: str) -> DenseBlocks:
    """The blocks that "0, 1, 38-39, -1" names. Raises ValueError naming the part it cannot read."""
    ranges = []
    for part in filter(None, (part.strip() for part in str(text or "").split(","))):
        match = re.fullmatch(r"(-?\d+)|(\d+)\s*-\s*(\d+)", part)
        if not match:
            raise ValueError(f"dense_blocks: cannot read {part!r}; wanted numbers and ranges, such as 0, 1, 38-39")
        single, first, last = match.groups()
        low, high = (int(single), int(single)) if single is not None else (int(first), int(last))
        if low > high:
            raise ValueError(f"dense_blocks: range {part!r} runs backwards; wanted {high}-{low}")
        ranges.append((low, high))
    return DenseBlocks(tuple(ranges))


@dataclass(frozen=True)
class Schedule:
    """The part of the denoising that runs sparse, as fractions of it: 0 is pure noise, 1 the finished clip."""

    start_percent: float = 0.0
    end_percent: float = 1.0

    def __post_init__(self):
        for name in ("start_percent", "end_percent"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name} {value}: wanted a fraction from 0 to 1")
        if self.start_percent > self.end_percent:
            raise ValueError(f"start_percent {self.start_percent} is after end_percent {self.end_percent}: "
                             "wanted start at or before end")

    def holds(self, sigma: float, percent_to_sigma: Callable[[float], float]) -> bool:
        """Whether a pass at this sigma runs sparse. Sigmas come as float32, so they are compared as such."""
        high, low = self.sigmas(percent_to_sigma)
        return low * (1 - ROUNDING) <= sigma <= high * (1 + ROUNDING)

    def sigmas(self, percent_to_sigma: Callable[[float], float]) -> tuple[float, float]:
        """(highest, lowest) sigma of the sparse part; `percent_to_sigma` is the model's own."""
        return float(percent_to_sigma(self.start_percent)), float(percent_to_sigma(self.end_percent))
