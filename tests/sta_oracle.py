"""Sliding tile attention from its definition, one query at a time, in float64. Shares no code with the pack.

Tensors are [B, S, H, D] in raster order: `prefix` tokens, then the video's (t, h, w), then `suffix` tokens.
"""
from __future__ import annotations

from itertools import product
from math import ceil, prod

import torch


def sees_along_axis(query_tile: int, key_tile: int, tiles: int, window: int) -> bool:
    """|clamp(q, half, n - 1 - half) - k| <= half, with clamp(x, low, high) = min(max(x, low), high)."""
    half = window // 2
    centre = min(max(query_tile, half), tiles - 1 - half)
    return abs(centre - key_tile) <= half


def keys_of_query(place, thw, tile, window, prefix=0, suffix=0, hidden=()) -> list[int]:
    """The raster places that the query at raster `place` sees."""
    video = prod(thw)
    others = [*range(prefix), *range(prefix + video, prefix + video + suffix)]
    others = [token for i, token in enumerate(others) if i not in hidden]
    if not prefix <= place < prefix + video:
        return others + list(range(prefix, prefix + video))
    where = place - prefix
    mine = (where // (thw[1] * thw[2]), where // thw[2] % thw[1], where % thw[2])
    along = [[x for x in range(size) if sees_along_axis(own // side, x // side, ceil(size / side), width)]
             for own, size, side, width in zip(mine, thw, tile, window)]
    return others + [prefix + (t * thw[1] + h) * thw[2] + w for t, h, w in product(*along)]


def sta_one_query(q, k, v, thw, tile, windows, place, prefix=0, suffix=0, hidden=(), scale=None):
    """The output of the query at raster `place`, [B, H, D]. windows: one for every head."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty(q.shape[0], q.shape[2], q.shape[3], dtype=torch.float64)
    for h, window in enumerate(windows):
        seen = keys_of_query(place, thw, tile, window, prefix, suffix, hidden)
        for b in range(q.shape[0]):
            scores = k[b, seen, h].double() @ q[b, place, h].double() * scale
            weights = (scores - scores.max()).exp()
            out[b, h] = weights @ v[b, seen, h].double() / weights.sum()
    return out


def sta_attention_oracle(q, k, v, thw, tile, windows, prefix=0, suffix=0, hidden=(), scale=None):
    """Every query's output, [B, S, H, D]."""
    return torch.stack([sta_one_query(q, k, v, thw, tile, windows, place, prefix, suffix, hidden, scale)
                        for place in range(q.shape[1])], dim=1)
