"""What the tests on a GPU share. Without a GPU each of them is rehearsed: its first case, on the kernels of torch."""
from __future__ import annotations

import pytest
import torch

from pack.kernels import KERNELS, Call, explain_kernels
from pack.kernels.tile_ops import MEANS_KERNELS, SELECT_KERNELS

HERE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
REHEARSED = HERE.type == "cpu"
SPECS, MEANS, SELECT = ([spec for spec in table if bool(spec.files) != REHEARSED and spec.exact]
                        for table in (KERNELS, MEANS_KERNELS, SELECT_KERNELS))
(INT8,) = (spec for spec in KERNELS if bool(spec.files) != REHEARSED and not spec.exact)

by_kernel = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)


def cases(all_of_them):
    """All cases on a GPU, the first one of a rehearsal."""
    return list(all_of_them)[:1] if REHEARSED else list(all_of_them)


def to_device(x):
    """A tensor with the same values, strides and poison where the kernels run; anything else as it is."""
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=HERE).copy_(x)


def need(spec, dtype, dim):
    """Skip with the kernel's own words where it does not run here."""
    call = Call.on(HERE, dtype, dim)
    reason = explain_kernels(call)[spec.name] if spec in KERNELS else spec.refusal(call)
    if reason:
        pytest.skip(f"{spec.name}: {reason}")


def peak_memory(run):
    """(what `run()` returned, bytes that it took at most besides what was there; 0 in a rehearsal)"""
    if REHEARSED:
        return run(), 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return run(), torch.cuda.max_memory_allocated() - before
