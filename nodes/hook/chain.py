"""The chain of attention overrides: ComfyUI has one slot for them, so that every node keeps the one that it found."""
from __future__ import annotations

from collections.abc import Iterator


def hooks_from(override, options: dict) -> Iterator:
    """The sparse hooks at the head of the chain that begins with `override`, one after the other; a circle ends it."""
    seen: set[int] = set()
    while (hook := getattr(override, "sparse_attention_hook", None)) is not None and id(hook) not in seen:
        seen.add(id(hook))
        yield hook
        override = hook.previous(options)
