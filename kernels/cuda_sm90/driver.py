"""The CUDA driver through ctypes: load a cubin, describe tensors to the copy engine, launch.

Every call needs the device's primary context current on this thread: `Driver.make_current`. Signatures: CUDA driver
API reference, cuda.h.
"""
from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import lru_cache

from .tensor_map import Layout

MAP_BYTES, MAP_ALIGNMENT = 128, 128
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_DATA_TYPES = {"float16": 6, "bfloat16": 9}
_INTERLEAVE_NONE, _SWIZZLE_128B, _FILL_ZERO = 0, 3, 0
_L2_PROMOTIONS = {128: 2, 256: 3}


class DriverError(RuntimeError):
    """A driver call failed, or the driver has no such call; the message names both call and reason."""


class Driver:
    """libcuda. Raises DriverError when there is none."""

    def __init__(self, library=None):
        self._library = library if library is not None else _open()
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self.encode = lru_cache(maxsize=1024)(self._encode)
        """`_encode`, which depends on nothing but its arguments: layers whose tensors lie alike share their maps."""

    def _call(self, name: str, *arguments) -> None:
        try:
            function = getattr(self._library, name)
        except AttributeError:
            raise DriverError(f"the driver has no {name}: it is older than CUDA 12, update it") from None
        if code := function(*arguments):
            raise DriverError(f"{name} failed: {self._text(code)}")

    def _text(self, code: int) -> str:
        text = ctypes.c_char_p()
        known = self._library.cuGetErrorString(code, ctypes.byref(text)) == 0 and text.value
        return f"{text.value.decode()} (CUDA error {code})" if known else f"CUDA error {code}"

    def make_current(self, device: int) -> None:
        """There is a current context on this thread: the one that was, or else the device's primary one.

        `torch.cuda.device(...)` makes none in a thread whose device it need not change.
        """
        current = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(current))
        if current.value:
            return
        if device not in self._contexts:
            handle, context = ctypes.c_int(), ctypes.c_void_p()
            self._call("cuDeviceGet", ctypes.byref(handle), ctypes.c_int(device))
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle)
            self._contexts[device] = context
        self._call("cuCtxSetCurrent", self._contexts[device])

    def load(self, cubin: bytes, kernel: str, shared_bytes: int) -> ctypes.c_void_p:
        """The function `kernel` of a cubin, allowed to use `shared_bytes` of dynamic shared memory."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), cubin)
        self._call("cuModuleGetFunction", ctypes.byref(function), module, kernel.encode())
        self._call("cuFuncSetAttribute", function, ctypes.c_int(_MAX_DYNAMIC_SHARED_SIZE_BYTES),
                   ctypes.c_int(shared_bytes))
        return function

    def _encode(self, address: int, dtype: str, layout: Layout) -> ctypes.Array:
        """A tensor map. It holds the address: another tensor has another one. Not to be changed."""
        rank = len(layout.sizes)
        encoded = _aligned_map()
        self._call(
            "cuTensorMapEncodeTiled", encoded, ctypes.c_int(_DATA_TYPES[dtype]), ctypes.c_uint32(rank),
            ctypes.c_void_p(address), (ctypes.c_uint64 * rank)(*layout.sizes),
            (ctypes.c_uint64 * (rank - 1))(*layout.strides), (ctypes.c_uint32 * rank)(*layout.box),
            (ctypes.c_uint32 * rank)(*[1] * rank), ctypes.c_int(_INTERLEAVE_NONE), ctypes.c_int(_SWIZZLE_128B),
            ctypes.c_int(_L2_PROMOTIONS[layout.row_bytes]), ctypes.c_int(_FILL_ZERO))
        return encoded

    def launch(self, function, grid: Sequence[int], threads: int, shared_bytes: int, stream: int, arguments) -> None:
        """arguments: ctypes values in the order of the kernel's parameters."""
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(x) for x in arguments))
        self._call("cuLaunchKernel", function, *map(ctypes.c_uint, grid), ctypes.c_uint(threads), ctypes.c_uint(1),
                   ctypes.c_uint(1), ctypes.c_uint(shared_bytes), ctypes.c_void_p(stream), pointers, None)


def _open():
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        return (ctypes.WinDLL if os.name == "nt" else ctypes.CDLL)(name)
    except OSError as error:
        raise DriverError(f"no CUDA driver: {error}") from None


def _aligned_map() -> ctypes.Array:
    room = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNMENT)
    return (ctypes.c_char * MAP_BYTES).from_buffer(room, -ctypes.addressof(room) % MAP_ALIGNMENT)


NO_MAP = _aligned_map()
"""In place of a tensor map that the kernel does not use."""
