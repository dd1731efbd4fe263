"""The widgets that every sparse attention node shares, and what they mean."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from comfy_api.latest import io

from ... import kernels
from ...vsa_core.schedule import DenseBlocks, Schedule, parse_dense_blocks

DEFAULT_START, DEFAULT_MIN_TOKENS = 0.2, 12288
FEW_STEPS = 8
"""Steps of a schedule up to which a model was distilled, most likely: a dense start costs the more of it."""


@dataclass(frozen=True)
class Settings:
    """What the user chose, apart from the method."""

    backend: str = kernels.AUTO
    schedule: Schedule = Schedule()
    dense_blocks: DenseBlocks = DenseBlocks()
    min_tokens: int = 0
    strict: bool = False
    verbose: bool = False
    precision: str = kernels.EXACT
    """What "auto" among kernels may take, one of `kernels.PRECISIONS`."""
    few_steps: bool = False
    """Whether at most the first step of a schedule of up to FEW_STEPS stays dense at the start."""
    said: str = ""
    """What a preset made of the widgets, for the user."""

    @property
    def insists(self) -> bool:
        """Whether the user wants an error rather than dense attention."""
        return self.strict or self.backend != kernels.AUTO

    def dense_parts(self) -> list[str]:
        """The settings that leave part of a sampling dense, each with what a model wants that was trained sparse."""
        parts = []
        if self.schedule.start_percent > 0:
            parts.append(f"start_percent {self.schedule.start_percent:g} (wanted 0)")
        if self.schedule.end_percent < 1:
            parts.append(f"end_percent {self.schedule.end_percent:g} (wanted 1)")
        if self.dense_blocks.ranges:
            parts.append("dense_blocks (wanted none)")
        return parts


def settings_inputs() -> list:
    """The shared widgets, in their order. `read_settings` takes them by the same names.

    Advanced ones are optional, and so is whatever is appended: a prompt that was saved before it existed still runs.
    The page shows optional widgets behind required ones, so no required one may follow.
    """
    return [
        io.Combo.Input(
            "backend", options=[kernels.AUTO, *(spec.name for spec in kernels.KERNELS)], default=kernels.AUTO,
            optional=True, advanced=True,
            tooltip="The kernel that computes attention. auto takes the best that is proven right on this card, "
                    "and runs dense where dense is faster. A kernel chosen by name runs or raises an error."),
        io.Float.Input(
            "start_percent", default=DEFAULT_START, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
            tooltip="Part of the denoising that stays dense at the start, where the composition forms. "
                    "Lower is faster. 0 for checkpoints that were trained with sparse attention."),
        io.Float.Input(
            "end_percent", default=1.0, min=0.0, max=1.0, step=0.01, optional=True, advanced=True,
            tooltip="From here to the end attention is dense again. Below 1 it can calm flicker, at a cost."),
        io.String.Input(
            "dense_blocks", default="", optional=True, advanced=True,
            tooltip="Transformer blocks that stay dense, such as: 0, 1, 38-39, -1. The first and last are "
                    "the most sensitive. Each dense block costs its share of the speed-up."),
        io.Int.Input(
            "min_tokens", default=DEFAULT_MIN_TOKENS, min=0, max=1 << 24, optional=True, advanced=True,
            tooltip="Clips with fewer tokens run dense: there is little to gain on them. 480p of 33 frames "
                    "has about 14000 tokens, of 81 frames 32760."),
        io.Boolean.Input(
            "strict", default=False, optional=True, advanced=True,
            tooltip="Raise an error instead of running dense when no kernel can run or a kernel fails."),
        io.Boolean.Input(
            "verbose", default=False, optional=True, advanced=True,
            tooltip="Adds one line per layer to the report: attention calls, reasons and milliseconds."),
    ]


def precision_input():
    """A shared widget that came later: nodes have it last. `read_settings` takes it too."""
    return io.Combo.Input(
        "precision", options=list(kernels.PRECISIONS), default=kernels.EXACT, optional=True, advanced=True,
        tooltip="exact: scores in the model's own precision. int8 scores: queries and keys as 8-bit integers, as "
                "SageAttention has them: meant for cards with fast integer units, about 1% from exact, which the node "
                "measures on your clip. It concerns backend auto; a kernel chosen by name is what it is.")


def read_settings(backend=kernels.AUTO, start_percent=DEFAULT_START, end_percent=1.0, dense_blocks="",
                  min_tokens=DEFAULT_MIN_TOKENS, strict=False, verbose=False, precision=kernels.EXACT, few_steps=False,
                  said="") -> Settings:
    """The shared widgets, and what a preset made of them, as Settings. Raises ValueError: found, wanted."""
    if precision not in kernels.PRECISIONS:
        raise ValueError(f"precision {precision!r}: wanted {' or '.join(kernels.PRECISIONS)}")
    if min_tokens < 0:
        raise ValueError(f"min_tokens {min_tokens}: wanted 0 or more")
    return Settings(backend, Schedule(start_percent, end_percent), parse_dense_blocks(dense_blocks), min_tokens,
                    strict, verbose, precision, few_steps, said)


def why_invalid(read: Callable, value) -> str | bool:
    """True, or the sentence of the ValueError that `read` raises for a widget's value; None is fed by a link.

    For a node's validate_inputs, which may name one widget only: ComfyUI shows what it returns at every one that it
    names. What it does not name is checked when the node executes.
    """
    try:
        if value is not None:
            read(value)
    except ValueError as error:
        return str(error)
    return True
