"""How close a run's sparse attention came to exact attention: which calls are measured, their figures, the sentence.

What is chosen depends on the order of the calls only, through a generator of its own: the sampling stays as it is.
"""
from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass

from torch import Tensor

from ...vsa_core.closeness import Launch, Place, closeness_of, sampling_rate
from ...vsa_core.layout import TileLayout
from ...vsa_core.tiling import BLOCK

FAR = 0.20
"""Mean relative error of the attention from which on the user is told to keep more."""
SURE = 0.10
"""Half of the 95 % interval, as a share of the error, up to which its figures are told without "about"."""
MANY = 20
"""Measured calls from which on their scatter can be trusted."""
LEAST = 0.001
"""An error below which no digits are told."""


@dataclass(frozen=True)
class Tile:
    """One sampled tile of queries."""

    call: int
    layer: int | None
    head: int | None
    tokens: float
    kept: float
    """Share of the exact softmax mass on the keys that were read."""
    error: float | None
    """Relative L2 against exact attention; None where the call added something else, such as a gated branch."""


class Watch:
    """One sparse call that is measured: takes what the kernels were told to read, and judges the result."""

    def __init__(self, tiles: int, layer: int | None, heads: range | None):
        self.tiles, self.layer, self.heads = tiles, layer, heads
        self.launches: list[Launch] = []
        self.layout: TileLayout | None = None
        self.adds = False
        """Whether the model was trained for it, with a branch that it adds or without: then dense attention is not what
        it is to be compared with."""

    def reads(self, heads: slice, indices: Tensor, counts: Tensor, layout: TileLayout) -> None:
        """The lists of one launch, as `AttentionImpl.on_lists` tells them."""
        self.launches.append(Launch(heads, indices, counts))
        self.layout = layout


class Closeness:
    """The measured calls of one run. Figures stay on the device until the run ends."""

    def __init__(self, seed: int = 0):
        self._random = random.Random(seed)
        self._left, self._due, self._tiles = 0, -1, 0
        self._deck: list[int] = []
        self._measured: list[tuple[Watch, list[Place], Tensor]] = []
        self.tiles: list[Tile] = []
        """Known once the run has ended."""
        self.given_up = False

    def watch(self, tokens: int, call) -> Watch | None:
        """A watch where the next sparse call (a LayerCall) with so many tokens, batch and all, is to be measured.

        One call of every stretch is, at a random place in it; a stretch is as long as the calls' size asks for.
        """
        heads = call.heads or range(call.of_heads)
        if self._left == 0:
            parts = -(-call.of_heads // len(heads))
            expected = (call.layers or 1) * parts * call.step.total
            self._tiles, self._left = sampling_rate(tokens, len(heads), expected)
            self._due = self._random.randrange(self._left)
        return Watch(self._tiles, call.layer, call.heads) if self._due == 0 and not self.given_up else None

    def passed(self) -> None:
        """A sparse call is done."""
        self._left, self._due = self._left - 1, self._due - 1

    def measure(self, watch: Watch, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        """Judge a call's result by some of its tiles. q, k, v, out: [B, S, H, D]"""
        if watch.launches:
            places = self._places(watch, q.shape[0], q.shape[2])
            figures = closeness_of(q, k, v, out, places, watch.launches, watch.layout, q.shape[3] ** -0.5)
            self._measured.append((watch, places, figures))
            watch.launches, watch.layout = [], None

    def _places(self, watch: Watch, batch: int, heads: int) -> list[Place]:
        blocks, found = watch.layout.num_video_slots // BLOCK, {}
        for _ in range(min(watch.tiles, heads * blocks)):
            place = Place(self._random.randrange(batch), self._head(heads), self._random.randrange(blocks))
            found[place] = None
        return list(found)

    def _head(self, heads: int) -> int:
        """Heads come as from a deck of cards: each as often as the others."""
        while True:
            if not self._deck:
                self._deck = self._random.sample(range(heads), heads)
            head = self._deck.pop()
            if head < heads:
                return head

    def finish(self) -> None:
        """Read what was measured from the device, and let go of it."""
        for number, (watch, places, figures) in enumerate(self._measured):
            for place, (tokens, kept, error) in zip(places, figures.tolist(), strict=True):
                if tokens and math.isfinite(kept) and math.isfinite(error):
                    head = None if watch.heads is None else watch.heads.start + place.head
                    self.tiles.append(Tile(number, watch.layer, head, tokens, kept, None if watch.adds else error))
        self._measured.clear()

    def add(self, other: Closeness) -> None:
        """What another thread of the same run has measured counts too."""
        self._measured += other._measured
        other._measured.clear()

    # -- what it comes to -----------------------------------------------------------------------------------------

    @property
    def calls(self) -> int:
        return len({tile.call for tile in self.tiles})

    @property
    def mass_kept(self) -> float | None:
        """Share of the exact softmax mass on the keys that sparse calls read, the mean over query tokens."""
        return _mean([(tile.tokens, tile.kept) for tile in self.tiles])

    @property
    def relative_error(self) -> float | None:
        """Relative L2 of a tile's attention against exact, the mean over query tokens; None where nothing tells."""
        return _mean(self._errors())

    @property
    def sure(self) -> bool:
        """Whether the scatter from call to call leaves the error known to SURE, or to LEAST."""
        error = self.relative_error
        if error is None:
            return False
        width = self.half_width()
        return width <= LEAST or self.calls >= MANY and width <= SURE * error

    def half_width(self) -> float:
        """Half of the 95 % interval around `relative_error`, from the scatter from call to call; inf for one call."""
        by_call, mean = defaultdict(list), self.relative_error
        for tile in self.tiles:
            if tile.error is not None:
                by_call[tile.call].append((tile.tokens, tile.error))
        many = len(by_call)
        if many < 2:
            return math.inf
        weights = [sum(tokens for tokens, _ in pairs) for pairs in by_call.values()]
        off = [_mean(pairs) - mean for pairs in by_call.values()]
        square = sum((w * d) ** 2 for w, d in zip(weights, off, strict=True)) / sum(weights) ** 2
        return _t(many - 1) * math.sqrt(square * many / (many - 1))

    def sentence(self) -> str:
        """How much of the attention was kept and how far it was from exact; empty where nothing was measured."""
        if not self.tiles:
            return ""
        of = f"{len(self.tiles)} tiles in {self.calls} attention calls"
        kept, error = self.mass_kept, self.relative_error
        if error is None:
            return f"kept {kept:.1%} of the attention ({of}; what the trained gates add is not judged)"
        if self.sure:
            return f"kept {kept:.1%} of the attention, {_share(error)} from exact ({of})"
        return f"kept about {kept:.0%} of the attention, about {error:.0%} from exact ({of})"

    def warning(self, cure: str) -> str:
        """What to say where the attention is far from exact, else nothing. cure: how this method keeps more."""
        error = self.relative_error
        if error is None or error <= FAR:
            return ""
        return f"{self.sentence()}. Far from exact: {cure}. A hint only: the clip itself is the verdict"

    def worst(self) -> str:
        """The layer that is furthest from exact and its worst head, as far as tiles of them were measured."""
        named = [tile for tile in self.tiles if tile.layer is not None]
        if len({tile.layer for tile in named}) < 2:
            return ""
        judged = [tile for tile in named if tile.error is not None]
        words = "furthest from exact" if judged else "least kept"
        layer, bad = _worst(judged or named, lambda tile: tile.layer)
        heads = [tile for tile in judged or named if tile.layer == layer and tile.head is not None]
        text = f"{words}: layer {layer} ({_told(bad, judged)})"
        if not heads:
            return text
        head, bad = _worst(heads, lambda tile: tile.head)
        return f"{text}, in it head {head} ({_told(bad, judged)})"

    def of_layer(self, layer: int | None) -> str:
        """What was measured in one layer, empty where that is nothing."""
        own = [tile for tile in self.tiles if tile.layer == layer]
        if not own:
            return ""
        error = _mean([(tile.tokens, tile.error) for tile in own if tile.error is not None])
        away = "" if error is None else f", {_share(error)} from exact"
        return f"kept {_mean([(tile.tokens, tile.kept) for tile in own]):.1%}{away} ({len(own)} tiles)"

    def numbers(self) -> dict[str, float | int | None]:
        """The plain numbers for a run's summary."""
        return {"mass_kept": self.mass_kept, "relative_error": self.relative_error,
                "measured_tiles": len(self.tiles), "measured_calls": self.calls}

    def _errors(self) -> list[tuple[float, float]]:
        return [(tile.tokens, tile.error) for tile in self.tiles if tile.error is not None]


def _mean(pairs: list[tuple[float, float]]) -> float | None:
    """The mean of (weight, value) pairs; None of none."""
    weight = sum(pair[0] for pair in pairs)
    return sum(w * value for w, value in pairs) / weight if weight else None


def _worst(tiles: list[Tile], key) -> tuple[Hashable, float]:
    """The group with the highest mean error, or share that is not kept, and that mean."""
    groups = defaultdict(list)
    for tile in tiles:
        groups[key(tile)].append((tile.tokens, 1 - tile.kept if tile.error is None else tile.error))
    return max(((name, _mean(pairs)) for name, pairs in groups.items()), key=lambda item: item[1])


def _told(bad: float, judged: list[Tile]) -> str:
    return _share(bad) if judged else f"{1 - bad:.1%}"


def _share(error: float) -> str:
    return f"less than {LEAST:.1%}" if error < LEAST else f"{error:.1%}"


def _t(freedom: int) -> float:
    """Student's t for a two-sided 95 % interval, within 3 %."""
    return 12.71 if freedom == 1 else 1.96 + 2.372 / freedom + 2.82 / freedom ** 2 + 2.6 / freedom ** 3
