"""Which attention backend a layer uses: forced before environment before the layer's own order of preference.

Names: FastVideo, attention/selector.py and platforms/interface.py. Unlike upstream nothing that was asked for is
replaced in silence: what cannot be had raises.
"""
from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum, auto

import torch

from ..kernels import KERNELS
from .backends import BACKENDS
from .backends.abstract import AttentionBackend
from .backends.sdpa import SDPABackend

log = logging.getLogger(__name__)

STR_BACKEND_ENV_VAR = "FASTVIDEO_ATTENTION_BACKEND"


class AttentionBackendEnum(Enum):
    """The attention backends of this package, by FastVideo's names; the last one is this package's own."""

    TORCH_SDPA = auto()
    VIDEO_SPARSE_ATTN = auto()
    SLIDING_TILE_ATTN = auto()
    SLA_ATTN = auto()
    SAGE_SLA_ATTN = auto()
    VMOBA_ATTN = auto()
    POOLED_CHUNK_ATTN = auto()


_CLASSES = {AttentionBackendEnum[backend.get_name()]: backend for backend in (SDPABackend, *BACKENDS)}

_forced: AttentionBackendEnum | None = None


def backend_name_to_enum(backend_name: str) -> AttentionBackendEnum | None:
    """The backend of that name, None for a name that is none."""
    return AttentionBackendEnum.__members__.get(backend_name)


def get_env_variable_attn_backend() -> AttentionBackendEnum | None:
    """The backend that FASTVIDEO_ATTENTION_BACKEND names, None when it is unset or empty.

    Raises ValueError with the list for a name that is none.
    """
    name = os.environ.get(STR_BACKEND_ENV_VAR)
    if not name:
        return None
    backend = backend_name_to_enum(name)
    if backend is None:
        raise ValueError(f"{STR_BACKEND_ENV_VAR}={name}: wanted one of {', '.join(AttentionBackendEnum.__members__)}, "
                         "or unset")
    return backend


def get_global_forced_attn_backend() -> AttentionBackendEnum | None:
    """The backend that is forced for all layers, None when each may choose."""
    return _forced


def global_force_attn_backend(attn_backend: AttentionBackendEnum | None) -> None:
    """Layers made from now on use this backend; None lets them choose again."""
    if attn_backend is not None and not isinstance(attn_backend, AttentionBackendEnum):
        raise ValueError(f"forced attention backend {attn_backend!r}: wanted an AttentionBackendEnum, one of "
                         f"{', '.join(AttentionBackendEnum.__members__)}, or None")
    global _forced
    _forced = attn_backend


@contextmanager
def global_force_attn_backend_context_manager(attn_backend: AttentionBackendEnum | None) -> Iterator[None]:
    """Forces a backend inside the block, and what was forced before behind it."""
    before = get_global_forced_attn_backend()
    global_force_attn_backend(attn_backend)
    try:
        yield
    finally:
        global_force_attn_backend(before)


def get_attn_backend(
    head_size: int, dtype: torch.dtype, supported_attention_backends: Sequence[AttentionBackendEnum] | None = None,
) -> type[AttentionBackend]:
    """The backend of a layer with this head size and dtype.

    supported_attention_backends: the layer's, best first; None: all, dense first.
    Forced before environment before the first of the layer's that can run; passing one over is logged.
    Raises ValueError when what was asked for, or everything the layer supports, cannot be had: one reason each.
    """
    supported = tuple(AttentionBackendEnum if supported_attention_backends is None else supported_attention_backends)
    if not supported:
        raise ValueError("a layer that supports no attention backend: wanted at least one of "
                         f"{', '.join(AttentionBackendEnum.__members__)}")
    names = ", ".join(backend.name for backend in supported)
    wish, source = get_global_forced_attn_backend(), "forced"
    if wish is None:
        wish, source = get_env_variable_attn_backend(), f"{STR_BACKEND_ENV_VAR} asks for"
    if wish is not None:
        reason = None if wish in supported else f"this layer supports {names}"
        if reason := reason or _refusal(wish, head_size, dtype):
            raise ValueError(f"attention backend {wish.name} ({source} it) cannot be had: {reason}")
        return _CLASSES[wish]
    reasons = []
    for backend in supported:
        reason = _refusal(backend, head_size, dtype)
        if reason is None:
            for passed_over in reasons:
                log.warning("attention falls to %s: %s", backend.name, passed_over)
            return _CLASSES[backend]
        reasons.append(f"{backend.name}: {reason}")
    raise ValueError(f"no attention backend for this layer: {' · '.join(reasons)}")


def _refusal(backend: AttentionBackendEnum, head_size: int, dtype: torch.dtype) -> str | None:
    if not dtype.is_floating_point or head_size < 1:
        return f"found head_size {head_size} and {dtype}, wanted a positive size and a floating-point dtype"
    if backend is AttentionBackendEnum.TORCH_SDPA:
        return None
    if not any(dtype in spec.dtypes and (spec.head_dims is None or head_size in spec.head_dims) for spec in KERNELS):
        return f"no kernel takes head_size {head_size} in {dtype}"
    return None
