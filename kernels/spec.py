"""What a kernel can run, as data, and the sentence that says why it cannot.

One `KernelSpec` per kernel. `refusal(call)` is the single predicate: choosing, explaining, raising and
skipping tests all use its sentence.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch

from .tile_grid import BLOCK, TileGrid

__all__ = ["BLOCK", "Call", "KernelSpec", "KernelUnusable", "NoKernel", "files_below", "fingerprint", "listed"]

CARDS = {(8, 0): "RTX 30 series", (9, 0): "H100 or H200"}
"""What a user calls the cards that begin with a compute capability, for those that a kernel may need."""
DEVICES = {"cpu": "CPU", "cuda": "NVIDIA card", "rocm": "AMD card", "mps": "Apple GPU", "xpu": "Intel GPU"}
"""What a user calls a device by `Call.device_type`."""


@dataclass(frozen=True)
class Call:
    """The facts about one attention call that decide which kernel can run it."""

    device_type: str
    """torch's name for the device, but "rocm" for an AMD GPU, which torch calls cuda."""
    capability: tuple[int, int] | None
    """CUDA compute capability of the device that holds the tensors, None off CUDA."""
    dtype: torch.dtype
    head_dim: int
    device: torch.device | None = None
    """Where the tensors lie. None: a question about data only, for which nothing is run."""

    @classmethod
    def of(cls, q: torch.Tensor) -> Call:
        """The call that `q: [B, S, H, D]` makes, on the device it lies on."""
        return cls.on(q.device, q.dtype, q.shape[-1])

    @classmethod
    def on(cls, device: torch.device, dtype: torch.dtype, head_dim: int) -> Call:
        """The call that tensors of this device, dtype and head_dim would make."""
        if device.type != "cuda":
            return cls(device.type, None, dtype, head_dim, device)
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if torch.version.hip is not None:
            return cls("rocm", None, dtype, head_dim, device)
        return cls("cuda", torch.cuda.get_device_capability(device), dtype, head_dim, device)

    @property
    def card(self) -> str:
        """What a user calls the device."""
        if self.device is not None and self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        kind = DEVICES.get(self.device_type, self.device_type)
        return kind if self.capability is None else f"{kind} of compute capability {_cc(self.capability)}"

    @property
    def words(self) -> str:
        return f"{_dtype(self.dtype)}, head_dim {self.head_dim}"


@dataclass(frozen=True)
class KernelSpec:
    """A kernel's name, its limits, and how to load it.

    `load()` returns `run(q, k, v, indices, counts, block_sizes, scale, return_lse, *, out, lse) -> (out, lse | None)`
    and is the only place that imports what the kernel needs; `out` and `lse` are where to write, made when None.
    `missing()` says what is not installed, or None. A kernel also takes token_rows to far_lse of
    `kernels.block_sparse_attention` in their order; one that does not gather finds None for token_rows to
    coarse. Kernels of tile means and of selections: `kernels.tile_ops`.
    """

    name: str
    load: Callable[[], Callable]
    device_types: tuple[str, ...]
    auto_device_types: tuple[str, ...]
    """Where `auto` may take it: never where it could only lose to dense attention."""
    dtypes: tuple[torch.dtype, ...]
    head_dims: tuple[int, ...] | None = None
    """None: any head_dim."""
    min_capability: tuple[int, int] | None = None
    capabilities: tuple[tuple[int, int], ...] | None = None
    """The only GPUs it is built for. None: any from `min_capability` on."""
    files: tuple[Path, ...] = ()
    """All that makes the kernel: text, launch code, tables, binaries. What has none is the specification itself and
    is not proven; any other kernel is proven on the card before it is used, again when one of them changes."""
    proves: str = "attention"
    """Which set of problems it has to solve, a name in `proof.SETS`."""
    proven_apart: bool = False
    """A fault of it would end the process, so it is proven in another one (`prove.py`)."""
    missing: Callable[[], str | None] = lambda: None
    origin: Callable[[], str] = lambda: ""
    """Where the code that ran came from, and why an earlier source of it was skipped; empty before the first use."""
    exact: bool = True
    """Whether it computes attention up to the rounding of its dtype. "auto" takes no other unless it is asked to."""
    sums_in_half: Callable[[Call], bool] = field(default=lambda call: False)
    """Whether it sums weights times values of such a call in float16, which its proof then allows for."""
    gathers: Callable[[TileGrid | None], bool] = field(default=lambda grid: False)
    """Whether it reads tokens of such a grid (None: in any order) where the sequence has them, or is given copies."""

    def refusal(self, call: Call, auto: bool = False) -> str | None:
        """Why this kernel cannot run `call`, by its data alone, or None. `auto` also asks whether it could pay.

        What a user cannot change comes first, what can be installed last: nobody installs a thing in vain.
        """
        if wanted := self._other_card(call):
            return f"your {call.card} cannot run it (needs {wanted})"
        if call.dtype not in self.dtypes:
            return f"it computes in {_any_of([_dtype(x) for x in self.dtypes])}, this model in {_dtype(call.dtype)}"
        if self.head_dims is not None and call.head_dim not in self.head_dims:
            return f"it takes heads of {_any_of(self.head_dims)} channels, this model has {call.head_dim}"
        if absent := self.missing():
            return absent
        if auto and call.device_type not in self.auto_device_types:
            return f"slower than dense attention on your {call.card}"
        return None

    def _other_card(self, call: Call) -> str | None:
        """The cards that it needs where it has none of them, in a user's words."""
        if call.device_type not in self.device_types:
            return _any_of([_with_article(DEVICES.get(kind, kind)) for kind in self.device_types])
        if call.capability is None:
            return None
        if self.capabilities and call.capability not in self.capabilities:
            return _any_of([_cards(x) for x in self.capabilities])
        if self.min_capability and call.capability < self.min_capability:
            return f"{_cards(self.min_capability)} or newer"
        return None


class KernelUnusable(RuntimeError):
    """A kernel that fits a call cannot be loaded, or was proven wrong on this card; the message says why."""


class NoKernel(RuntimeError):
    """No kernel can run a call. `reasons`: kernel -> why not."""

    def __init__(self, reasons: Mapping[str, str]):
        super().__init__(f"no kernel for this call: {listed(reasons)}")
        self.reasons = dict(reasons)


def listed(reasons: Mapping[str, str]) -> str:
    """Kernels with why they cannot run, each reason once."""
    kernels: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        kernels.setdefault(reason, []).append(name)
    return " · ".join(f"{', '.join(names)}: {reason}" for reason, names in kernels.items())


def files_below(folder: Path, *patterns: str) -> tuple[Path, ...]:
    """The files of a folder that match, in an order that does not depend on the machine."""
    return tuple(sorted({path for pattern in patterns for path in folder.glob(pattern)}, key=lambda path: path.name))


@cache
def fingerprint(files: tuple[Path, ...]) -> str:
    """SHA-256 over names and contents, the same for any line endings of a text."""
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        if b"\0" not in content:
            content = content.replace(b"\r\n", b"\n")
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _cc(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)


def _cards(capability: tuple[int, int]) -> str:
    return CARDS.get(capability, f"compute capability {_cc(capability)}")


def _with_article(device: str) -> str:
    return f"{'an' if device[0] in 'AEIN' else 'a'} {device}"


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _any_of(names: Sequence) -> str:
    return " or ".join(map(str, names))
