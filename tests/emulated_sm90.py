"""The CUDA kernel's own text on a CPU: its hardware section is replaced by sm90_machine.inc and built with g++.

Goes through the pack's launcher, so tensor maps, argument order, grid and copies are those of a real launch.
"""
from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

from pack.kernels.cuda_sm90 import launch, loader

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "emulated_sm90"
MACHINE = Path(__file__).with_name("sm90_machine.inc")
BEGIN, END = "// The machine: everything below", "// The kernel, in terms of the above."


def unavailable() -> str | None:
    return None if shutil.which("g++") else "no g++ to build the emulator"


def combined(source: str) -> str:
    """`source` with the emulator instead of its hardware section."""
    before, rest = source.split(BEGIN)
    return before + MACHINE.read_text() + rest.split(END)[1]


def build(head_dim: int, dtype: str, source: str) -> ctypes.CDLL:
    text = combined(source)
    command = ["g++", "-std=c++17", "-O1", "-w", "-Wno-psabi", "-shared", "-fPIC", f"-DHEAD_DIM={head_dim}",
               f"-DHALF={int(dtype == 'float16')}", "-x", "c++", "-"]
    path = FOLDER / (hashlib.sha256((text + " ".join(command)).encode()).hexdigest()[:24] + ".so")
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", made], input=text, text=True, check=True)
        os.replace(made, path)
    return ctypes.CDLL(str(path))


class EmulatedDriver:
    """Takes the launcher's calls. seed: another one is another order of events."""

    def __init__(self, seed: int = 0):
        self.seed, self._maps = seed, []

    def encode(self, address, dtype, layout):
        element_size = torch.tensor([], dtype=getattr(torch, dtype)).element_size()
        described = (ctypes.c_int64 * 16)(address, *layout.sizes, element_size, *layout.strides, *layout.box)
        self._maps.append(described)
        return (ctypes.c_int64 * 16)(ctypes.addressof(described))

    def launch(self, library, grid, threads, shared_bytes, stream, arguments):
        message = ctypes.create_string_buffer(256)
        pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        if library.emulate(ctypes.c_uint64(self.seed), (ctypes.c_int * 3)(*grid), pointers, message):
            raise RuntimeError(message.value.decode())


class EmulatedLoader:
    def __init__(self, seed: int = 0, source: str | None = None):
        self._driver, self._source = EmulatedDriver(seed), source or loader.source()

    def driver(self):
        return self._driver

    def function(self, device, head_dim, dtype):
        return build(head_dim, dtype, self._source)


def run(*operands, seed: int = 0, source: str | None = None, **named):
    """`run` of a kernel, on CPU tensors. Raises RuntimeError when threads dead-lock or break a rule of the machine."""
    return launch.run(*operands, **named, loader=EmulatedLoader(seed, source))
