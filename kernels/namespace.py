"""The name under which this copy of the pack registers its operators with torch."""
from __future__ import annotations

import logging
from pathlib import Path

import torch

log = logging.getLogger(__name__)

NAME, PROBE = "video_sparse_attention", "block_sparse_attention"


def free_namespace() -> str:
    """NAME, or NAME_2 and so on where another copy of the pack in this process has it already.

    torch takes an operator away from who registered it first, and that copy's next call would read freed memory.
    """
    number, name = 1, NAME
    while hasattr(getattr(torch.ops, name), PROBE):
        number += 1
        name = f"{NAME}_{number}"
    if number > 1:
        log.warning("Video Sparse Attention is loaded %d times in this process, now from %s: keep one of its folders "
                    "in custom_nodes and remove the others", number, Path(__file__).resolve().parent.parent)
    return name


NAMESPACE = free_namespace()
