"""The CUDA kernel's own text on a CPU: its hardware section is replaced by an emulator and built with g++.

Goes through the pack's launcher and driver down to the calls of libcuda, so tensor maps, argument order, grid and
copies are those of a real launch. `sm90_calls.inc`, `sm90_machine.inc` and `sm90_instructions.inc` are the emulator.
"""
from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import tensor_map_rules
from pack.kernels.cuda_sm90 import launch, loader
from pack.kernels.cuda_sm90.driver import Driver

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".cache" / "emulated_sm90"
BEGIN, END = "// The machine: everything below", "// The kernel, in terms of the above."
FLAGS = ["-std=c++17", "-w", "-Wno-psabi", "-U_FORTIFY_SOURCE", "-fno-gnu-unique", "-fPIC"]
INVALID_VALUE = 1
COUNTERS = ("rescales", "votes", "absent", "copies", "bytes", "clears", "products", "tries")
"""`struct Counters` of the machine: rescales that warps made and votes on them, times that -inf was asked for, copies
and their bytes, 16-byte stores of zeros, wgmma instructions of a warp, tries of a wait."""


def unavailable() -> str | None:
    return None if shutil.which("g++") else "no g++ to build the emulator"


def build(head_dim: int, dtype: str, source: str) -> ctypes.CDLL:
    """The kernel and the machine, each compiled by itself: most sources differ in the kernel alone."""
    constants, rest = source.split(BEGIN)
    calls, machine, instructions = (Path(__file__).with_name(f"sm90_{name}.inc").read_text()
                                    for name in ("calls", "machine", "instructions"))
    defines = [f"-DHEAD_DIM={head_dim}", f"-DHALF={int(dtype == 'float16')}"]
    objects = [_made("o", ["-O1", "-c", *FLAGS, *defines], constants + calls + rest.split(END)[1]),
               _made("o", ["-O2", "-c", *FLAGS, *defines], constants + calls + machine + instructions)]
    return ctypes.CDLL(str(_made("so", ["-shared", *map(str, objects)])))


def _made(suffix: str, options: list[str], text: str = "") -> Path:
    """What g++ makes of `text`, kept under a name that changes with it."""
    path = FOLDER / f"{hashlib.sha256((text + ' '.join(options)).encode()).hexdigest()[:24]}.{suffix}"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(f".{os.getpid()}")
        subprocess.run(["g++", *options, *(["-x", "c++", "-"] if text else []), "-o", new], input=text, text=True,
                       check=True)
        os.replace(new, path)
    return path


class EmulatedCuda:
    """libcuda: refuses what the driver API refuses, and runs a launch on the CPU.

    seed: another one is another order of events. heeds_hints, clock_step: `emulate` of the machine.
    """

    def __init__(self, seed: int = 0, heeds_hints: bool = True, clock_step: int = 0):
        self.seed, self.heeds_hints, self.clock_step = seed, heeds_hints, clock_step
        self.counted = dict.fromkeys(COUNTERS, 0)
        self.library, self._maps, self._reason = None, [], ""

    def cuTensorMapEncodeTiled(self, encoded, dtype, rank, address, sizes, strides, box, steps, *modes):
        self._reason = tensor_map_rules.refusal(encoded, dtype, rank, address, sizes, strides, box, steps, *modes)
        if self._reason:
            return INVALID_VALUE
        described = (ctypes.c_int64 * 16)(address.value, *sizes, tensor_map_rules.ELEMENT_BYTES[dtype.value], *strides,
                                          *box)
        self._maps.append(described)
        ctypes.memmove(encoded, (ctypes.c_int64 * 16)(ctypes.addressof(described)), ctypes.sizeof(encoded))
        return 0

    def cuLaunchKernel(self, library, x, y, z, threads, threads_y, threads_z, shared_bytes, stream, parameters, extra):
        self._reason = tensor_map_rules.launch_refusal((x, y, z), (threads, threads_y, threads_z), shared_bytes)
        if self._reason:
            return INVALID_VALUE
        self.library, message = library, ctypes.create_string_buffer(256)
        failed = library.emulate(ctypes.c_uint64(self.seed), (ctypes.c_int * 3)(x.value, y.value, z.value), parameters,
                                 ctypes.c_int(self.heeds_hints), ctypes.c_uint(self.clock_step), message)
        counts = (ctypes.c_long * len(COUNTERS))()
        library.counted(counts)
        self.counted = {name: self.counted[name] + n for name, n in zip(COUNTERS, counts)}
        if failed:
            raise RuntimeError(message.value.decode())
        return 0

    def cuGetErrorString(self, code, text):
        text._obj.value = f"invalid argument: {self._reason}".encode()
        return 0


class EmulatedLoader:
    def __init__(self, cuda: EmulatedCuda | None = None, source: str | None = None):
        self._driver, self._source = Driver(cuda or EmulatedCuda()), source or loader.source()

    def driver(self):
        return self._driver

    def function(self, device, head_dim, dtype):
        return build(head_dim, dtype, self._source)


def run(*operands, seed: int = 0, source: str | None = None, cuda: EmulatedCuda | None = None, **named):
    """`run` of a kernel, on CPU tensors. Raises RuntimeError when threads dead-lock or break a rule of the machine."""
    return launch.run(*operands, **named, loader=EmulatedLoader(cuda or EmulatedCuda(seed), source))


def descriptors(library: ctypes.CDLL, values: bool) -> list[int]:
    """The 64-bit matrix descriptors of values or keys that a built kernel has used in this process."""
    found = (ctypes.c_uint64 * 4096)()
    return list(found[:library.descriptors(int(values), found, len(found))])
