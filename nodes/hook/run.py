"""What one sampling did: calls counted by outcome, time by kind, and the plans that its layers share."""
from __future__ import annotations

import statistics
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels import AUTO, Call, Contest, Span
from ...vsa_core.grid import TokenGrid
from .closeness import Closeness
from .rounding import Rounding

SPARSE, DENSE, OTHER, PROBE, MEASURE = "sparse", "dense", "other", "probe", "measure"
"""Kinds of attention calls: video self-attention run sparse, the same run dense, everything else, sparse calls run
dense as well, only to be timed, and tiles computed exactly, only to be compared."""


@dataclass
class GridRecord:
    """One token grid that ran sparse."""

    grid: TokenGrid
    facts: dict[str, Any]
    """What the method says of its plan: tile, tiles, kept, work, ..."""
    kernel: str
    calls: int = 0
    densities: list[Tensor] = field(default_factory=list)
    """Kept share of query-key pairs, one scalar per sampled call."""
    tile_map: Tensor | None = None
    """[Nt, Nh, Nw] share of heads that keep each tile, for the query tile in the middle."""

    @property
    def density(self) -> float | None:
        return torch.stack([x.float().cpu() for x in self.densities]).mean().item() if self.densities else None


class Run:
    """The counters, timers and plans of one sampling."""

    def __init__(self, method_name: str, backend: str = AUTO, prompt: str | None = None, node: str | None = None):
        """backend: what the node's widget says.   prompt, node: the ids of what sampled."""
        self.method_name, self.backend, self.prompt, self.node = method_name, backend, prompt, node
        self.started = time.perf_counter()
        self.plans: dict[Any, Any] = {}
        self.records: dict[Any, GridRecord] = {}
        self.failed: dict[str, str] = {}
        """Kernels that raised in this run, with what they said."""
        self.asked: dict[Call, None] = {}
        """What kernels were asked to run, in the order of the first time."""
        self.dense: Counter[str] = Counter()
        self.other: Counter[str] = Counter()
        self.layers: dict[Any, Counter[str]] = defaultdict(Counter)
        self.gated: Counter[Any] = Counter()
        """Sparse calls per layer that had a trained gate or projection."""
        self.completed: Counter[Any] = Counter()
        """Dense calls per layer to which the method added what the model was trained to have; OTHER: other calls."""
        self.proofs: dict[str, str] = {}
        """What the kernels that ran have shown on this card."""
        self.medians: dict[str, tuple[float, float, str]] = {}
        """Kernel -> milliseconds of a sparse and of a dense call of the same kind, and what served the dense ones."""
        self.unseen = ""
        """What to tell the user when the model made no attention call that the hook could see."""
        self.seen = 0
        """Attention calls of any kind."""
        self.probes = 0
        """Sparse calls that ran dense as well, only to be timed."""
        self.compared: Counter[Contest] = Counter()
        """Sparse calls by the contest that timed them against dense ones."""
        self.taken: Counter[str] = Counter()
        """Calls that another sparse node computed before they could come here, by its method."""
        self.tokens = 0
        """Of the largest clip that came by."""
        self.sparse_steps: set[int] = set()
        self.seen_steps: set[int] = set()
        self.schedule_steps = 0
        """Steps of the whole denoising, of which those in `seen_steps` were sampled."""
        self.warnings: list[str] = []
        """What costs the user time or quality."""
        self.notes: list[str] = []
        self.chosen = ""
        """What a preset made of the node's widgets."""
        self.steps = 0
        self.sampled_step = -1
        self.closeness = Closeness()
        self.rounding = Rounding()
        self.other_heads = False
        self._thread, self._lock, self._parts = threading.get_ident(), threading.Lock(), {}
        self._not_finite: list[Tensor] = []
        self._spans: list[tuple[str, Any, Span]] = []
        self._calls_ms: dict[str, list[float]] | None = None

    def note(self, text: str) -> None:
        """Keep a sentence for the report, once."""
        if text not in self.notes:
            self.notes.append(text)

    def warn(self, text: str) -> None:
        """Keep a sentence that the user has to see, once."""
        if text not in self.warnings:
            self.warnings.append(text)

    @property
    def said(self) -> list[str]:
        """All that this run has to say besides its numbers, what the user has to see first."""
        return [*self.warnings, *self.notes]

    def here(self) -> Run:
        """This run as the thread that asks counts in it: several at once would lose one another's calls."""
        return self if threading.get_ident() == self._thread else self.part(threading.get_ident())

    def part(self, key: Any, other_heads: bool = False) -> Run:
        """Counters and plans of their own, which `finish` adds to these. key: whose they are, in a user's words.

        other_heads: they are of other heads of the same calls, which are not counted twice.
        """
        with self._lock:
            if key not in self._parts:
                self._parts[key] = Run(self.method_name, self.backend, self.prompt, self.node)
                self._parts[key].other_heads = other_heads
            return self._parts[key]

    def begin_pass(self, index: int, total: int) -> int:
        """A forward pass begins, at this step of the whole schedule -> its number in this run. The first one starts
        the clock: loading the model is not sampling."""
        if self.steps == 0:
            self.started = time.perf_counter()
        self.steps += 1
        self.seen_steps.add(index)
        self.schedule_steps = max(self.schedule_steps, total)
        return self.steps

    @contextmanager
    def timed(self, kind: str, layer: Any, device: torch.device):
        """Count the time of the block under `kind`. On CUDA nothing waits: times are read when the run ends."""
        span = Span(device)
        yield span
        span.end()
        self._spans.append((kind, layer, span))

    def watch_finite(self, *tensors: Tensor) -> None:
        """Remember, without waiting for the device, whether the tensors hold NaN or infinity."""
        self._not_finite.append(torch.stack([~torch.isfinite(x).all() for x in tensors]).any())

    def finish(self) -> None:
        """Read the timers, release every tensor on the device, keep the numbers."""
        if self._calls_ms is not None:
            return
        for key, part in self._parts.items():
            if part.other_heads:
                self._add_heads(key, part)
            else:
                self._add(part)
        self._parts.clear()
        self._calls_ms, self.layer_ms = defaultdict(list), Counter()
        for kind, layer, span in self._spans:
            elapsed = span.milliseconds()
            self._calls_ms[kind].append(elapsed)
            self.layer_ms[layer, kind] += elapsed
        self._spans.clear()
        if any(bool(flag) for flag in self._not_finite):
            self.warn("NaN or infinity came in with q, k or v: the model's activations were broken before attention")
        self._not_finite.clear()
        self.closeness.finish()
        self.rounding.finish()
        self.plans.clear()
        for record in self.records.values():
            record.densities = [x.cpu() for x in record.densities]
            record.tile_map = None if record.tile_map is None else record.tile_map.cpu()
        self.seconds = time.perf_counter() - self.started

    def _add(self, part: Run) -> None:
        """All that a part has counted."""
        if part.steps:
            self.started = min(self.started, part.started) if self.steps else part.started
        for name in ("dense", "other", "gated", "completed", "compared", "taken"):
            getattr(self, name).update(getattr(part, name))
        for layer, counts in part.layers.items():
            self.layers[layer].update(counts)
        for key, record in part.records.items():
            if (own := self.records.setdefault(key, record)) is not record:
                own.calls += record.calls
        for name in ("sparse_steps", "seen_steps"):
            getattr(self, name).update(getattr(part, name))
        for name in ("seen", "probes", "steps"):
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.tokens, self.schedule_steps = max(self.tokens, part.tokens), max(self.schedule_steps, part.schedule_steps)
        self.unseen = self.unseen or part.unseen
        self._spans += part._spans
        self._add_facts(part)

    def _add_heads(self, card: str, part: Run) -> None:
        """What a card has done with other heads of the same calls."""
        own, others = (sum(record.calls for record in run.records.values()) for run in (self, part))
        if own != others:
            why = ", ".join(part.dense) or "nothing said why"
            self.warn(f"{card} ran {others} attention calls sparse, the first card {own} ({why}): name a kernel in "
                      "backend, so that all cards run the same")
        self._add_facts(part)

    def _add_facts(self, part: Run) -> None:
        """What holds for the calls of a part, whoever counts them."""
        for key, record in part.records.items():
            if (own := self.records.setdefault(key, record)) is not record:
                own.densities += [density.cpu() for density in record.densities]
        for name in ("failed", "asked", "proofs", "medians"):
            getattr(self, name).update(getattr(part, name))
        for text in part.warnings:
            self.warn(text)
        for text in part.notes:
            self.note(text)
        self._not_finite += part._not_finite
        self.closeness.add(part.closeness)
        self.rounding.add(part.rounding)
        part.plans.clear()

    @property
    def sparse_calls(self) -> int:
        return sum(record.calls for record in self.records.values())

    def milliseconds(self, kind: str) -> float:
        """Time inside attention calls of this kind, known once the run has ended."""
        return sum((self._calls_ms or {}).get(kind, ()))

    def median_ms(self, kind: str) -> float:
        """Median time of one call of this kind: the first calls, which compile kernels, do not move it."""
        return statistics.median((self._calls_ms or {}).get(kind) or (0.0,))

    def dense_seconds(self) -> float | None:
        """How long the sampling would have taken with dense attention, as far as the calls that were timed tell; None
        where sparse calls could not be compared, or nothing ran sparse."""
        if not self.compared:
            return None
        seconds = self.seconds - sum(map(self.milliseconds, (SPARSE, PROBE, MEASURE))) / 1e3
        for contest, calls in self.compared.items():
            medians = contest.so_far()
            if medians is None:
                return None
            seconds += calls * medians[1] / 1e3
        return seconds if self.compared.total() == self.sparse_calls else None

    @property
    def density(self) -> float | None:
        """Share of query-key pairs that the calls which ran sparse computed; None when nothing did."""
        known = [(record.density, record.calls) for record in self.records.values() if record.density is not None]
        calls = sum(count for _, count in known)
        return sum(share * count for share, count in known) / calls if calls else None

    def summary(self) -> list[dict[str, Any]]:
        """The run in plain numbers, one entry per grid (one without a grid when nothing ran sparse)."""
        shared = {
            "method": self.method_name, "steps": self.steps,
            "gated_calls": self.gated.total(), "dense_calls": dict(self.dense), "other_calls": dict(self.other),
            "sparse_ms": self.milliseconds(SPARSE), "dense_ms": self.milliseconds(DENSE),
            "other_ms": self.milliseconds(OTHER), "dense_probes": self.probes,
            "int8_errors": self.rounding.errors, **self.closeness.numbers(), "measured_ms": self.milliseconds(MEASURE),
            "sparse_ms_per_call": self.median_ms(SPARSE),
            "dense_ms_per_call": self.median_ms(DENSE), "seconds": self.seconds,
            "dense_seconds": self.dense_seconds(), "notes": self.said}
        if not self.records:
            return [{"grid": None, "sparse_calls": 0, "backend": None, **shared}]
        return [{
            "grid": list(record.grid.thw), "prefix": record.grid.prefix, "suffix": record.grid.suffix,
            **record.facts, "density": record.density, "backend": record.kernel, "sparse_calls": record.calls,
            **shared} for record in self.records.values()]
