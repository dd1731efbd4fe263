"""Tensors that are pages of their file: nothing is read before it is touched, and nothing needs to be read twice."""
from __future__ import annotations

import mmap
from pathlib import Path

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .safetensors_file import CheckpointError, TensorInfo

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
          "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool, "C64": torch.complex64}
DTYPES |= {name: getattr(torch, dtype) for name, dtype in (
    ("F8_E8M0", "float8_e8m0fnu"), ("F8_E4M3FNUZ", "float8_e4m3fnuz"), ("F8_E5M2FNUZ", "float8_e5m2fnuz"),
    ("U64", "uint64"), ("U32", "uint32"), ("U16", "uint16")) if hasattr(torch, dtype)}


class MappedFile:
    """A file as memory. Writing to a tensor changes private copies of its pages, never the file."""

    def __init__(self, path: Path):
        with open(path, "rb") as file:
            self.memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.path, self.size = path, len(self.memory)
        self.address = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()

    def tensor(self, info: TensorInfo) -> Tensor:
        """The tensor at a place of the file. Raises CheckpointError for a dtype that torch does not have."""
        if info.dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: found a tensor of dtype {info.dtype}, wanted one of "
                                  f"{', '.join(DTYPES)}")
        if info.numel == 0:
            return torch.empty(info.shape, dtype=DTYPES[info.dtype])
        with torch.inference_mode(False):      # such tensors alone count writes to them, see ReleasingPages
            return torch.frombuffer(self.memory, dtype=DTYPES[info.dtype], count=info.numel,
                                    offset=info.start).view(info.shape)


class ReleasingPages(TorchFunctionMode):
    """While active, a tensor's pages leave memory as soon as it has been copied to a place of its own.

    Loading then needs one model's worth of memory, not two. Pages that were written to stay. Does nothing where the
    system has no madvise (Windows): there, mapped pages make room by themselves.
    """

    COPIES = (torch.Tensor.clone, torch.clone, torch.Tensor.to)

    def __init__(self, files: list[MappedFile]):
        super().__init__()
        self.files = files if hasattr(mmap, "MADV_DONTNEED") else []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.copy_:
            self._release(args[1])
        elif func in self.COPIES and (result.device != args[0].device or result.data_ptr() != args[0].data_ptr()):
            self._release(args[0])
        return result

    def _release(self, tensor: Tensor) -> None:
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":
            return
        if tensor.is_inference() or tensor._version or not tensor.is_contiguous():
            return
        start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        for file in self.files:
            if file.address <= start < file.address + file.size:
                first = -(-(start - file.address) // mmap.PAGESIZE) * mmap.PAGESIZE
                last = (start - file.address + size) // mmap.PAGESIZE * mmap.PAGESIZE
                if last > first:
                    file.memory.madvise(mmap.MADV_DONTNEED, first, last - first)
                return
