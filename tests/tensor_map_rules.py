"""What the driver refuses: rules of cuTensorMapEncodeTiled and cuLaunchKernel from the CUDA driver API reference."""
from __future__ import annotations

import ctypes

ELEMENT_BYTES = {6: 2, 9: 2}
"""CU_TENSOR_MAP_DATA_TYPE_FLOAT16 and _BFLOAT16."""
SWIZZLE_SPANS = {1: 32, 2: 64, 3: 128}
"""CU_TENSOR_MAP_SWIZZLE_32B, _64B, _128B: the most bytes along a box's innermost side."""
MAP_BYTES, MAP_ALIGNMENT = 128, 128
"""Of a CUtensorMap in cuda.h from CUDA 13 on; 64 before."""
MOST_SHARED_BYTES, MOST_THREADS, MOST_ROWS = 227 * 1024, 1024, 65535


def refusal(encoded, dtype, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill) -> str:
    """Why a tensor map is refused, or nothing. Arguments: those of cuTensorMapEncodeTiled as ctypes values."""
    return next(_broken(encoded, dtype.value, rank.value, address.value or 0, list(sizes), list(strides), list(box),
                        list(steps), interleave.value, swizzle.value, promotion.value, fill.value), "")


def _broken(encoded, dtype, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion, fill):
    if ctypes.sizeof(encoded) != MAP_BYTES:
        yield f"a map of {ctypes.sizeof(encoded)} bytes"
    if ctypes.addressof(encoded) % MAP_ALIGNMENT:
        yield f"a map at {ctypes.addressof(encoded):#x}, which is no multiple of {MAP_ALIGNMENT}"
    if dtype not in ELEMENT_BYTES:
        yield f"data type {dtype} is not one of {list(ELEMENT_BYTES)}"
        return
    if not 3 <= rank <= 5 or [len(sizes), len(strides), len(box), len(steps)] != [rank, rank - 1, rank, rank]:
        yield f"rank {rank} with {len(sizes)} sizes, {len(strides)} strides, {len(box)} sides and {len(steps)} steps"
    if not address or address % 16:
        yield f"address {address:#x} is no multiple of 16"
    for size in sizes:
        if not 0 < size <= 1 << 32:
            yield f"size {size} is not from 1 to 2^32"
    for stride in strides:
        if stride % 16 or not 0 < stride < 1 << 40:
            yield f"stride {stride} is no multiple of 16 from 16 to 2^40"
    for side in box:
        if not 0 < side <= 256:
            yield f"a box's side of {side} is not from 1 to 256"
    for step in steps:
        if not 0 < step <= 8:
            yield f"element stride {step} is not from 1 to 8"
    inner = box[0] * ELEMENT_BYTES[dtype]
    if inner % 16 or inner > SWIZZLE_SPANS.get(swizzle, 0):
        yield f"{inner} bytes along a box's innermost side are no multiple of 16 within swizzle {swizzle}"
    if (interleave, fill) != (0, 0) or promotion not in range(4):
        yield f"interleave {interleave}, promotion {promotion}, fill {fill}"


def launch_refusal(grid, threads, shared_bytes) -> str:
    """Why a launch is refused, or nothing. All ctypes values."""
    x, y, z, a, b, c, shared = (value.value for value in (*grid, *threads, shared_bytes))
    if not (0 < x < 1 << 31 and 0 < y <= MOST_ROWS and 0 < z <= MOST_ROWS):
        return f"a grid of {x}, {y}, {z}"
    if not 0 < a * b * c <= MOST_THREADS:
        return f"{a}, {b}, {c} threads"
    return f"{shared} bytes of shared memory" if shared > MOST_SHARED_BYTES else ""
