"""How much of its attention every query tile pays to every key tile: exactly, or estimated from tile means.

What a dense step pays is what the next steps pay nearly as well (LoSA, arXiv 2608.12032): `mass_lists` makes lists of
it. Exact masses cost the scores of dense attention once more, in plain torch, for the share of query rows that is
asked for; a kernel that emits them while it computes dense attention does not exist yet.
"""
from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import BLOCK, tile_means
from .layout import TileLayout

_SCORE_BYTES = {"cpu": 8 << 20}
"""Bound on the scores held at once: what a CPU holds in its caches. Beside them lie the keys of one head."""
_SCORE_BYTES_ELSEWHERE = 24 << 20
_POOLED_BYTES = 64 << 20
"""Bound on the scores of tile means that are worked on at once."""


def tile_masses(query: Tensor, key: Tensor, layout: TileLayout, scale: float, every: int = 1) -> tuple[Tensor, Tensor]:
    """The softmax weight that falls into every key tile, mean over a query tile's tokens, and that of other tokens.

    query, key: [B, total_seq_length, H, D], in the order of the sequence  ->  [B, H, N, N] and [B, H, N], float32
    (float64 for float64); a row and its other tokens add up to 1. Hidden tokens have no weight.
    every: 1 takes all tokens of a query tile, n about every n-th, spread over the tile, at least one.
    Raises ValueError for another length and for an `every` that is none.
    """
    _require(query, key, layout)
    if not 1 <= every <= layout.slots_per_tile:
        raise ValueError(f"masses of every {every}th row: wanted 1 to {layout.slots_per_tile}")
    tiles, slots = layout.variable_block_sizes.shape[0], layout.slots_per_tile
    rows = layout.token_rows[:layout.num_video_slots].view(tiles, slots)[:, _places(slots, every, query.device)]
    tokens = (rows >= 0).sum(1, keepdim=True)
    batch, _, heads, _ = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    masses = query.new_empty((batch, heads, tiles, tiles), dtype=dtype)
    others = query.new_empty((batch, heads, tiles), dtype=dtype)
    step = max(1, _score_rows(layout, dtype, query.device) // rows.shape[1])
    for b in range(batch):
        for h in range(heads):
            keys, bias = _keys(key[b, :, h], layout, dtype)
            for first in range(0, tiles, step):
                part = slice(first, first + step)
                video, other = _row_masses(query[b, :, h], rows[part].flatten(), keys, bias, layout, scale)
                padding = rows[part] < 0
                video = video.unflatten(0, padding.shape).masked_fill_(padding[..., None], 0)
                masses[b, h, part] = video.sum(1) / tokens[part]
                others[b, h, part] = other.view(padding.shape).masked_fill(padding, 0).sum(1) / tokens[part, 0]
    return masses, others


def pooled_masses(query: Tensor, key: Tensor, layout: TileLayout, scale: float,
                  backend: str = "auto") -> tuple[Tensor, Tensor]:
    """`tile_masses` as the means of the tiles tell: every tile counts as that many keys at its mean. Shapes and errors
    as there. backend: as in `kernels.tile_means`.

    Cheap and flattering: what makes one key of a tile stand out is not in the tile's mean.
    """
    _require(query, key, layout)
    sizes = layout.variable_block_sizes
    query_means, key_means = tile_means((query, key), layout.token_rows, len(sizes), layout.blocks_per_tile, backend)
    asking, keys = query_means.flatten(0, 1) * scale, key_means.flatten(0, 1)          # [B*H, N, D]
    masses = asking.new_empty((len(asking), len(sizes), len(sizes)))
    others = asking.new_zeros(masses.shape[:2])
    shown = _shown(layout)[layout.num_video_slots:]
    rows = layout.token_rows[layout.num_video_slots:][shown]
    size = sizes.to(masses.dtype).log().expand(1, 1, -1)
    other_keys = key.index_select(1, rows).permute(0, 2, 3, 1).flatten(0, 1) if len(rows) else None    # [B*H, D, R]
    step = max(1, _POOLED_BYTES // (masses[0].numel() * masses.element_size()))
    for first in range(0, len(asking), step):
        part = slice(first, first + step)
        scores = torch.baddbmm(size, asking[part], keys[part].transpose(1, 2), out=masses[part])
        total = scores.logsumexp(-1)
        if other_keys is not None:
            other = (asking[part] @ other_keys[part].to(asking.dtype)).logsumexp(-1)
            total = torch.logaddexp(total, other)
            others[part] = (other - total).exp_()
        scores.sub_(total[..., None]).exp_()
    shape = query_means.shape[:2]
    return masses.unflatten(0, shape), others.unflatten(0, shape)


def sampled_masses(query: Tensor, key: Tensor, layout: TileLayout, scale: float, rows: int,
                   seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The softmax weight of some video tokens that falls into every key tile, and into other tokens: exact.

    query, key: as in `tile_masses`.   rows: how many tokens, at most.   seed: other tokens for another one.
    -> [B, H, n, N] and [B, H, n], float32 (float64 for float64), and the tokens' tiles, int64 [n]
    """
    _require(query, key, layout)
    tokens = layout.grid.num_video_tokens
    count = min(rows, tokens)
    places = torch.arange(count, device=query.device) * tokens // count + seed * 7919
    slot = layout.non_pad_index[places % tokens]
    asking = layout.token_rows[slot]
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch, _, heads, _ = query.shape
    masses = query.new_empty((batch, heads, count, layout.variable_block_sizes.shape[0]), dtype=dtype)
    others = query.new_empty((batch, heads, count), dtype=dtype)
    step = max(1, _score_rows(layout, dtype, query.device))
    for b in range(batch):
        for h in range(heads):
            keys, bias = _keys(key[b, :, h], layout, dtype)
            for first in range(0, count, step):
                part = slice(first, first + step)
                masses[b, h, part], others[b, h, part] = _row_masses(query[b, :, h], asking[part], keys, bias, layout,
                                                                     scale)
    return masses, others, slot // layout.slots_per_tile


def _require(query: Tensor, key: Tensor, layout: TileLayout) -> None:
    if query.shape != key.shape or query.shape[1] != layout.total_seq_length:
        raise ValueError(f"masses: found q {list(query.shape)} and k {list(key.shape)}, "
                         f"wanted one shape with {layout.total_seq_length} tokens")


def _places(slots: int, every: int, device: torch.device) -> Tensor:
    """About every n-th slot of a tile. Moved on from pick to pick: else all would lie in one column of the tile."""
    pick = torch.arange(max(1, slots // every), device=device)
    return pick * every + pick % every


def _score_rows(layout: TileLayout, dtype: torch.dtype, device: torch.device) -> int:
    bound = _SCORE_BYTES.get(device.type, _SCORE_BYTES_ELSEWHERE)
    return bound // (layout.padded_seq_length * torch.finfo(dtype).bits // 8)


def _shown(layout: TileLayout) -> Tensor:
    """bool [S], slots with a token that queries see."""
    place = torch.arange(BLOCK, device=layout.kernel_block_sizes.device)
    return (place < layout.kernel_block_sizes[:, None]).flatten()


def _keys(key: Tensor, layout: TileLayout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """One head's keys in slot order, [S, D], and 0 for slots that queries see, -inf for others, [S]."""
    bias = torch.zeros(layout.padded_seq_length, dtype=dtype, device=key.device)
    bias.masked_fill_(~_shown(layout), -torch.inf)
    return key.index_select(0, layout.token_rows.clamp(min=0)).to(dtype), bias


def _row_masses(query: Tensor, rows: Tensor, keys: Tensor, bias: Tensor, layout: TileLayout,
                scale: float) -> tuple[Tensor, Tensor]:
    """Softmax weights of some tokens of one head, summed by key tile.   rows: [n]  ->  [n, N] and of the others [n]"""
    asking = query.index_select(0, rows.clamp(min=0)).to(keys.dtype)
    scores = torch.addmm(bias, asking, keys.T, alpha=scale)
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    video = weights[:, :layout.num_video_slots].unflatten(1, (-1, layout.slots_per_tile)).sum(-1)
    other = weights[:, layout.num_video_slots:].sum(-1)
    total = video.sum(-1) + other
    return video.div_(total[:, None]), other.div_(total)
