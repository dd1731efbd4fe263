"""Which chunks of keys every query looks at besides its own: the gate of VMoBA.

The gate of a query and a chunk is q . mean(k of the chunk), in float32, without a scale. FastVideo,
fastvideo-kernel/python/fastvideo_kernel/vmoba.py at 2f3d4074. Unlike upstream every element of a batch chooses for
itself, a share that is never reached keeps every chunk, and nothing of the size of all gates is held at once.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MODES = ("threshold", "topk")
POOLS = ("query_head", "block", "overall", "head_global")
"""What competes: the chunks of one query and head; the queries and heads of one chunk; all; all of one head."""

_PIECE_BYTES = {"cpu": 8 << 20}
"""Bound on the gates, and what is made of them, held at once."""
_PIECE_BYTES_ELSEWHERE = 128 << 20
_BYTES_PER_GATE = 48
_EPS = 1e-6
_FIXED = 1 << 30
"""Values from 0 to 1 are summed as integers of this many parts, so that any order gives the same sum."""
_DIGITS = ((21, 11), (10, 11), (0, 10))
"""(shift, bits) of the digits by which the cut is found among 32-bit keys."""


@dataclass(frozen=True)
class ChunkRule:
    """How many chunks are chosen, and among what."""

    mode: str
    topk: int
    """Chunks, the own one included."""
    threshold: float
    """Share of the gates' sum, after they were brought to 0..1."""
    pool: str

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"moba_select_mode {self.mode!r}: wanted {' or '.join(MODES)}")
        if self.pool not in POOLS or (self.mode, self.pool) == ("topk", "block"):
            wanted = [pool for pool in POOLS if (self.mode, pool) != ("topk", "block")]
            raise ValueError(f"moba_threshold_type {self.pool!r} with {self.mode}: wanted {', '.join(wanted)}")
        if isinstance(self.topk, bool) or not isinstance(self.topk, int) or self.topk < 1:
            raise ValueError(f"topk {self.topk!r}: wanted a whole number of chunks, 1 (the own one) or more")
        if not 0 <= self.threshold < math.inf:
            raise ValueError(f"moba_threshold {self.threshold!r}: wanted 0 or more")

    def keeps_own(self) -> bool:
        """Whether no other chunk is ever chosen."""
        return self.mode == "topk" and self.topk == 1

    def keeps_all(self, chunks: int) -> bool:
        """Whether every one of so many chunks is seen by all queries."""
        return chunks == 1 or (self.topk >= chunks if self.mode == "topk" else self.threshold >= 1)


def choose(queries: Tensor, means: Tensor, own: Tensor, rule: ChunkRule) -> Iterator[Tensor]:
    """For one head after the other, of one element of a batch, the other chunks that its queries look at.

    queries: [n, H, D];  means: [H, C, D];  own: int64 [n], every query's own chunk, which is never chosen.
    -> bool [n, C], H times. Where gates tie at the cut, the query that comes first gets the place.
    """
    heads, chunks = means.shape[:2]
    bound = _PIECE_BYTES.get(queries.device.type, _PIECE_BYTES_ELSEWHERE)
    step = max(1, bound // (chunks * _BYTES_PER_GATE))
    rows = [slice(first, first + step) for first in range(0, len(queries), step)]
    column = torch.arange(chunks, device=queries.device)

    def pieces(head: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in rows:
            gate = queries[part, head].to(means.dtype) @ means[head].T
            yield gate.float(), own[part, None] == column

    def cut(of: range) -> Callable[[Tensor, Tensor], Tensor]:
        wanted = (min(rule.topk, chunks) - 1) * len(queries) * len(of)
        return _Cut(lambda: (piece for head in of for piece in pieces(head)), rule, wanted, chunks).choose

    if rule.keeps_own() or chunks == 1:
        yield from torch.zeros((1, len(queries), chunks), dtype=torch.bool, device=queries.device).expand(heads, -1, -1)
        return
    together = cut(range(heads)) if rule.pool in ("block", "overall") else None
    for head in range(heads):
        if rule.pool == "query_head":
            pick = _top_of_rows if rule.mode == "topk" else _share_of_rows
            parts = [pick(gate, is_own, rule) for gate, is_own in pieces(head)]
        else:
            pick = together or cut(range(head, head + 1))
            parts = [pick(gate, is_own) for gate, is_own in pieces(head)]
        yield parts[0] if len(parts) == 1 else torch.cat(parts)


def _top_of_rows(gate: Tensor, is_own: Tensor, rule: ChunkRule) -> Tensor:
    others = gate.masked_fill(is_own, -torch.inf).topk(min(rule.topk, gate.shape[1]) - 1, dim=1).indices
    return torch.zeros_like(is_own).scatter_(1, others, True) & ~is_own


def _share_of_rows(gate: Tensor, is_own: Tensor, rule: ChunkRule) -> Tensor:
    low, high = gate.amin(1, keepdim=True), gate.amax(1, keepdim=True)
    value = (gate - low) / _span(low, high)
    total = value.sum(1, keepdim=True, dtype=torch.float64) + _EPS
    need = (rule.threshold - (value * is_own).sum(1, keepdim=True, dtype=torch.float64) / total).clamp(min=0)
    best, order = value.masked_fill(is_own, -1).sort(dim=1, descending=True, stable=True)
    reached = best.clamp(min=0).cumsum(1, dtype=torch.float64) / total >= need
    taken = torch.where(reached.any(1), reached.int().argmax(1), gate.shape[1])
    place = torch.arange(gate.shape[1], device=gate.device)
    return torch.zeros_like(is_own).scatter_(1, order, place <= taken[:, None]) & ~is_own


def _span(low: Tensor, high: Tensor) -> Tensor:
    return torch.where(high - low <= _EPS, 1, high - low)


class _Cut:
    """The gate down to which a pool chooses, found digit by digit, without sorting the pool.

    A pool is all gates of `pieces`, or with "block" one column of them.
    """

    def __init__(self, pieces: Callable[[], Iterator[tuple[Tensor, Tensor]]], rule: ChunkRule, wanted: int,
                 chunks: int):
        """wanted: how many are chosen, for top-k."""
        self.pieces, self.by_share, self.columns = pieces, rule.mode == "threshold", rule.pool == "block"
        self.pools = chunks if self.columns else 1
        self.low = self.high = None
        if self.by_share:
            self._find_range()
        device = next(iter(pieces()))[0].device
        self.key, need, reached = torch.zeros(self.pools, dtype=torch.long, device=device), None, None
        for shift, bits in _DIGITS:
            counts, sums, total, own = self._histogram(shift, bits)
            if need is None and self.by_share:
                total = total + round(_EPS * _FIXED)
                need = (rule.threshold * total.double() - own).clamp(min=0).ceil().long()
            elif need is None:
                need = torch.full_like(self.key, wanted)
            measure = sums if self.by_share else counts
            from_top, how_many = (x.flip(1).cumsum(1).flip(1) for x in (measure, counts))
            enough = (from_top >= need[:, None]) & (how_many > 0)
            reached = enough.any(1) if reached is None else reached
            digit = (enough * torch.arange(1 << bits, device=device)).amax(1, keepdim=True)
            need = need - (from_top - measure).gather(1, digit)[:, 0]
            self.key = (self.key << bits) | digit[:, 0]
        ties, inside = counts.gather(1, digit)[:, 0], measure.gather(1, digit)[:, 0]
        each = (inside // ties.clamp(min=1)).clamp(min=1)
        self.ties = torch.minimum((need + each - 1) // each, ties).clamp(min=1)
        self.all, self.seen = ~reached, torch.zeros_like(self.ties)

    def choose(self, gate: Tensor, is_own: Tensor) -> Tensor:
        """What is chosen of the next piece, bool [n, C]; pieces have to come in their order."""
        key = self._keys(self._value(gate))
        tie = (key == self.key) & ~is_own
        rank = tie.cumsum(0) if self.columns else tie.flatten().cumsum(0).view(tie.shape)
        first = tie & (rank + self.seen <= self.ties)
        self.seen = self.seen + self._over_pool(tie.long())
        return ((key > self.key) | first | self.all) & ~is_own

    def _find_range(self):
        for gate, _ in self.pieces():
            low, high = (gate.amin(0), gate.amax(0)) if self.columns else (gate.amin()[None], gate.amax()[None])
            self.low = low if self.low is None else torch.minimum(self.low, low)
            self.high = high if self.high is None else torch.maximum(self.high, high)

    def _value(self, gate: Tensor) -> Tensor:
        return (gate - self.low) / _span(self.low, self.high) if self.by_share else gate

    def _over_pool(self, x: Tensor) -> Tensor:
        return x.sum(0) if self.columns else x.sum()[None]

    @staticmethod
    def _keys(value: Tensor) -> Tensor:
        """Integers from 0 to 2**32 - 1 in the order of the float32 values."""
        bits = value.contiguous().view(torch.int32)
        return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() + (1 << 31)

    def _histogram(self, shift: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the others whose higher digits are those of the cut: how many, and their sum, by digit, int64
        [pools, 2**bits] each. Of all: their sum and that of the own ones, int64 [pools]."""
        counts = torch.zeros((self.pools, 1 << bits), dtype=torch.long, device=self.key.device)
        sums, total, own = torch.zeros_like(counts), torch.zeros_like(self.key), torch.zeros_like(self.key)
        offset = torch.arange(self.pools, device=self.key.device) << bits
        for gate, is_own in self.pieces():
            value = self._value(gate)
            key = self._keys(value)
            inside = (key >> (shift + bits) == self.key) & ~is_own
            place = (((key >> shift) & ((1 << bits) - 1)) + offset).flatten()
            counts.view(-1).scatter_add_(0, place, inside.long().flatten())
            if self.by_share:
                parts = (value.double() * _FIXED).round().long()
                sums.view(-1).scatter_add_(0, place, (parts * inside).flatten())
                total, own = total + self._over_pool(parts), own + self._over_pool(parts * is_own)
        return counts, sums, total, own
