"""Triton kernels for NVIDIA GPUs from sm_80 on. Importing this package does not import triton."""
from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import torch

from .. import gathered, tile_grid
from ..spec import KernelSpec
from .configs import sums_in_half
from .install import advice, too_old

HERE = Path(__file__).parent


def _missing() -> str | None:
    # Asked in every call; looking through the search path takes longer than all the rest of a choice.
    if sys.modules.get("triton") is None and importlib.util.find_spec("triton") is None:
        return advice(torch.__version__)
    return too_old()


def _load():
    from .block_sparse import run
    return run


def _load_int8():
    from .int8_scores import run
    return run


def _load_means():
    from .tile_means import run
    return run


def _load_select():
    from .select_tiles import run
    return run


MAX_TILES = 4096
"""The longest row of tiles to select from: 4 warps hold it in their registers."""

SPEC = KernelSpec(
    name="triton",
    load=_load,
    device_types=("cuda",),
    auto_device_types=("cuda",),
    dtypes=(torch.bfloat16, torch.float16),
    head_dims=(64, 128),
    min_capability=(8, 0),
    files=(HERE / "block_sparse.py", HERE / "quantise.py", HERE / "configs.py", Path(gathered.__file__),
           Path(tile_grid.__file__)),
    missing=_missing,
    gathers=lambda grid: True,
)

INT8_SPEC = replace(SPEC, name="triton_int8", load=_load_int8, exact=False,
                    sums_in_half=lambda call: sums_in_half(call.capability),
                    files=(*SPEC.files, HERE / "int8_scores.py"))
MEANS_SPEC = replace(SPEC, name="triton_tile_means", proves="tile means", load=_load_means,
                     files=(HERE / "tile_means.py",))
SELECT_SPEC = replace(SPEC, name="triton_select_tiles", proves="tile selection", load=_load_select,
                      dtypes=(torch.float32,), files=(HERE / "select_tiles.py",))
