"""Tensors between bands that nobody may write to, so that a kernel's stray writes and reads show."""
from __future__ import annotations

import torch
from torch import Tensor

BAND = 4096
"""Elements on either side: whole cache lines, so that the tensor between them stays aligned."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Guarded:
    """A copy of `source` with its strides, its values and a poisoned band on either side.

    poison: what the bands hold, NaN where the dtype has one. A kernel that reads them spreads it.
    """

    def __init__(self, source: Tensor, device: torch.device):
        extent = 1 + sum((size - 1) * stride for size, stride in zip(source.shape, source.stride(), strict=True))
        poison = torch.nan if source.dtype.is_floating_point else -77
        self._buffer = torch.full((extent + 2 * BAND,), poison, dtype=source.dtype, device=device)
        self.tensor = self._buffer[BAND:].as_strided(source.shape, source.stride(), BAND)
        self.tensor.copy_(source)
        self._before = self._buffer.clone()

    @classmethod
    def output(cls, shape, dtype: torch.dtype, device: torch.device) -> Guarded:
        """A contiguous tensor of poison, for a kernel to fill."""
        return cls(torch.full(shape, torch.nan if dtype.is_floating_point else -77, dtype=dtype), device)

    def bands_are_whole(self) -> bool:
        """Whether nothing was written outside the tensor."""
        bits, before = (x.view(_INTEGERS[x.element_size()]) for x in (self._buffer, self._before))
        return bool((bits[:BAND] == before[:BAND]).all() and (bits[-BAND:] == before[-BAND:]).all())

    def is_unchanged(self) -> bool:
        """Whether neither the tensor nor its bands were written to."""
        bits, before = (x.view(_INTEGERS[x.element_size()]) for x in (self._buffer, self._before))
        return bool((bits == before).all())
