"""Sparse against dense by the clock, for as long as a patched model lives, so that the same graph decides the same."""
from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

from ...kernels import Contest, Span

DENSE_NAMES = {"attention_pytorch": "PyTorch attention", "attention_sage": "SageAttention",
               "attention3_sage": "SageAttention 3", "attention_flash": "FlashAttention",
               "attention_xformers": "xFormers", "attention_sub_quad": "sub-quadratic attention",
               "attention_split": "split attention", "attention_basic": "basic attention"}
"""What ComfyUI's own attention functions are called."""


@dataclass(frozen=True)
class DenseCall:
    """An attention call as it would run without the hook."""

    compute: Callable[[], Tensor]
    kind: Hashable
    """Calls of one kind take the same time: what serves them, shapes, dtype and device."""
    name: str
    """What serves it, in a user's words."""
    is_sparse: bool = False
    """Another sparse method serves it: its time is not that of dense attention."""

    @classmethod
    def of(cls, compute: Callable[[], Tensor], q: Tensor, k: Tensor, func, override) -> DenseCall:
        """func: ComfyUI's function.   override: what stands in for it, or None."""
        named = func if override is None else override
        kind = id(named), tuple(q.shape), tuple(k.shape), q.dtype, q.device
        if (hook := getattr(named, "sparse_attention_hook", None)) is not None:
            return cls(compute, kind, f"the {hook.method.name} node", is_sparse=True)
        name = getattr(named, "__name__", type(named).__name__)
        return cls(compute, kind, DENSE_NAMES.get(name, name.strip("_").replace("_", " ")))


class Speed:
    """The contests of one hook: one per kind of call and kernel, against the times of dense calls of that kind."""

    def __init__(self):
        self._dense: dict[Hashable, list[Span]] = {}
        self._contests: dict[Hashable, Contest] = {}

    def dense_times(self, dense: DenseCall) -> list[Span]:
        """The first times of dense calls like this one."""
        return self._dense.setdefault(dense.kind, [])

    def contest(self, dense: DenseCall, kernel: str, work: Hashable) -> Contest:
        """The contest of a kernel in calls like this one. work: what else the time of a sparse call depends on."""
        key = dense.kind, kernel, work
        if key not in self._contests:
            self._contests[key] = Contest(self.dense_times(dense))
        return self._contests[key]
