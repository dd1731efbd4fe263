"""What a sampling comes to, in a sentence: on, off or slower, and what to do.

Every line is plain text and Markdown at once, because ComfyUI shows it as either: a paragraph, then bullets.
"""
from __future__ import annotations

from collections.abc import Iterable

from .run import Run
from .sparse_calls import KEEPS_ALL, SLOWER

ABOUT_THE_SAME = 0.03
"""Shares of time below which a difference is not told."""
OUTSIDE, ONE_FRAME, BLOCKED, FEW_TOKENS = ("outside start_percent..end_percent", "one frame", "dense_blocks",
                                           "fewer than")
"""Reasons of the hook for a dense call; the last one goes on with `min_tokens`."""

CURES = {
    OUTSIDE: "every sampled step lies outside start_percent to end_percent. Lower start_percent or raise end_percent",
    ONE_FRAME: "it makes a single frame, and sparse attention needs a clip",
    BLOCKED: "dense_blocks names every block. Leave some out",
    KEEPS_ALL: "with these settings every tile looks at the whole clip. Raise sparsity, lower ratio or threshold, or "
               "choose a smaller window",
    SLOWER: "dense attention is faster here. Longer or larger clips gain more",
    "out of memory": "there was no room on the GPU. Use a smaller clip",
}


def verdict(run: Run) -> str:
    """One sentence or two: whether sparse attention is on, whether that is faster, and why not."""
    name = run.method_name
    if run.unseen:
        return run.unseen
    if not run.sparse_calls:
        return f"{name} is OFF: {_why_off(run)}."
    skipped = "" if run.density is None else (
        f" {1 - run.density:.0%} of attention skipped in {len(run.sparse_steps)} of {len(run.seen_steps)} steps.")
    if run.dense[SLOWER] > run.sparse_calls:
        return f"{name} is OFF after {run.sparse_calls} attention calls that were timed: {CURES[SLOWER]}."
    took, dense = seconds(run.seconds), run.dense_seconds()
    if dense is None:
        return f"{name} is ON: {took}, not compared with dense attention.{skipped}"
    ratio = dense / run.seconds
    if ratio < 1 - ABOUT_THE_SAME:
        return (f"{name} is SLOWER than dense here: sampling took {took}, dense would take about {seconds(dense)}."
                f"{skipped}")
    if ratio <= 1 + ABOUT_THE_SAME:
        return f"{name} is ON, but sampling is about as fast as with dense attention ({took}).{skipped}"
    return (f"{name} is ON: sampling about {ratio:.1f}x faster ({took}; dense would take about {seconds(dense)})."
            f"{skipped}")


def _why_off(run: Run) -> str:
    if run.taken:
        method, calls = run.taken.most_common(1)[0]
        return f"the {method} node behind this one computed all {calls} attention calls in its place. Keep one of both"
    if not run.dense:
        return "the clip's own self-attention was not among the attention calls of this model"
    reason = run.dense.most_common(1)[0][0]
    if reason.startswith(FEW_TOKENS):
        least = reason.removeprefix(FEW_TOKENS).split()[0]
        more = f" by {int(least) / run.tokens:.1f}x" if run.tokens else ""
        return (f"the clip has {run.tokens} tokens and min_tokens is {least}. Make it longer or larger{more}, or lower "
                "min_tokens")
    if reason == "no kernel" and run.warnings:
        return "no kernel can run it"
    return CURES.get(reason, reason)


def dense_steps(run: Run) -> str:
    """The steps in which nothing ran sparse, such as "dense steps: 1-6 of 30"; empty when there is none."""
    dense = sorted(run.seen_steps - run.sparse_steps)
    return f"dense steps: {_ranges(dense)} of {run.schedule_steps}" if dense and run.sparse_steps else ""


def seconds(value: float) -> str:
    """A time as people say it."""
    if value < 9.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes >= 2 else f"{round(value)} s"


def bullets(lines: Iterable[str]) -> list[str]:
    """Lines of a list; one with line breaks in it stays one item."""
    return [f"- {line}".replace("\n", "\n  ") for line in lines if line]


def _ranges(numbers: list[int]) -> str:
    """Indices from 0 on as numbers from 1 on: 1-6, 9."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number:
            parts[-1][1] = number + 1
        else:
            parts.append([number + 1, number + 1])
    return ", ".join(f"{first}-{last}" if last > first else f"{first}" for first, last in parts)
