"""Runs the Triton kernel in Triton's CPU interpreter, in a process of its own.

Triton decides when it is imported whether its own library functions are interpreted, so a process that has
imported it for anything else cannot interpret, and one that interprets cannot compile. Tensors travel as bytes:
pickled as they are, each would keep a file open in both processes.
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
    return _opened(worker.submit(_run, _packed(operands), scale, return_lse, head_stride).result())


def call(worker, module, *operands, **options):
    """`run` of kernels/triton/<module>.py on operands with the strides they have here: tensors, numbers and None."""
    operands = [list(x) if isinstance(x, tuple) else x for x in operands]
    return _opened(worker.submit(_call, module, _packed(operands), options).result())


def select_within(worker, score_bytes, *operands):
    """`run` of kernels/triton/select_tiles.py with another bound on the scores held at once."""
    return _opened(worker.submit(_select_within, score_bytes, _packed(operands)).result())


def attend_video(worker, q, k, v, gate, kept=None, **metadata):
    """Video sparse attention in sequence order with every Triton kernel -> (out, the tiles that were kept).

    kept: `KeptTiles` to read in place of the best ones.
    """
    lists = None if kept is None else vars(kept)
    return _opened(worker.submit(_attend_video, _packed((q, k, v, gate, lists)), metadata).result())


def triton_on_the_cpu():
    """The pack's tables of kernels with Triton's first, as on a GPU that has proven them: (module, name, table)."""
    from dataclasses import replace

    import pack.kernels as kernels
    from pack.kernels import tile_ops

    def table(module, name):
        specs = [replace(spec, device_types=("cpu",), auto_device_types=("cpu",), min_capability=None, files=())
                 for spec in getattr(module, name) if spec.name.startswith("triton")]
        return module, name, (*specs, getattr(module, name)[-1])
    return [table(kernels, "KERNELS"), table(tile_ops, "MEANS_KERNELS"), table(tile_ops, "SELECT_KERNELS")]


def _prepare():
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    import conftest  # noqa: F401  makes `pack` importable
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)        # torch.empty fills with NaN


def _packed(operands):
    import torch
    parcel = io.BytesIO()
    torch.save(operands, parcel)
    return parcel.getvalue()


def _opened(parcel):
    import torch
    return torch.load(io.BytesIO(parcel))


def _run(parcel, scale, return_lse, head_stride):
    from pack.kernels.triton import block_sparse

    assert block_sparse.INTERPRET
    q, k, v, *selection = _opened(parcel)
    if head_stride:
        k, v = _spread(k, head_stride), _spread(v, head_stride)
    return _packed(block_sparse.run(q, k, v, *selection, scale, return_lse))


def _call(module, parcel, options):
    import importlib
    return _packed(importlib.import_module(f"pack.kernels.triton.{module}").run(*_opened(parcel), **options))


def _select_within(score_bytes, parcel):
    from pack.kernels.triton import select_tiles
    kept, select_tiles.SCORE_BYTES = select_tiles.SCORE_BYTES, score_bytes
    try:
        return _packed(select_tiles.run(*_opened(parcel)))
    finally:
        select_tiles.SCORE_BYTES = kept


def _attend_video(parcel, metadata):
    from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder
    from pack.vsa_core.mass_lists import KeptTiles
    for module, name, table in triton_on_the_cpu():
        setattr(module, name, table)
    q, k, v, gate, lists = _opened(parcel)
    kept = None if lists is None else KeptTiles(**lists)
    seen = []
    md = VideoSparseAttentionMetadataBuilder().build(0, patch_size=(1, 1, 1), device="cpu", **metadata)
    impl = VideoSparseAttentionImpl(q.shape[2], q.shape[3], backend="triton",
                                    on_selection=lambda tiles, md: seen.append(tiles))
    impl.kept = kept
    out = impl.attend(q, k, v, md, gate)
    return _packed((out, seen[0] if kept is None else kept.mask(q.device)))


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
