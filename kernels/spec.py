"""What a kernel can run, as data, and the sentence that says why it cannot.

One `KernelSpec` per kernel. `refusal(call)` is the single predicate: choosing, explaining, raising and
skipping tests all use its sentence.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import proven

if TYPE_CHECKING:
    from .tile_grid import TileGrid

BLOCK = 64
"""Token slots in one block: the granularity at which every kernel selects queries and keys."""


@dataclass(frozen=True)
class Call:
    """The facts about one attention call that decide which kernel can run it."""

    device_type: str
    """torch's name for the device, but "rocm" for an AMD GPU, which torch calls cuda."""
    capability: tuple[int, int] | None
    """CUDA compute capability of the device that holds the tensors, None off CUDA."""
    dtype: torch.dtype
    head_dim: int

    @classmethod
    def of(cls, q: torch.Tensor) -> Call:
        """The call that `q: [B, S, H, D]` makes, on the device it lies on."""
        return cls.on(q.device, q.dtype, q.shape[-1])

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> Call:
        """The call that tensors of this device, dtype and head_dim would make."""
        if device.type != "cuda":
            return cls(device.type, None, dtype, head_dim)
        if torch.version.hip is not None:
            return cls("rocm", None, dtype, head_dim)
        return cls("cuda", torch.cuda.get_device_capability(device), dtype, head_dim)


@dataclass(frozen=True)
class KernelSpec:
    """A kernel's name, its limits, and how to load it.

    `load()` returns `run(q, k, v, indices, counts, block_sizes, scale, return_lse) -> (out, lse | None)` and is
    the only place that imports what the kernel needs. `missing()` says what is not installed, or None. A kernel
    that gathers also takes token_rows to tile_grid of `kernels.block_sparse_attention`.
    """

    name: str
    load: Callable[[], Callable]
    device_types: tuple[str, ...]
    auto_device_types: tuple[str, ...]
    """Where `auto` may take it: never where it would lose to dense attention."""
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...] | None = None
    """None: any head_dim."""
    min_capability: tuple[int, int] | None = None
    capabilities: tuple[tuple[int, int], ...] | None = None
    """The only GPUs it is built for. None: any from `min_capability` on."""
    source: Path | None = None
    """The file that is compiled for the GPU. `auto` takes the kernel only when this very text has a GPU result."""
    missing: Callable[[], str | None] = lambda: None
    origin: Callable[[], str] = lambda: ""
    """Where the code that ran came from, and why an earlier source of it was skipped; empty before the first use."""
    gathers: Callable[[TileGrid | None], bool] = lambda grid: False
    """Whether it reads tokens of such a grid (None: in any order) where the sequence has them, or is given copies."""

    def unproven(self) -> str | None:
        """Why the kernel is not taken unless asked for by name, or None when it is proven (see `proven.py`)."""
        return None if self.source is None else proven.unproven(self.name, self.source)

    def refusal(self, call: Call, auto: bool = False) -> str | None:
        """Why this kernel does not run `call`, or None when it does. `auto` also asks whether it is worth it."""
        if call.device_type not in self.device_types:
            return f"tensors are on {call.device_type}, needs {_any_of(self.device_types)}"
        if absent := self.missing():
            return absent
        if self.min_capability and call.capability is not None and call.capability < self.min_capability:
            return f"GPU is sm_{_cc(call.capability)}, needs sm_{_cc(self.min_capability)} or newer"
        if self.capabilities and call.capability is not None and call.capability not in self.capabilities:
            return f"GPU is sm_{_cc(call.capability)}, needs {_any_of([f'sm_{_cc(c)}' for c in self.capabilities])}"
        if call.dtype not in self.dtypes:
            return f"dtype {_dtype(call.dtype)} not in ({', '.join(map(_dtype, self.dtypes))})"
        if self.head_dims is not None and call.head_dim not in self.head_dims:
            return f"head_dim {call.head_dim} not in {self.head_dims}"
        if auto and call.device_type not in self.auto_device_types:
            return f"slower than dense attention on {call.device_type}; runs there only when chosen by name"
        if auto and (reason := self.unproven()):
            return (f'{reason}. Choose backend "{self.name}" by name to use it: it is tested against the reference '
                    "before its first use")
        return None


class KernelUnusable(RuntimeError):
    """A kernel that fits a call cannot be loaded, or failed its self-test; the message says why."""


class NoKernel(RuntimeError):
    """No kernel can run a call; the message holds one reason per kernel."""


def _cc(capability: tuple[int, int]) -> str:
    return "{}{}".format(*capability)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _any_of(names: tuple[str, ...]) -> str:
    return " or ".join(names)
