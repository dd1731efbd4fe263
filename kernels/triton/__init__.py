"""Triton kernels for NVIDIA GPUs from sm_80 on. Importing this package does not import triton."""
from __future__ import annotations

import importlib.util

import torch

from ..spec import KernelSpec


def _missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton, on Windows triton-windows)"
    return None


def _load():
    from .block_sparse import run
    return run


SPEC = KernelSpec(
    name="triton",
    load=_load,
    device_types=("cuda",),
    auto_device_types=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=(64, 128),
    min_capability=(8, 0),
    missing=_missing,
)
