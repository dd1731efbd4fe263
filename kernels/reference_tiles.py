"""The specification of tile means and tile selection, in plain torch on any device."""
from __future__ import annotations

import torch
from torch import Tensor

from .spec import BLOCK, KernelSpec

_MEANS_CHUNK_BYTES = {"cpu": 8 << 20}
"""Bound on the gathered tokens held at once, in their own dtype: what a CPU's caches hold."""
_MEANS_CHUNK_BYTES_ELSEWHERE = 64 << 20
_CHUNK_BYTES = 256 << 20
"""Bound on the tile-by-tile scores of the heads worked on at once, and what is made of them."""


def tile_means(parts: list[Tensor], token_rows: Tensor, tiles: int, blocks_per_tile: int) -> Tensor:
    """Contract and shapes: `kernels.tile_means`."""
    first = parts[0]
    batch, _, heads, dim = first.shape
    dtype = torch.promote_types(first.dtype, torch.float32)
    slots = blocks_per_tile * BLOCK
    rows = token_rows[:tiles * slots].view(tiles, slots)
    tokens = (rows >= 0).sum(1).clamp(min=1).to(dtype)
    means = first.new_empty((len(parts), batch, heads, tiles, dim), dtype=dtype)
    bound = _MEANS_CHUNK_BYTES.get(first.device.type, _MEANS_CHUNK_BYTES_ELSEWHERE)
    step = max(1, bound // max(1, batch * slots * heads * dim * first.element_size()))
    for start in range(0, tiles, step):
        picked = rows[start:start + step]
        padding = (picked < 0)[:, :, None, None]
        for part, x in enumerate(parts):
            values = x.index_select(1, picked.clamp(min=0).flatten()).unflatten(1, picked.shape)
            sums = values.masked_fill_(padding, 0).sum(2, dtype=dtype)             # [B, n, H, D]
            means[part, :, :, start:start + step] = sums.transpose(1, 2)
    return means.div_(tokens[:, None])


def select_tiles(query_means: Tensor, key_means: Tensor, k: int, scale: float, blocks_per_tile: int,
                 always: int) -> Tensor:
    """Contract and shapes: `kernels.select_tiles`."""
    tiles = select_top_tiles(query_means, key_means, k, scale)
    if blocks_per_tile == 1 and not always:
        return tiles
    return tile_lists_to_blocks(tiles, blocks_per_tile, key_means.shape[2], always)[0].contiguous()


def select_top_tiles(query_means: Tensor, key_means: Tensor, k: int, scale: float) -> Tensor:
    """The k key tiles with the highest query_mean . key_mean * scale, for every query tile, ascending.

    query_means: [B, H, Nq, D], key_means: [B, H, Nk, D]  ->  int32 [B, H, Nq, k].
    Exactly k per row; equal scores go to the lower index; NaN counts as the lowest score.
    """
    batch, heads, rows, _ = query_means.shape
    tiles = key_means.shape[2]
    picked = torch.empty(batch * heads, rows, k, dtype=torch.int32, device=query_means.device)
    queries, keys = query_means.flatten(0, 1), key_means.flatten(0, 1)
    step = max(1, _CHUNK_BYTES // (rows * tiles * 24))
    for first in range(0, batch * heads, step):
        part = slice(first, first + step)
        scores = (queries[part] * scale) @ keys[part].transpose(1, 2)
        picked[part] = _top_k_ascending(scores, k)
    return picked.unflatten(0, (batch, heads))


def _top_k_ascending(scores: Tensor, k: int) -> Tensor:
    scores.nan_to_num_(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    last = scores.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, level = scores > last, scores == last
    room = k - above.sum(-1, keepdim=True, dtype=torch.int32)
    kept = above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))
    place = torch.where(kept, kept.cumsum(-1) - 1, k)      # the slot k collects what is not kept
    index = torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device).expand_as(scores)
    return index.new_empty(*scores.shape[:-1], k + 1).scatter_(-1, place, index)[..., :k]


def tile_lists_to_blocks(tiles: Tensor, blocks_per_tile: int, num_tiles: int, always: int) -> tuple[Tensor, Tensor]:
    """The kernel's lists for a selection of tiles: every block of a query tile reads the blocks of its key tiles.

    tiles: int32 [B, H, N, k] ascending  ->  indices int32 [B, H, N*m, k*m + always], counts int32 [B, H, N*m]
    with m = blocks_per_tile. The `always` blocks after the last tile close every list.
    """
    batch, heads, rows, k = tiles.shape
    indices = tiles
    if blocks_per_tile > 1:
        inner = torch.arange(blocks_per_tile, dtype=torch.int32, device=tiles.device)
        indices = (tiles[..., None] * blocks_per_tile + inner).flatten(3)
        indices = indices[:, :, :, None].expand(-1, -1, -1, blocks_per_tile, -1).flatten(2, 3)
    if always:
        first = num_tiles * blocks_per_tile
        closing = torch.arange(first, first + always, dtype=torch.int32, device=tiles.device)
        indices = torch.cat([indices, closing.expand(*indices.shape[:3], -1)], dim=-1)
    counts = torch.full((1, 1, 1), indices.shape[-1], dtype=torch.int32, device=tiles.device)
    return indices, counts.expand(batch, heads, rows * blocks_per_tile)


DEVICE_TYPES = ("cpu", "cuda", "rocm", "mps", "xpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MEANS_SPEC = KernelSpec(name="reference_tile_means", load=lambda: tile_means, device_types=DEVICE_TYPES,
                        auto_device_types=DEVICE_TYPES, dtypes=DTYPES)
SELECT_SPEC = KernelSpec(name="reference_select_tiles", load=lambda: select_tiles, device_types=DEVICE_TYPES,
                         auto_device_types=DEVICE_TYPES, dtypes=DTYPES)
