"""The kernel for H100 and H200 (wgmma, TMA, warp-specialised), as CUDA text that is compiled where it runs.

Importing this package neither opens a library nor compiles anything.
"""
from __future__ import annotations

from pathlib import Path

import torch

from .. import gathered, tile_grid
from ..spec import KernelSpec, files_below
from .boxes import takes


def _load():
    from .launch import run
    return run


def _origin() -> str:
    from .loader import LOADER
    return LOADER.steps()


SPEC = KernelSpec(
    name="cuda_sm90",
    load=_load,
    device_types=("cuda",),
    auto_device_types=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=(64, 128),
    capabilities=((9, 0),),
    files=(*files_below(Path(__file__).parent, "*.py", "*.cu", "bundled/*"), Path(gathered.__file__),
           Path(tile_grid.__file__)),
    proven_apart=True,
    origin=_origin,
    gathers=takes,
)
