"""One launch of the kernel on torch's current stream."""
from __future__ import annotations

import ctypes
import math
from contextlib import nullcontext

import torch

from ..spec import BLOCK, KernelUnusable
from .driver import DriverError
from .loader import LOADER, Loader, constant
from .tensor_map import fits, layout

SMALLEST_SCALE = 1e-30
"""The kernel multiplies -inf, the score of a key that is not there, with the scale: 0 would make that NaN."""


def run(q, k, v, indices, counts, block_sizes, scale, return_lse, loader: Loader = LOADER):
    """Contract and shapes: `kernels.block_sparse_attention`. Reads q, k and v where they lie, and copies those whose
    address or strides the copy engine does not take (multiples of 16 bytes, no dimension expanded).

    Raises KernelUnusable when the kernel cannot be loaded or the driver refuses the launch.
    """
    batch, slots, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, slots), dtype=torch.float32, device=q.device) if return_lse else None
    if out.numel() == 0 or k.shape[1] == 0 or indices.shape[3] == 0:
        return out.zero_(), None if lse is None else lse.fill_(-math.inf)
    q, k, v, scale = readable(q, k, v, scale)
    block_sizes = block_sizes.contiguous()
    dtype = str(q.dtype).removeprefix("torch.")
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        device = torch.cuda.current_device() if q.is_cuda else 0
        stream = torch.cuda.current_stream().cuda_stream if q.is_cuda else 0
        function, driver = loader.function(device, dim, dtype), loader.driver()
        try:
            maps = [driver.encode(x.data_ptr(), dtype, layout(x.shape, x.stride())) for x in (q, k, v)]
            driver.launch(function, grid(batch, heads, slots), constant("THREADS", dim),
                          constant("SHARED_BYTES", dim), stream,
                          arguments(maps, out, lse, indices, counts, block_sizes, slots, k.shape[1], scale))
        except DriverError as error:
            shapes = ", ".join(f"{list(x.shape)} with strides {x.stride()}" for x in (q, k, v))
            raise KernelUnusable(f"the driver refused a launch over {shapes}: {error}") from None
    return out, lse


def readable(q, k, v, scale: float):
    """The same attention with tensors that the copy engine can read and a scale above 0."""
    if scale < 0:
        q, scale = -q, -scale
    q, k, v = (x if fits(x) else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    return q, k, v, max(scale, SMALLEST_SCALE)


def grid(batch: int, heads: int, slots: int) -> tuple[int, int, int]:
    return -(-slots // (2 * BLOCK)), heads, batch


def arguments(maps, out, lse, indices, counts, block_sizes, query_slots: int, key_slots: int, scale: float) -> list:
    """The kernel's parameters in order, as ctypes values."""
    pointers = (out.data_ptr(), None if lse is None else lse.data_ptr(), indices.data_ptr(), counts.data_ptr(),
                block_sizes.data_ptr())
    return [*maps, *map(ctypes.c_void_p, pointers), *map(ctypes.c_longlong, (*indices.stride(), *counts.stride())),
            ctypes.c_int(indices.shape[3]), ctypes.c_int(query_slots // BLOCK), ctypes.c_int(key_slots // BLOCK),
            ctypes.c_float(scale * math.log2(math.e))]
