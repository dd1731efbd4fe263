"""Measuring windows inside a dense sampling: a method for the hook whose every call gives the dense result.

`budget_measurement` measures budgets the same way.
"""
from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...kernels import Span
from ...vsa_core.backends.sliding_tile_attn import (
    SlidingTileAttentionImpl,
    SlidingTileAttentionMetadata,
    SlidingTileAttentionMetadataBuilder,
)
from ...vsa_core.choosing import Measurements
from ...vsa_core.grid import Thw, TokenGrid
from ...vsa_core.search import ErrorTable, candidate_errors, default_candidates
from ...vsa_core.tiling import auto_tile_size, num_tiles
from ...vsa_core.window import parse_window, window_of_share
from ..hook.method import LayerCall
from ..hook.run import Run
from ..hook.verdict import seconds

log = logging.getLogger(__name__)

AUTO_CANDIDATES = "auto"


@dataclass
class Search:
    """The measurement, as a method for the hook: every call gives the dense result, some are also measured."""

    candidates: str
    tile_size: Thw | None
    measured: int
    """How many steps of the schedule are measured; each stands for an equal part of it."""
    layers: int
    heads: int
    state_path: str
    announce: Callable[[str], Any]
    """Called with what the search costs, and then with what is left of it."""
    name: str = "STA search"
    dense_serves = False
    timed = False
    has_strict = False
    far_cure = None
    things = "windows"
    """What is tried."""
    table: Measurements | None = None
    done: set = field(default_factory=set)
    """(step, layer) pairs that an earlier, interrupted search has measured."""
    bar: Any = None
    current: int = -1
    step: int | None = None
    """The step that is running, and since when; then what steps took, those that are measured and the others."""
    begun: float = 0.0
    took: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    def work(self, plan, heads: int, call: LayerCall) -> None:
        return None

    def plan(self, grid: TokenGrid, device: torch.device):
        tile = self.tile_size or auto_tile_size(grid.thw)
        plan = self._plan(grid, tile, device)
        if self.table is None:
            self.table = self._new_table(grid, tile)
            self._resume()
            total = self.measured * self.layers
            self.bar = comfy.utils.ProgressBar(total)
            self.bar.update_absolute(len(self.done), total)
            self.announce(self._cost(len(self.done), total))
        elif self.table.grid.thw != grid.thw:
            raise ValueError(f"the clip's grid changes during sampling ({_x(self.table.grid.thw)}, then "
                             f"{_x(grid.thw)}): search without context windows")
        return plan

    def _plan(self, grid: TokenGrid, tile: Thw, device: torch.device) -> SlidingTileAttentionMetadata:
        return SlidingTileAttentionMetadataBuilder().build(
            STA_param=(1, 1, 1), current_timestep=0, raw_latent_shape=grid.thw, device=device, tile_size=tile,
            prefix=grid.prefix, suffix=grid.suffix, hidden=grid.hidden, cache_tile_buf=False)

    def _new_table(self, grid: TokenGrid, tile: Thw) -> ErrorTable:
        candidates = read_candidates(self.candidates, num_tiles(grid.thw, tile))
        return ErrorTable(candidates, grid, tile, self.measured, self.layers, self.heads)

    def facts(self, plan) -> dict[str, Any]:
        return {"tile": list(self.table.tile_size), "tiles": None, "kept": None,
                "label": f"measuring {len(self.table.candidates)} {self.things}"}

    def remarks(self, run: Run) -> list[str]:
        return []

    def attend(self, plan, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self._begin(call.step.index, call.step.total)
        span = Span(q.device)
        dense = self._dense(plan, q, k, v, call.kernel)
        span.end()
        step = self._measured_step(call)
        if step is not None and call.layer is not None and (step, call.layer) not in self.done:
            if step != self.current:
                self._keep()
                self.current = step
            first = not self.table.calls[step, call.layer]
            self._measure(step, call, plan, q, k, v, dense, span)
            if first:
                self.bar.update(1)
        return dense

    def _measure(self, step: int, call: LayerCall, plan, q, k, v, dense: Tensor, span: Span) -> None:
        """Try every candidate on a call of a measured step. span: what the dense result took."""
        errors, norms = candidate_errors(q, k, v, dense, plan, self.table.candidates, backend=call.kernel)
        self.table.add(step, call.layer, errors, norms, call.heads)

    def _dense(self, plan, q, k, v, kernel: str) -> Tensor:
        if plan.layout.grid.hidden:
            full = plan.at(0, None, tuple(plan.layout.num_tiles))
            return SlidingTileAttentionImpl(q.shape[2], q.shape[3], backend=kernel).attend(q, k, v, full)
        return dense_attention(q, k, v)

    def _measured_step(self, call: LayerCall) -> int | None:
        """Which of the measured steps this call belongs to: each takes the middle of its part of the schedule."""
        places = self._places(call.step.total)
        return places.index(call.step.index) if call.step.index in places else None

    def _places(self, total: int) -> list[int]:
        return [(2 * m + 1) * total // (2 * self.measured) for m in range(self.measured)]

    def _resume(self) -> None:
        if not os.path.exists(self.state_path):
            return
        try:
            self.table.restore(load_file(self.state_path))
        except (OSError, ValueError) as error:
            log.warning("[sparse attention] an unfinished search could not be resumed and starts again: %s", error)
            return
        self.done = {tuple(place) for place in (self.table.calls > 0).nonzero().tolist()}

    def _keep(self) -> None:
        """Write what complete steps have given, for a search that goes on after an interrupt."""
        if self.table is not None and self.table.calls.any():
            os.makedirs(os.path.dirname(self.state_path), exist_ok=True)
            part = self.state_path + ".part"
            save_file({name: x.contiguous() for name, x in self.table.state().items()}, part)
            os.replace(part, self.state_path)

    def _begin(self, step: int, total: int) -> None:
        """A step begins, or goes on. What those before took tells how long the rest takes, once one was measured."""
        if step == self.step:
            return
        now, finished = time.perf_counter(), {measured for measured, _ in self.done}
        places = [place for m, place in enumerate(self._places(total)) if m not in finished]
        if self.step is not None:
            self.took[self.step in places].append(now - self.begun)
            if self.step in places:
                measured = statistics.mean(self.took[True])
                usual = statistics.mean(self.took[False] or [measured / self.table.work])
                left = sum(measured if place in places else usual for place in range(step, total))
                done = len(finished) + len(self.took[True])
                self.announce(f"{done} of {self.measured} steps measured, about {seconds(left)} left")
        self.step, self.begun = step, now

    def _cost(self, done: int, total: int) -> str:
        resumed = f" ({done / total:.0%} measured already)" if done else ""
        return (f"trying {len(self.table.candidates)} {self.things} in {self.measured} steps{resumed}. Attention takes "
                f"about {self.table.work:.1f} times as long in such a step; how long is left is said after the first")


def dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own.   [B, S, H, D] -> [B, S, H, D]"""
    out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    return out.transpose(1, 2).contiguous()


def parse_candidates(text: str) -> list | None:
    """Windows in tiles or shares, None for auto. Raises ValueError: found, wanted."""
    if str(text).strip() in ("", AUTO_CANDIDATES):
        return None
    return [parse_window(part) for part in str(text).replace(";", " ").split()]


def read_candidates(text: str, tiles: Thw) -> tuple[Thw, ...]:
    """The candidate windows in tiles, on a grid of `tiles`. Raises ValueError when none is smaller than the grid."""
    parsed = parse_candidates(text)
    windows = default_candidates(tiles) if parsed is None else tuple(
        window_of_share(w, tiles) if isinstance(w[0], float) else w for w in parsed)
    if all(all(width >= n for width, n in zip(window, tiles, strict=True)) for window in windows):
        raise ValueError(f"a clip of {_x(tiles)} tiles is too small for these windows: every candidate covers it "
                         "whole. Search on a longer or larger clip")
    return windows


def _x(thw) -> str:
    return "x".join(map(str, thw))
