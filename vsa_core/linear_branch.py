"""The linear branch of Sparse-Linear Attention: all keys summed up in one matrix per head, which every query reads.

    o_l = phi(q) S / (1e-5 + phi(q) z)    with S = sum of phi(k)^T v and z = sum of phi(k) over all keys

and proj_l(o_l) is added to the sparse branch. Zhang et al., "SLA", arXiv 2509.24006; thu-ml/SLA main at d973e55,
sparse_linear_attention/core.py. proj_l is affine, so it is folded into S once per head instead of being applied to
every token, and no tensor of the size of q is made. Sums in float32 (float64 for float64): a float16 z overflows.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: torch.softmax(x, dim=-1),
    "elu": lambda x: torch.nn.functional.elu(x) + 1,
    "relu": torch.relu,
}
"""Feature maps by upstream's names; queries and keys share one."""
EPS = 1e-5
"""Added to the normaliser, which is no maximum."""

_CHUNK_BYTES = {"cpu": 8 << 20}
"""Bound on the tokens of one tensor held at once in float32."""
_CHUNK_BYTES_ELSEWHERE = 64 << 20

Projection = Callable[[Tensor], Tensor]
"""An affine map of the last dimension, [..., D] -> [..., D], in the dtype of what it is given."""


@dataclass(frozen=True)
class LinearState:
    """All keys and values of a call, as its queries need them."""

    matrix: Tensor
    """[B, H, D, D], S with the projection's matrix folded in."""
    norm: Tensor
    """[B, H, D], z."""
    bias: Tensor
    """[D], of the projection."""


def feature_named(name: str) -> Callable[[Tensor], Tensor]:
    """The feature map of that name. Raises ValueError with the list for a name that is none."""
    if name not in FEATURES:
        raise ValueError(f"Unknown feature map: {name}; wanted one of {', '.join(FEATURES)}")
    return FEATURES[name]


def linear_state(key: Tensor, value: Tensor, projection: Projection, feature: str = "softmax",
                 visible: Tensor | None = None) -> LinearState:
    """The state of keys and values [B, S, H, D] under a projection.

    visible: int64, the rows that queries may see; None: all. Raises ValueError for an unknown feature map.
    """
    phi, (batch, tokens, heads, dim) = feature_named(feature), key.shape
    dtype = torch.promote_types(key.dtype, torch.float32)
    total = key.new_zeros((batch, heads, dim, dim), dtype=dtype)
    norm = key.new_zeros((batch, heads, dim), dtype=dtype)
    for part in _chunks(key, tokens if visible is None else len(visible)):
        rows = part if visible is None else visible[part]
        features = phi(key[:, rows].to(dtype)).transpose(1, 2)                       # [B, H, n, D]
        total += features.transpose(2, 3) @ value[:, rows].to(dtype).transpose(1, 2)
        norm += features.sum(2)
    bias = projection(total.new_zeros(dim))
    return LinearState(projection(total) - bias, norm, bias)


def add_linear(out: Tensor, query: Tensor, state: LinearState, feature: str = "softmax") -> None:
    """Add proj_l(o_l) of every query to `out`, in place.   out, query: [B, S, H, D]"""
    phi, dtype = feature_named(feature), state.matrix.dtype
    for part in _chunks(query, query.shape[1]):
        features = phi(query[:, part].to(dtype)).transpose(1, 2)                     # [B, H, n, D]
        added = (features @ state.matrix) / (EPS + features @ state.norm[..., None]) + state.bias
        out[:, part] = (out[:, part].to(dtype) + added.transpose(1, 2)).to(out.dtype)


def _chunks(x: Tensor, tokens: int):
    """Slices of so many tokens of x [B, S, H, D] that keep to the bound."""
    batch, _, heads, dim = x.shape
    bound = _CHUNK_BYTES.get(x.device.type, _CHUNK_BYTES_ELSEWHERE)
    step = max(1, bound // max(1, batch * heads * dim * 4))
    return (slice(first, min(first + step, tokens)) for first in range(0, tokens, step))
