"""Sparse against dense by the clock: whether the first sparse calls of a kind win over what dense means here."""
from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field

import torch

WARM_UP = 1
"""Calls of a side that are not counted: they compile, and fill caches."""
SAMPLES = 3
"""Timed calls of a side that are enough to decide."""
WORTH = 0.95
"""Sparse attention leaves something out, so it has to take at most this share of dense attention's time."""


class Span:
    """The time between two moments on a device, readable once the device has passed the second."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._start, self._end, self._ms = self._moment(), None, None

    def _moment(self):
        if self._stream is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def end(self) -> None:
        self._end = self._moment()

    @property
    def passed(self) -> bool:
        """Whether the time can be read without waiting."""
        return self._ms is not None or self._end is not None and (self._stream is None or self._end.query())

    def milliseconds(self) -> float:
        """The time, after waiting for the device if need be; it then holds nothing of the device any longer."""
        if self._ms is None:
            if self._stream is None:
                self._ms = (self._end - self._start) * 1e3
            else:
                self._end.synchronize()
                self._ms = self._start.elapsed_time(self._end)
            self._start = self._end = self._stream = None
        return self._ms


@dataclass(eq=False)
class Contest:
    """One kind of call: its first times, sparse and dense, and who wins once both are known."""

    dense: list[Span] = field(default_factory=list)
    """Shared by all contests against the same dense calls."""
    sparse: list[Span] = field(default_factory=list)
    given_up: bool = False
    """There will be no dense time."""
    _medians: tuple[float, float] | None = None

    def wants_dense(self) -> bool:
        """Whether a dense time would help to decide."""
        return self._medians is None and not self.given_up and len(self.dense) < WARM_UP + SAMPLES

    def medians(self) -> tuple[float, float] | None:
        """(sparse, dense) milliseconds of a call, once enough are known; does not wait for the device."""
        if self._medians is None and not self.given_up:
            sides = self.sparse, self.dense
            if all(len(spans) >= WARM_UP + SAMPLES and all(span.passed for span in spans) for spans in sides):
                self._medians = tuple(
                    statistics.median(span.milliseconds() for span in spans[WARM_UP:]) for spans in sides)
                self.sparse, self.dense = [], []
        return self._medians

    def so_far(self) -> tuple[float, float] | None:
        """`medians`, from as many times as there are; waits for the device. None where a side has no time yet."""
        if self.medians() is None and all(len(spans) > WARM_UP for spans in (self.sparse, self.dense)):
            return tuple(statistics.median(span.milliseconds() for span in spans[WARM_UP:])
                         for spans in (self.sparse, self.dense))
        return self._medians

    def sparse_wins(self) -> bool | None:
        """None while it is not decided."""
        medians = self.medians()
        return None if medians is None else medians[0] <= WORTH * medians[1]


def add(spans: list[Span], span: Span) -> None:
    """Keep a time while it can help to decide."""
    if len(spans) < WARM_UP + SAMPLES:
        spans.append(span)
