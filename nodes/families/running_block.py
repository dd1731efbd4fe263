"""Which transformer block is running: its attention calls find the block's place in their transformer_options.

Pre-hooks on the blocks tell them, set for one forward pass (decision 0008): a layer is known by what it is, so that
blocks which are skipped, or which call attention several times, count for nothing.
"""
from __future__ import annotations

from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

RUNNING = "video_sparse_attention.running_block"
"""In the transformer_options of a block's calls: the place of that block in the family's `blocks`."""
_OVERRIDE = "optimized_attention_override"


class _Tell:
    """Pre-hook of one transformer block. Writes into the options of this pass, as the host does its block_index."""

    def __init__(self, place: int):
        self.place = place

    def __call__(self, module, args, kwargs):
        options = kwargs.get("transformer_options")
        if options is None:     # a neighbour's forward may hand the options on by position
            options = next((value for value in args if isinstance(value, dict) and _OVERRIDE in value), None)
        if options is not None:
            options[RUNNING] = self.place


@contextmanager
def told_apart(blocks: Iterable):
    """While it lasts, every attention call below one of `blocks` can ask `running_block` for that block's place."""
    handles = []
    try:
        for place, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(_Tell(place), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def running_block(options: dict[str, Any]) -> int | None:
    """The place of the block that is running, or that ran last, for a call with these transformer_options.

    None where none has run in this forward pass.
    """
    return options.get(RUNNING)
