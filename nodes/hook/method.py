"""The seam between the attention hook and the sparse methods."""
from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...vsa_core.grid import TokenGrid
from ..families import ModelCall
from .closeness import Watch
from .run import GridRecord, Run


class StaysDense(Exception):
    """Raised by a method that leaves a call dense; the message is the reason that is counted."""


class Method(Protocol):
    """A sparse method with its settings, as the hook sees it."""

    name: str
    dense_serves: bool
    """Whether dense attention is what this method stands in for. It is not where a model was trained sparse, nor where
    the method itself gives the dense result: there nothing is run dense because it is faster."""

    timed: bool
    """Whether its calls are compared with dense ones by the clock."""

    has_strict: bool
    """Whether its node has the widget `strict`."""

    far_cure: str | None
    """What brings its result closer to exact attention; None for a method whose result is exact."""

    def keeps_all(self, plan: Any, heads: int, call: LayerCall) -> bool:
        """Whether a call would leave nothing out: dense attention gives the same. Asked where `dense_serves`."""

    def work(self, plan: Any, heads: int, call: LayerCall) -> Hashable:
        """What the time of a call depends on besides its shape, such as the share of pairs that it computes."""

    def plan(self, grid: TokenGrid, device: torch.device) -> Any:
        """What depends on the grid only; made once per grid and run."""

    def facts(self, plan: Any) -> dict[str, Any]:
        """Plain numbers for the report: tile, tiles, kept, work."""

    def attend(self, plan: Any, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        """Sparse attention in sequence order, [B, S, H, D]; puts its density into `call.record`."""

    def remarks(self, run: Run) -> list[str]:
        """Sentences for the report of a finished run."""


@runtime_checkable
class CompletesDense(Protocol):
    """A method of models for which even dense attention is not the whole of what they were trained with."""

    def after_dense(self, options: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
        """finish(out, q, k, v) -> what a call with these transformer_options is to give instead of the dense `out`, all
        [B, S, H, D]; None where that is the dense result itself."""


@runtime_checkable
class PlansItsStart(Protocol):
    """A method that may itself say how much the first steps keep."""

    def plans_start(self, steps: int) -> bool:
        """Whether it does in a schedule of so many steps: `start_percent` is not asked then."""


@dataclass
class Step:
    """One forward pass of the model, as its attention calls need it."""

    run: Run
    net: Any
    call: ModelCall
    scheduled: bool
    """Whether the schedule lets this pass run sparse."""
    number: int
    """Forward passes of this run, this one included."""
    index: int = 0
    """Place of this pass's sigma in the sampling schedule, 0 .. total - 1."""
    total: int = 1
    """Steps in the sampling schedule."""
    noise: tuple[float, ...] = (1.0,)
    """How much of the latent is noise at each of them, from 0 to 1."""
    next_head: dict[int | None, int] = field(default_factory=dict)
    """Layers whose attention came in part so far -> the head that the next part begins with."""
    masks: list = field(default_factory=list)
    """The attention masks of this pass with the tokens that they hide, see `masks`."""

    share: range | None = None
    """The heads of every layer that this card computes, None for all."""

    def heads_of(self, layer: int | None, heads: int, of: int) -> range | None:
        """Which of a layer's `of` heads a call with `heads` of them computes, None where that is not known.

        A host that is short of memory attends with a part of the heads after the other, in their order.
        """
        own = self.share or range(of)
        first = self.next_head.pop(layer, own.start) if heads < len(own) else own.start
        if first + heads > own.stop:
            return None
        if first + heads < own.stop:
            self.next_head[layer] = first + heads
        return range(first, first + heads)


@dataclass(frozen=True)
class LayerCall:
    """One sparse attention call, as the method needs it."""

    kernel: str
    layer: int | None
    layers: int | None
    heads: range | None
    """Which of the layer's heads this call computes, None where that is not known."""
    of_heads: int
    """How many heads the layer has."""
    step: Step
    options: dict[str, Any]
    """The call's transformer_options."""
    record: GridRecord | None
    """Where to put the density of this call."""
    sampled: bool = False
    """Whether this call is one of the few for which the density may cost device time, and to draw the map from."""
    watch: Watch | None = None
    """Where the kernels' lists go in a call whose closeness is measured."""

    @property
    def reads(self):
        """What `AttentionImpl.on_lists` is to be in this call."""
        return None if self.watch is None else self.watch.reads
