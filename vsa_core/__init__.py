"""The mathematics of sparse video attention, in torch, on any device. Public names are FastVideo's.

A backend turns a grid of video tokens into a selection of tiles; a kernel reads only that selection.
"""
from importlib import import_module

_HOMES = {
    "AttentionBackend": ".backends.abstract", "AttentionMetadata": ".backends.abstract",
    "AttentionMetadataBuilder": ".backends.abstract", "LocalAttention": ".layer", "DistributedAttention": ".layer",
    "DistributedAttention_VSA": ".layer", "get_attn_backend": ".selector"}
"""The names that fastvideo.attention has at its top, and the modules here that define them."""

__all__ = list(_HOMES)


def __getattr__(name: str):
    # Nothing is imported before it is asked for: several modules here need no torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: wanted one of {', '.join(_HOMES)}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
