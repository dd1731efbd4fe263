"""How close sparse attention came to exact attention, told by a few tiles of queries that are computed both ways.

Of every tile one block of at most 64 tokens is taken, in one batch row and head. Nothing here waits for the device.
"""
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .layout import TileLayout
from .tiling import BLOCK

CHUNK_BYTES = 64 << 20
"""Bound on the keys, values and scores in float32 that are held at once."""
WORK_PER_TILE = 2.5e6
"""Tokens x heads x calls of sparse attention for every tile: at a tenth of all pairs and the speed of tensor cores, a
tile in float32 then takes less than a hundredth of their time."""
MOST_TILES, WIDEST = 8, 32
"""Tiles in one measured call, and calls from one measured call to the next: at most."""
LEAST_CALLS = 4
"""Measured calls that a short run is meant to have, whatever that costs."""


class Place(NamedTuple):
    """Where a sampled tile lies."""

    row: int
    """Of the batch."""
    head: int
    block: int
    """Of the video's query blocks."""


class Launch(NamedTuple):
    """What one launch of a kernel was told to read."""

    heads: slice
    indices: Tensor
    """int32 [B, h, Nq, K]"""
    counts: Tensor
    """int32 [B, h, Nq]"""


def sampling_rate(tokens: int, heads: int, expected_calls: int) -> tuple[int, int]:
    """(tiles in a measured call, calls of which one is measured) where so many calls of this size will come.

    tokens: those of all rows of the batch.
    """
    per_call = tokens * heads / WORK_PER_TILE
    tiles = min(MOST_TILES, max(2, round(per_call * MOST_TILES)))
    return tiles, max(1, min(round(tiles / per_call), WIDEST, expected_calls // LEAST_CALLS))


def closeness_of(q: Tensor, k: Tensor, v: Tensor, out: Tensor, places: list[Place], launches: list[Launch],
                 layout: TileLayout, scale: float) -> Tensor:
    """For every place (its tokens, share of the exact softmax mass on the keys that were read, error of `out`).

    q, k, v, out: [B, S, H, D] in sequence order.   -> float32 [places, 3] on their device (float64 for float64)
    The mass is the mean over the tokens, the error the relative L2 of all of them; a block without a token gives 0.
    """
    compute = torch.promote_types(q.dtype, torch.float32)
    rows = torch.stack([layout.token_rows[place.block * BLOCK:(place.block + 1) * BLOCK] for place in places])
    valid, rows = rows >= 0, rows.clamp(min=0)
    read = torch.stack([_keys_read(place, launches, layout) for place in places]).to(compute)
    exact, mass = _exact(_at(q, places, rows).to(compute) * scale, k, v, places, read, _seen(layout))
    exact, found = (torch.where(valid[..., None], x, 0) for x in (exact, _at(out, places, rows).to(compute)))
    error, norm = ((found - exact).square().sum((1, 2)), exact.square().sum((1, 2)))
    tokens = valid.sum(1)
    kept = torch.where(valid, mass, 0).sum(1) / tokens.clamp(min=1)
    return torch.stack([tokens.to(compute), kept, (error / torch.where(norm > 0, norm, 1)).sqrt()], dim=1)


def _at(x: Tensor, places: list[Place], rows: Tensor) -> Tensor:
    """[B, S, H, D], int32 [places, 64] -> [places, 64, D]"""
    return torch.stack([x[place.row, :, place.head].index_select(0, own)
                        for place, own in zip(places, rows.unbind(0), strict=True)])


def _keys_read(place: Place, launches: list[Launch], layout: TileLayout) -> Tensor:
    """Which keys of the sequence the place's list names, bool [S]."""
    launch = next(launch for launch in launches if launch.heads.start <= place.head < launch.heads.stop)
    at = place.row, place.head - launch.heads.start, place.block
    blocks, listed = layout.kernel_block_sizes.shape[0], launch.indices[at]
    inside = torch.arange(listed.shape[0], device=listed.device) < launch.counts[at]
    named = torch.zeros(blocks + 1, dtype=torch.bool, device=listed.device)
    named.index_fill_(0, torch.where(inside, listed, blocks).long(), True)
    return named.index_select(0, layout.untile_combined_index // BLOCK)


def _seen(layout: TileLayout) -> Tensor | None:
    """Which keys of the sequence queries may see at all, bool [S]; None for all."""
    if not layout.grid.hidden:
        return None
    slot = layout.untile_combined_index
    return slot % BLOCK < layout.kernel_block_sizes.index_select(0, slot // BLOCK)


def _exact(queries: Tensor, k: Tensor, v: Tensor, places: list[Place], read: Tensor, seen: Tensor | None):
    """Dense attention of scaled queries [n, 64, D] -> [n, 64, D], and the share of it on the keys of `read`, [n, 64].

    Online softmax over chunks of the keys.   k, v: [B, S, H, D];  read: [n, S] of 0 and 1;  seen: bool [S] or None
    """
    many, block, dim = queries.shape
    per_key = many * (2 * dim + 3 * block) * queries.element_size()
    step = max(BLOCK, CHUNK_BYTES // per_key)
    peak = queries.new_full((many, block, 1), -torch.inf)
    total, mass = torch.zeros_like(peak), torch.zeros_like(peak)
    out = torch.zeros_like(queries)
    for first in range(0, k.shape[1], step):
        part = slice(first, first + step)
        keys, values = (torch.stack([x[place.row, part, place.head] for place in places]).to(queries.dtype)
                        for x in (k, v))
        scores = torch.bmm(queries, keys.transpose(1, 2))
        if seen is not None:
            scores.masked_fill_(~seen[part], -torch.inf)
        higher = torch.maximum(peak, scores.amax(-1, keepdim=True))
        safe = torch.where(higher == -torch.inf, 0, higher)
        weights, shrink = scores.sub_(safe).exp_(), (peak - safe).exp()
        total = total * shrink + weights.sum(-1, keepdim=True)
        mass = mass * shrink + torch.bmm(weights, read[:, part, None])
        out = out * shrink + torch.bmm(weights, values)
        peak = higher
    return out / total, (mass / total).squeeze(-1)
