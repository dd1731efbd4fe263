"""The kernels' lists for windows: made once per distinct window of a layout, gathered per call for the heads."""
from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Thw
from .layout import TileLayout
from .lowering import dense_lists
from .window import check_window, effective_window, first_seen, is_full

MAX_BYTES = 64 << 20
"""Bound on the lists of one launch, and on what a layout keeps. Heads that do not fit go into another launch."""


def window_blocks(tiles: Thw, window: Thw, blocks_per_tile: int, others: int, device: torch.device) -> Tensor:
    """Blocks that every query tile sees, ascending, the `others` blocks behind the last tile at the end.

    -> int32 [prod(tiles), K]: a window keeps its size at the borders, so every tile sees as many.
    """
    seen = effective_window(window, tiles)
    index = torch.zeros((), dtype=torch.int32, device=device)
    for axis, (n, width) in enumerate(zip(tiles, seen, strict=True)):
        first = torch.tensor(first_seen(width, n), dtype=torch.int32, device=device)
        along = first[:, None] + torch.arange(width, dtype=torch.int32, device=device)
        shape = [1] * 6
        shape[axis], shape[axis + 3] = n, width
        index = index * n + along.view(shape)                              # [Nt, Nh, Nw, wt, wh, ww]
    rows = math.prod(tiles)
    inner = torch.arange(blocks_per_tile, dtype=torch.int32, device=device)
    blocks = (index.reshape(rows, -1, 1) * blocks_per_tile + inner).flatten(1)
    if not others:
        return blocks
    last = rows * blocks_per_tile
    closing = torch.arange(last, last + others, dtype=torch.int32, device=device)
    return torch.cat([blocks, closing.expand(rows, -1)], dim=1)


@dataclass(frozen=True)
class Launch:
    """Heads that go through the kernel together."""

    heads: slice
    windows: tuple[Thw, ...]
    """The distinct effective windows of these heads."""
    which: Tensor
    """int64 [heads], the place in `windows` of every head's."""
    counts: Tensor
    """int32 [heads, 1]"""


class WindowLists:
    """The lists of any windows on one layout. Keeps what calls have in common, at most MAX_BYTES of it."""

    def __init__(self, layout: TileLayout):
        self.layout = layout
        self._kept: OrderedDict = OrderedDict()
        self.kept_bytes = 0

    def launches(self, windows: tuple[Thw, ...]) -> list[Launch]:
        """How the heads, with one window each, go through a kernel: together, unless MAX_BYTES of lists say otherwise.

        Raises ValueError for a window that is none.
        """
        return self._keep(("plan", windows), lambda: self._plan(windows))

    def lists(self, part: Launch, batch: int) -> tuple[Tensor, Tensor]:
        """indices [batch, h, Nq, K], counts [batch, h, Nq] of a launch; what heads or rows share is expanded."""
        layout, heads = self.layout, len(part.which)
        rows = math.prod(layout.num_tiles) * layout.blocks_per_tile
        counts = part.counts.expand(batch, heads, rows)
        if len(part.windows) > 1:
            lists = self._keep(("stack", part.windows), lambda: self._stack(part.windows))
            return self._for_every_block(lists.index_select(0, part.which)).expand(batch, -1, -1, -1), counts
        if is_full(part.windows[0], layout.num_tiles):
            return dense_lists(batch, heads, rows, layout)
        lists = self._keep(("rows", part.windows), lambda: self._for_every_block(self._stack(part.windows)))
        return lists.expand(batch, heads, -1, -1), counts

    def _plan(self, windows):
        tiles, per_tile = self.layout.num_tiles, self.layout.blocks_per_tile
        effective = [effective_window(check_window(window), tiles) for window in windows]
        lengths = [math.prod(window) * per_tile + self.layout.num_other_blocks for window in effective]
        heads = len(windows)
        at_once = heads
        if len(set(effective)) > 1:
            per_head = math.prod(tiles) * per_tile * max(lengths) * 4
            at_once = -(-heads // -(-heads * per_head // MAX_BYTES))
        plan = []
        for first in range(0, heads, at_once):
            part = slice(first, min(first + at_once, heads))
            distinct = tuple(sorted(set(effective[part])))
            device = self.layout.kernel_block_sizes.device
            plan.append(Launch(
                part, distinct, torch.tensor([distinct.index(window) for window in effective[part]], device=device),
                torch.tensor(lengths[part], dtype=torch.int32, device=device)[:, None]))
        return plan

    def _stack(self, windows) -> Tensor:
        """int32 [windows, tiles, K of the longest]; what lies behind the end of a shorter list is never read."""
        layout = self.layout
        lists = [window_blocks(layout.num_tiles, window, layout.blocks_per_tile, layout.num_other_blocks,
                               layout.kernel_block_sizes.device) for window in windows]
        longest = max(x.shape[1] for x in lists)
        return torch.stack([torch.nn.functional.pad(x, (0, longest - x.shape[1])) for x in lists])

    def _for_every_block(self, lists: Tensor) -> Tensor:
        """The lists of tiles as those of their blocks, which share them.   [H, N, K] -> [1, H, N*m, K]"""
        per_tile = self.layout.blocks_per_tile
        return lists[:, :, None].expand(-1, -1, per_tile, -1).flatten(1, 2)[None]

    def _keep(self, key, make):
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        value = make()
        size = _nbytes(value)
        if size <= MAX_BYTES:
            self._kept[key] = value, size
            self.kept_bytes += size
            while self.kept_bytes > MAX_BYTES:
                self.kept_bytes -= self._kept.popitem(last=False)[1][1]
        return value


def _nbytes(value) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(part.which.nbytes + part.counts.nbytes for part in value)
