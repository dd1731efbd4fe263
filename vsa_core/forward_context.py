"""The metadata of the forward pass in progress, where layers find it. Names: FastVideo, forward_context.py."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from .backends.abstract import AttentionMetadata


@dataclass(frozen=True)
class ForwardContext:
    attn_metadata: AttentionMetadata | None


_current: ContextVar[ForwardContext | None] = ContextVar("forward_context", default=None)


def get_forward_context() -> ForwardContext:
    """The context of this thread. Raises RuntimeError outside of `set_forward_context`."""
    context = _current.get()
    if context is None:
        raise RuntimeError("no forward pass in progress: wanted `with set_forward_context(attn_metadata):` around it")
    return context


@contextmanager
def set_forward_context(attn_metadata: AttentionMetadata | None) -> Iterator[ForwardContext]:
    """Layers called inside use this metadata. Contexts nest; every thread has its own."""
    token = _current.set(ForwardContext(attn_metadata))
    try:
        yield _current.get()
    finally:
        _current.reset(token)
