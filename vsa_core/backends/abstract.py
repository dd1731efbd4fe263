"""What a sparse attention method consists of. Names and signatures: FastVideo, attention/backends/abstract.py."""
from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..layout import TileLayout
from ..lowering import readable

UPSTREAM_NAMES = ("current_timestep", "raw_latent_shape", "patch_size", "STA_param", "VSA_sparsity", "topk_ratio",
                  "device")
"""What FastVideo's pipelines say to every builder alike, so that a builder takes those of another method too."""


class AttentionBackend(ABC):
    """Ties together the four classes of one method."""

    accept_output_buffer: bool = False

    @staticmethod
    @abstractmethod
    def get_name() -> str:
        raise NotImplementedError

    @staticmethod
    @abstractmethod
    def get_impl_cls() -> type[AttentionImpl]:
        raise NotImplementedError

    @staticmethod
    @abstractmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        raise NotImplementedError

    @staticmethod
    @abstractmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        raise NotImplementedError

    @staticmethod
    def get_supported_head_sizes() -> list[int]:
        """Head sizes that the method's GPU kernels take; the reference kernel takes any."""
        return [64, 128]


@dataclass
class AttentionMetadata:
    """What a forward pass needs besides q, k and v. Built once per shape, used by every layer."""

    current_timestep: int

    def asdict_zerocopy(self, skip_fields: set[str] | None = None) -> dict[str, Any]:
        """The fields as a dict that shares every value with this object."""
        skip = skip_fields or set()
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in skip}


T = TypeVar("T", bound=AttentionMetadata)


class AttentionMetadataBuilder(ABC, Generic[T]):
    """Makes metadata with its tensors on the device."""

    @abstractmethod
    def __init__(self) -> None:
        raise NotImplementedError

    @abstractmethod
    def prepare(self) -> None:
        """Get ready for one batch."""
        raise NotImplementedError

    @abstractmethod
    def build(self, **kwargs: Any) -> T:
        raise NotImplementedError

    @staticmethod
    def refuse_unknown(kwargs: dict[str, Any], own: Callable[..., Any]) -> None:
        """Raise TypeError for a keyword that is neither one of `own`, the build method, nor in UPSTREAM_NAMES."""
        unknown = [name for name in kwargs if name not in UPSTREAM_NAMES]
        if unknown:
            known = [name for name, parameter in inspect.signature(own).parameters.items()
                     if name != "self" and parameter.kind is not inspect.Parameter.VAR_KEYWORD]
            foreign = [name for name in UPSTREAM_NAMES if name not in known]
            raise TypeError(f"build: found {', '.join(unknown)}, wanted {', '.join(known)}, or, without effect, "
                            f"{', '.join(foreign)}")


class AttentionImpl(ABC, Generic[T]):
    """The method itself: preprocess_qkv, forward, postprocess_output, in this order."""

    on_lists: Callable[[slice, Tensor, Tensor, TileLayout], None] | None = None
    """Called with the heads, indices and counts of every launch of a kernel, as `lowering.attend_lists` takes them, and
    the layout that they are of."""

    @abstractmethod
    def __init__(self, num_heads: int, head_size: int, softmax_scale: float, causal: bool = False,
                 num_kv_heads: int | None = None, prefix: str = "", **extra_impl_args) -> None:
        raise NotImplementedError

    def preprocess_qkv(self, qkv: torch.Tensor, attn_metadata: T) -> torch.Tensor:
        """Bring stacked q, k, v [n*B, S, H, D] into the order that `forward` works in."""
        return qkv

    def postprocess_output(self, output: torch.Tensor, attn_metadata: T) -> torch.Tensor:
        """Bring the output [B, S, H, D] back into the order of the sequence."""
        return output

    @abstractmethod
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_metadata: T) -> torch.Tensor:
        """Attention on [B, S, H, D] tensors in the method's own order."""
        raise NotImplementedError

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_metadata: T,
               gate_compress: torch.Tensor | None = None) -> torch.Tensor:
        """The whole way in the order of the sequence, [B, S, H, D], for tensors of any strides.

        gate_compress weighs the coarse branch. Raises ValueError where a method has none.
        """
        query, key, value, gate_compress = readable(query, key, value, gate_compress)
        return self.attend_readable(query, key, value, attn_metadata, gate_compress)

    def attend_readable(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_metadata: T,
                        gate_compress: torch.Tensor | None = None) -> torch.Tensor:
        """`attend` for tensors whose last dimension is contiguous: what a method overrides.

        A method that does not gets preprocess_qkv on q, k and v stacked, forward, postprocess_output.
        """
        if gate_compress is not None:
            raise ValueError(f"{type(self).__name__} has no coarse branch: found gate_compress, wanted None")
        if type(self).preprocess_qkv is not AttentionImpl.preprocess_qkv:
            query, key, value = self._preprocessed(query, key, value, attn_metadata)
        return self.postprocess_output(self.forward(query, key, value, attn_metadata), attn_metadata)

    def _preprocessed(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: T) -> tuple[Tensor, ...]:
        if not query.shape == key.shape == value.shape:
            raise ValueError(f"{type(self).__name__}: found q {list(query.shape)}, k {list(key.shape)}, v "
                             f"{list(value.shape)}, wanted one shape: they are stacked for preprocess_qkv")
        return self.preprocess_qkv(torch.cat((query, key, value)), attn_metadata).chunk(3)
