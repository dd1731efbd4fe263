"""A driver and a compiler without a GPU: they answer, and keep what they were asked."""
from __future__ import annotations

import torch

from pack.kernels.cuda_sm90.cache import Cache
from pack.kernels.cuda_sm90.driver import Driver
from pack.kernels.cuda_sm90.loader import Loader
from pack.kernels.cuda_sm90.nvrtc import NvrtcError


class FakeCuda:
    """libcuda: answers like it, refuses the calls named in `broken` with that code."""

    def __init__(self, absent=(), **broken):
        self.broken, self.calls = broken, []
        for name in ("cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent",
                     "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuTensorMapEncodeTiled",
                     "cuLaunchKernel"):
            if name not in absent:
                setattr(self, name, lambda *args, name=name: self._answer(name, args))

    def _answer(self, name, args):
        self.calls.append((name, args))
        code = self.broken.get(name, 0)
        return code(*args) if callable(code) else code

    def cuGetErrorString(self, code, text):
        text._obj.value = {209: b"no kernel image is available", 1: b"invalid argument"}.get(code)
        return 0 if text._obj.value else 1


class FakeNvrtc:
    def __init__(self, error=None):
        self.error, self.compiled = error, 0

    def compile(self, source, name, options):
        if self.error:
            raise NvrtcError(self.error)
        self.compiled += 1
        return b"cubin from NVRTC", ""


def loader(tmp_path, cuda=None, compiler=None, bundled=None):
    return Loader(lambda: Driver(cuda or FakeCuda()), lambda: compiler or FakeNvrtc(), Cache(tmp_path / "disk"),
                  Cache(bundled or tmp_path / "bundled"))


def answer(value):
    """A driver call that writes `value` through its first argument."""
    def call(pointer, *rest):
        pointer._obj.value = value
        return 0
    return call


def names(cuda):
    return [name for name, _ in cuda.calls]


def operands(dim=128):
    q, k, v = (torch.randn(1, 192, 2, dim).bfloat16() for _ in range(3))
    indices = torch.arange(3, dtype=torch.int32).expand(1, 2, 3, 3)
    return q, k, v, indices, torch.full((1, 2, 3), 3, dtype=torch.int32), torch.full((3,), 64, dtype=torch.int32)
