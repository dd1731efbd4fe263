"""How far a kernel that rounds scores to 8 bits is from an exact one, told by some calls that run on both."""
from __future__ import annotations

import torch
from torch import Tensor

CHECKS = 8
"""Calls of a run that are checked, about, spread over it."""
GOLDEN = 0.618
"""Where in its stretch a check lies moves by this share of a stretch: a whole number of layers meets other layers."""


class Rounding:
    """The checked calls of one run. Figures stay on the device until the run ends."""

    def __init__(self):
        self._calls, self._measured = 0, []
        self.errors: list[float] = []
        """Relative L2 of every checked call, known once the run has ended."""
        self.given_up = False

    def due(self, expected: int) -> bool:
        """Whether the next call is to be checked, of so many that will come in this run."""
        stretch = max(1, expected // CHECKS)
        number, place = divmod(self._calls, stretch)
        self._calls += 1
        return not self.given_up and place == int(number * GOLDEN * stretch) % stretch

    def measure(self, found: Tensor, exact: Tensor) -> None:
        found, exact = found.float(), exact.float()
        size = exact.square().sum()
        self._measured.append(((found - exact).square().sum() / torch.where(size > 0, size, 1)).sqrt())

    def add(self, other: Rounding) -> None:
        """What another thread of the same run has measured counts too."""
        self._measured += [figure.to(self._measured[0].device if self._measured else figure.device)
                           for figure in other._measured]
        other._measured.clear()

    def finish(self) -> None:
        if self._measured:
            self.errors = torch.stack(self._measured).tolist()
        self._measured.clear()

    def sentence(self) -> str:
        """What was found, "" where nothing was checked."""
        if not self.errors:
            return ""
        many = len(self.errors)
        return (f"int8 scores: {sum(self.errors) / many:.2%} from exact scores, checked on {many} attention "
                f"call{'s' if many > 1 else ''}")
