"""Runs the Triton kernel in Triton's CPU interpreter, in a process of its own.

Triton decides when it is imported whether its own library functions are interpreted, so a process that has
imported it for anything else cannot interpret, and one that interprets cannot compile.
"""
from __future__ import annotations

import io
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor


def start() -> ProcessPoolExecutor:
    """One worker, ready when its first answer arrives."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare)


def run(worker, *operands, scale, return_lse=True, head_stride=None):
    """`run` of kernels/triton/block_sparse.py, on operands with the strides they have here.

    head_stride: lay k and v out with this many elements between heads, in memory that is reserved but not touched.
    Raises MemoryError where that much cannot be reserved.
    """
    parcel = io.BytesIO()
    import torch
    torch.save(operands, parcel)
    answer = worker.submit(_run, parcel.getvalue(), scale, return_lse, head_stride).result()
    return torch.load(io.BytesIO(answer))


def _prepare():
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    import conftest  # noqa: F401  makes `pack` importable
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)        # torch.empty fills with NaN


def _run(parcel, scale, return_lse, head_stride):
    import torch

    from pack.kernels.triton import block_sparse

    assert block_sparse.INTERPRET
    q, k, v, *selection = torch.load(io.BytesIO(parcel))
    if head_stride:
        k, v = _spread(k, head_stride), _spread(v, head_stride)
    answer = io.BytesIO()
    torch.save(block_sparse.run(q, k, v, *selection, scale, return_lse), answer)
    return answer.getvalue()


def _spread(x, head_stride):
    import torch
    batch, slots, heads, dim = x.shape
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        room = torch.empty((heads - 1) * head_stride + slots * dim, dtype=x.dtype)
    except RuntimeError as error:
        raise MemoryError(str(error)) from None
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert batch == 1
    return room.as_strided(x.shape, (0, dim, head_stride, 1)).copy_(x)
