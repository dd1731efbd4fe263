"""The attention layers that a plan's calls go through, one per shape of call, chosen by the selector."""
from __future__ import annotations

from torch import Tensor

from ...vsa_core.layer import LocalAttention
from ...vsa_core.selector import AttentionBackendEnum
from ..hook.method import StaysDense


class LocalLayers:
    """Layers of one sparse method. A user who forces dense attention on the selector gets dense attention."""

    def __init__(self, method: AttentionBackendEnum, **impl_args):
        """impl_args go to the method's implementation."""
        self.method, self.impl_args = method, impl_args
        self._layers: dict[tuple, LocalAttention] = {}

    def of(self, q: Tensor, kernel: str) -> LocalAttention:
        """The layer for q [B, S, H, D] on a kernel. Raises StaysDense when the selector decides for dense attention."""
        key = (*q.shape[2:], q.dtype, kernel)
        if key not in self._layers:
            self._layers[key] = LocalAttention(
                q.shape[2], q.shape[3], backend=kernel, dtype=q.dtype,
                supported_attention_backends=(self.method, AttentionBackendEnum.TORCH_SDPA), **self.impl_args)
        layer = self._layers[key]
        if layer.backend is not self.method:
            raise StaysDense(f"the selector was told to take {layer.backend.name}")
        return layer
