"""Tensors of a checkpoint for ComfyUI, read once and at the cost of one copy."""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import comfy.memory_management
import comfy.utils
from torch import Tensor

from ...checkpoints.mapped import MappedFile, ReleasingPages
from ...checkpoints.source import Checkpoint


def read_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> tuple[dict[str, Tensor], AbstractContextManager]:
    """(name -> tensor, a context to copy them in, which frees each tensor's pages once it is copied).

    Under ComfyUI's dynamic VRAM, and where it was told not to map files, ComfyUI's own reader is used: the first
    streams from the file later on, the second copies.
    """
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in names:
        by_file[checkpoint.tensors[name].file].append(name)
    if getattr(comfy.memory_management, "aimdo_enabled", False) or getattr(comfy.utils, "DISABLE_MMAP", False):
        tensors = {}
        for file, wanted in by_file.items():
            content = comfy.utils.load_torch_file(str(file), safe_load=True)
            tensors.update({name: content[name] for name in wanted})
        return tensors, nullcontext()
    mapped = {file: MappedFile(file) for file in by_file}
    tensors = {name: mapped[file].tensor(checkpoint.tensors[name].info)
               for file, wanted in by_file.items() for name in wanted}
    return tensors, ReleasingPages(list(mapped.values()))
