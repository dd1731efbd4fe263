"""Launches of the kernel on torch's current stream."""
from __future__ import annotations

import ctypes
import math
from contextlib import nullcontext

import torch

from ..spec import BLOCK, KernelUnusable
from ..tile_grid import TileGrid
from .boxes import NO_BOXES, Boxes, Coarse, Start, box_of, boxes_of
from .driver import NO_MAP, Driver, DriverError
from .loader import LOADER, Loader, constant
from .tensor_map import box_layout, fits, packed_layout

SMALLEST_SCALE = 1e-30
"""The kernel multiplies -inf, the score of a key that is not there, with the scale: 0 would make that NaN."""


def run(q, k, v, indices, counts, block_sizes, scale, return_lse, token_rows=None, gate=None, coarse=None,
        blocks_per_tile=1, tile_grid=None, far=None, far_lse=None, *, loader: Loader = LOADER, out=None, lse=None):
    """Contract and shapes: `kernels.block_sparse_attention`; token_rows only with a tile_grid that `boxes.takes`.

    Reads q, k and v where they lie, and copies those whose address or strides the copy engine does not take
    (multiples of 16 bytes, no dimension expanded). Of tokens that are not the grid's it makes packed copies.
    Raises KernelUnusable when the kernel cannot be loaded or the driver refuses the launch.
    """
    batch, tokens, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if return_lse and lse is None:
        lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    nothing_listed = token_rows is None and (k.shape[1] == 0 or indices.shape[3] == 0)
    if out.numel() == 0 or nothing_listed and far is None:
        return out.zero_(), None if lse is None else lse.fill_(-math.inf)
    indices = indices[..., :0] if nothing_listed else indices
    grid = None if token_rows is None else TileGrid(*tile_grid)
    q, k, v, gate, scale = readable(q, k, v, scale, gate, grid)
    block_sizes = block_sizes.contiguous()
    dtype = str(q.dtype).removeprefix("torch.")
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        device = torch.cuda.current_device() if q.is_cuda else 0
        stream = torch.cuda.current_stream().cuda_stream if q.is_cuda else 0
        function, driver = loader.function(device, dim, dtype), loader.driver()
        tensors = q, k, v, out, lse, indices, counts, block_sizes, scale
        try:
            if grid is None:
                launches = [packed_launch(driver, dtype, *tensors, _start(far, far_lse, blocks_per_tile))]
            else:
                launches = grid_launches(driver, dtype, *tensors, token_rows, gate, coarse, blocks_per_tile, grid, far,
                                         far_lse)
            for shape, arguments in launches:
                driver.launch(function, shape, constant("THREADS", dim), constant("SHARED_BYTES", dim), stream,
                              arguments)
        except DriverError as error:
            shapes = ", ".join(f"{list(x.shape)} with strides {x.stride()}" for x in (q, k, v))
            raise KernelUnusable(f"the driver refused a launch over {shapes}: {error}") from None
    return out, lse


def readable(q, k, v, scale: float, gate=None, grid: TileGrid | None = None):
    """The same attention with tensors that the kernel can read and a scale above 0 -> q, k, v, gate, scale."""
    if scale < 0:
        q, scale = -q, -scale
    if gate is not None and not in_pairs(gate):
        gate = gate.clone(memory_format=torch.contiguous_format)
    q, k, v = (x if fits(x, packed_layout(x) if grid is None else box_layout(x, grid, box_of(grid.tile)))
               else x.clone(memory_format=torch.contiguous_format) for x in (q, k, v))
    return q, k, v, gate, max(scale, SMALLEST_SCALE)


def in_pairs(x) -> bool:
    """Whether two neighbouring elements of `x` can always be read at once."""
    return x.data_ptr() % (2 * x.element_size()) == 0 and all(
        stride % 2 == 0 for stride, size in zip(x.stride()[:-1], x.shape[:-1], strict=True) if size > 1)


def packed_launch(driver: Driver, dtype: str, q, k, v, out, lse, indices, counts, block_sizes, scale, start: Start):
    """(launch grid, arguments) where the blocks of q, k and v lie one after the other."""
    maps = [driver.encode(x.data_ptr(), dtype, packed_layout(x)) if x.numel() else NO_MAP for x in (q, k, v)]
    return _launch([NO_MAP] * 3 + maps, NO_BOXES, Coarse(blocks_per_tile=1), start, out, lse, indices, counts,
                   block_sizes, None, indices.shape[2], q.shape[1] // BLOCK, k.shape[1] // BLOCK, scale)


def grid_launches(driver: Driver, dtype: str, q, k, v, out, lse, indices, counts, block_sizes, scale, token_rows, gate,
                  coarse, blocks_per_tile: int, grid: TileGrid, far=None, far_lse=None):
    """(launch grid, arguments) of every batch, its tokens read in boxes: a tensor map has no dimension left for it."""
    boxes, box, blocks = boxes_of(grid), box_of(grid.tile), token_rows.numel() // BLOCK
    packed_rows = token_rows[boxes.blocks * BLOCK:]
    readable_rows = packed_rows.clamp(min=0)
    packed = [x.index_select(1, readable_rows) for x in (q, k, v)] if packed_rows.numel() else []
    for b in range(q.shape[0]):
        def one(x, b=b):
            return None if x is None else x[b:b + 1]

        of_boxes = [driver.encode(x.data_ptr() + grid.prefix * x.stride(1) * x.element_size(), dtype,
                                  box_layout(x, grid, box)) for x in map(one, (q, k, v))]
        of_packed = [driver.encode(x.data_ptr(), dtype, packed_layout(x)) for x in map(one, packed)] or [NO_MAP] * 3
        yield _launch(of_boxes + of_packed, boxes, _coarse(one(gate), one(coarse), blocks_per_tile),
                      _start(one(far), one(far_lse), blocks_per_tile), one(out), one(lse),
                      one(indices), one(counts), block_sizes, packed_rows, indices.shape[2], blocks, blocks, scale)


def _coarse(gate, coarse, blocks_per_tile: int) -> Coarse:
    if gate is None:
        return Coarse(blocks_per_tile=1)
    return Coarse(gate.data_ptr(), coarse.data_ptr(), *gate.stride()[1:3], *coarse.stride()[1:3], coarse.shape[2],
                  blocks_per_tile)


def _start(far, far_lse, blocks_per_tile: int) -> Start:
    if far is None:
        return Start(blocks_per_tile=1)
    return Start(far.data_ptr(), far_lse.data_ptr(), *far.stride()[:3], *far_lse.stride(), far.shape[2],
                 blocks_per_tile)


def _launch(maps, boxes: Boxes, coarse: Coarse, start: Start, out, lse, indices, counts, block_sizes, packed_rows,
            lists: int, query_blocks: int, key_blocks: int, scale: float):
    """The launch grid, and the kernel's parameters in order as ctypes values."""
    pointers = [None if x is None or x.numel() == 0 else x.data_ptr()
                for x in (out, lse, indices, counts, block_sizes, packed_rows)]
    batch, tokens, heads, _ = out.shape
    return (-(-query_blocks // 2), heads, batch), [
        *maps, boxes, coarse, start, *map(ctypes.c_void_p, pointers),
        *map(ctypes.c_longlong, (*indices.stride(), *counts.stride())),
        *map(ctypes.c_int, (indices.shape[3], lists, query_blocks, key_blocks, tokens)),
        ctypes.c_float(scale * math.log2(math.e))]
