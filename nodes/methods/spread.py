"""The widget `spread`: whether the work of a sampling is the same in every step, or follows the noise."""
from __future__ import annotations

from comfy_api.latest import io

from ..hook.settings import FEW_STEPS

AUTO, BY_NOISE, EVEN = "auto", "by noise", "even"
SPREADS = (AUTO, BY_NOISE, EVEN)
SO_NOISY = "so noisy a step keeps everything"
"""Why a call stays dense whose share of the work is all."""


def spread_input(trains: bool):
    """trains: whether there are models trained with the method."""
    return io.Combo.Input(
        "spread", options=list(SPREADS), default=AUTO, optional=True, advanced=True,
        tooltip="How the work goes over the steps. even: dense up to start_percent, then the same in every step. by "
                "noise: as much work in all, most of it while the clip is still noise, where errors decide what "
                "becomes of it, and little at the end. auto: by noise, but even "
                + ("for models that were trained with VSA, " if trains else "")
                + f"with up to {FEW_STEPS} steps, and where "
                + ("attention_mass or " if trains else "") + "a strategy says how much is kept.")


def spread_from(choice: str, why_even: str) -> int | None:
    """Steps of a schedule from which on the work is spread by noise, None for never.

    why_even: why this model or these settings cannot, "" where they can.
    Raises ValueError for a choice that is none, and for "by noise" where it cannot be.
    """
    if choice not in SPREADS:
        raise ValueError(f"spread {choice!r}: wanted {', '.join(SPREADS)}")
    if choice == BY_NOISE and why_even:
        raise ValueError(f"spread by noise: {why_even}. Choose auto or even")
    if choice == EVEN or why_even:
        return None
    return 1 if choice == BY_NOISE else FEW_STEPS + 1
