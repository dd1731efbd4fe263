"""What a search measures: how far every head moves under every choice, and the choosing by that.

Dense attention is the last choice of all: it costs everything and moves nothing.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Measurements:
    """Relative L2 errors of choices, pooled over all calls of the same step and layer."""

    def __init__(self, densities: Sequence[float], steps: int, layers: int, heads: int) -> None:
        """densities: share of query-key pairs that every choice computes, dense attention's last."""
        self.densities = tuple(densities)
        choices = len(self.densities) - 1
        self.squared_errors = torch.zeros(steps, layers, choices, heads, dtype=torch.float64)
        self.squared_norms = torch.zeros(steps, layers, heads, dtype=torch.float64)
        self.calls = torch.zeros(steps, layers, dtype=torch.int64)

    @property
    def work(self) -> float:
        """Attention work of a measured call, the dense one included, in dense calls."""
        return 1 + sum(self.densities[:-1])

    def add(self, step: int, layer: int, squared_errors: Tensor, squared_norms: Tensor,
            heads: range | None = None) -> None:
        """Add what was measured of one call.   [C, h] and [h], any device

        heads: which of the layer's heads the call had, all for None. A layer that comes in parts counts once.
        """
        own = slice(None) if heads is None else slice(heads.start, heads.stop)
        self.squared_errors[step, layer][:, own] += squared_errors.cpu()
        self.squared_norms[step, layer][own] += squared_norms.cpu()
        self.calls[step, layer] += heads is None or heads.start == 0

    def require_whole(self) -> None:
        """Raise ValueError naming a step and layer that was never measured."""
        if not self.calls.all():
            step, layer = (self.calls == 0).nonzero()[0].tolist()
            raise ValueError(f"step {step}, layer {layer} was never measured: found {int((self.calls > 0).sum())} of "
                             f"{self.calls.numel()} steps and layers, wanted all; let the search finish")

    def relative(self) -> Tensor:
        """Relative L2 error of every choice, the dense one last: float64 [steps, layers, heads, choices].

        A head whose numbers are not finite has an infinite error, so it stays dense. Errors: `require_whole`.
        """
        self.require_whole()
        norms = self.squared_norms[..., None]
        ratio = self.squared_errors.transpose(2, 3) / norms
        ratio = torch.where((norms == 0) & (self.squared_errors.transpose(2, 3) == 0), 0.0, ratio)
        errors = ratio.sqrt().nan_to_num_(nan=math.inf, posinf=math.inf)
        return torch.cat([errors, torch.zeros_like(errors[..., :1])], dim=-1)

    def state(self) -> dict[str, Tensor]:
        """What has been measured, for `restore` in a later session."""
        return {"squared_errors": self.squared_errors, "squared_norms": self.squared_norms, "calls": self.calls}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a `state`. Raises ValueError when it is of another search."""
        for name, mine in self.state().items():
            if name not in state or state[name].shape != mine.shape:
                found = list(state[name].shape) if name in state else "nothing"
                raise ValueError(f"saved search: found {name} {found}, wanted {list(mine.shape)}: it was made with "
                                 "other steps, layers, heads or candidates")
        for name, mine in self.state().items():
            mine.copy_(state[name])


def choose_under_error(errors: Tensor, densities: Sequence[float], bound: float) -> Tensor:
    """The cheapest window of at most `bound` relative error, for every step, layer and head.

    errors: [T, L, H, C] -> int64 [T, L, H]. Equal costs go to the smaller error. The full window, with error 0,
    always qualifies. Raises ValueError for a bound below 0.
    """
    if not bound >= 0:
        raise ValueError(f"error bound {bound}: wanted 0 or more")
    allowed = errors <= bound
    cost = torch.tensor(densities, dtype=torch.float64).expand_as(errors).masked_fill(~allowed, math.inf)
    cheapest = cost == cost.amin(-1, keepdim=True)
    return errors.masked_fill(~(cheapest & allowed), math.inf).argmin(-1)


def choose_under_density(errors: Tensor, densities: Sequence[float], budget: float) -> Tensor:
    """Windows of mean density at most `budget` with a small sum of squared errors.   [T, L, H, C] -> int64 [T, L, H]

    Squares, because the errors of the heads of a layer add up so. Every head starts at its cheapest window and is
    upgraded along the lower convex hull of its (density, squared error) points, the best gain per cost of all heads
    first, while the budget lasts. Until an upgrade does not fit this is the optimum of its density; in the end the
    sum is above the optimum by less than the gain of the first upgrade that did not fit.
    Raises ValueError when even the cheapest choices exceed the budget.
    """
    cost = torch.tensor(densities, dtype=torch.float64)
    if not budget >= float(cost.min()) - 1e-12:
        raise ValueError(f"density {budget}: the cheapest choice has {float(cost.min()):.4f}, wanted at least that")
    loss = errors.flatten(0, -2).double().square().clamp(max=1e12)         # [M, C]; the gain from inf must be a number
    tied = torch.where(cost == cost.min(), loss, math.inf)
    chosen = tied.argmin(-1)
    upgrades = _hull_upgrades(loss, cost, chosen)
    room = budget * len(loss) - float(cost[chosen].sum()) + 1e-9
    blocked: set[int] = set()
    final = chosen.tolist()
    for item, window, price in upgrades:
        if item in blocked:
            continue
        if price > room:
            blocked.add(item)
            continue
        room -= price
        final[item] = window
    return torch.tensor(final).view(errors.shape[:-1])


def _hull_upgrades(loss: Tensor, cost: Tensor, start: Tensor) -> list[tuple[int, int, float]]:
    """(item, window, price) of every step along the items' convex hulls, by falling gain per cost."""
    at, found = start, []
    while True:
        price = cost - cost[at][:, None]                                    # [M, C]
        gain = loss.gather(1, at[:, None]) - loss
        slope = torch.where((price > 0) & (gain > 0), gain / price, -math.inf)
        best, window = slope.max(-1)
        going = best > -math.inf
        if not going.any():
            break
        items = going.nonzero().flatten()
        found.append((best[items], items, window[items], price[items, window[items]]))
        at = torch.where(going, window, at)
    if not found:
        return []
    slope, items, window, price = (torch.cat(column) for column in zip(*found, strict=True))
    order = slope.sort(descending=True, stable=True).indices
    return list(zip(items[order].tolist(), window[order].tolist(), price[order].tolist(), strict=True))
