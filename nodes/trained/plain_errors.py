"""Errors as a user reads them: ComfyUI shows the class of an error, and where a class is not Python's own, its path."""
from __future__ import annotations

from contextlib import contextmanager

from ...checkpoints.safetensors_file import CheckpointError


@contextmanager
def plain_errors():
    """A CheckpointError leaves a node as the ValueError that it is."""
    try:
        yield
    except CheckpointError as error:
        raise ValueError(str(error)) from error
