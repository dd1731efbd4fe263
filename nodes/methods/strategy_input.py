"""The wire that strategies travel on, and what a node says of one that is another node's."""
from __future__ import annotations

from comfy_api.latest import io

from ...vsa_core.budgets import Budgets
from ...vsa_core.strategy import Strategy

StrategyType = io.Custom("STA_STRATEGY")
"""Windows of Sliding Tile Attention or budgets of Video Sparse Attention."""


def require_windows(strategy) -> None:
    """Raise ValueError for what is no strategy of Sliding Tile Attention."""
    if isinstance(strategy, Budgets):
        raise ValueError("this strategy holds budgets for Video Sparse Attention (VSA): connect it there. This node "
                         "needs windows, from STA Strategy Search")
    _require(strategy, Strategy)


def require_budgets(strategy) -> None:
    """Raise ValueError for what is no strategy of Video Sparse Attention."""
    if isinstance(strategy, Strategy):
        raise ValueError("this strategy holds windows for Sliding Tile Attention (STA): connect it there. This node "
                         "needs budgets, from Calibrate Sparse Attention")
    _require(strategy, Budgets)


def _require(strategy, kind: type) -> None:
    if not isinstance(strategy, kind):
        raise ValueError(f"strategy: found {type(strategy).__name__}, wanted one from a search or from a file")
