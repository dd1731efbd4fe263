"""What a cubin says of itself, read with the tools that triton brings: machine code, parameters, resources."""
from __future__ import annotations

import re
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Parameter(NamedTuple):
    offset: int
    size: int


class Resources(NamedTuple):
    registers: int
    stack_bytes: int
    shared_bytes: int
    local_bytes: int


def tools() -> Path | None:
    """Where nvdisasm and cuobjdump are; None without a triton that brings them."""
    try:
        import triton
    except ImportError:
        return None
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return folder if (folder / "nvdisasm").exists() and (folder / "cuobjdump").exists() else None


@cache
def _printed(cubin: bytes, tool: str, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        return subprocess.run([tools() / tool, option, path], check=True, capture_output=True, text=True).stdout


def disassembled(cubin: bytes) -> str:
    """The listing of nvdisasm, labels included; made once for the same bytes."""
    return _printed(cubin, "nvdisasm", "-c")


def parameters(cubin: bytes) -> list[Parameter]:
    """The kernel's parameters in their order (EIATTR_KPARAM_INFO)."""
    printed = _printed(cubin, "cuobjdump", "-elf")
    found = re.findall(r"Ordinal : (0x\w+)\s+Offset\s+: (0x\w+)\s+Size\s+: (0x\w+)", printed)
    placed = sorted(tuple(int(number, 16) for number in row) for row in found)
    return [Parameter(offset, size) for _, offset, size in placed]


def resources(cubin: bytes) -> Resources:
    printed = _printed(cubin, "cuobjdump", "--dump-resource-usage")
    return Resources(*map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", printed).groups()))


def sections(cubin: bytes) -> set[str]:
    """Names of the sections that hold something."""
    return set(re.findall(r"\s(\.\S+)$", _printed(cubin, "cuobjdump", "-elf"), re.MULTILINE))
