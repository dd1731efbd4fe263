"""Which kernel sources have run correctly on a GPU: the one thing that lets `auto` take them.

An entry is added by hand from a committed file under benchmarks/results/, which `make bench-gpu` writes and a test
compares with this table. Any change of the source changes its hash, and the kernel is unproven again.
"""
from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple


class GpuResult(NamedTuple):
    """One kernel source that passed its tests on one kind of GPU."""

    kernel: str
    source_hash: str
    capability: tuple[int, int]
    result: str
    """File name under benchmarks/results/. The folder need not be installed."""


PROVEN: tuple[GpuResult, ...] = ()


@cache
def source_hash(source: Path) -> str:
    """SHA-256 of a source file, the same for any line endings."""
    return hashlib.sha256(source.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


def unproven(kernel: str, source: Path) -> str | None:
    """Why `auto` leaves this kernel alone, or None when its very source has a GPU result."""
    found = source_hash(source)
    if any((entry.kernel, entry.source_hash) == (kernel, found) for entry in PROVEN):
        return None
    return f"unproven: its source {found[:12]} has no GPU result yet"
