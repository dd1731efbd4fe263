"""Lists of as many key tiles as hold a share of the attention: short where it is peaked, long where it is spread.

`most` bounds the work of a call: the mean of kept tiles over all heads and query tiles of a batch entry. One call is
one launch whose time is the sum over its lists, and heads differ far more than the tiles of a head: a bound per row
would cut the few rows that are spread and leave unused what the peaked ones save. Where the bound is reached, every
row gives up the same: the target sinks until the lists fit.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .layout import TileLayout

_CHUNK_BYTES = 64 << 20
"""Bound on what is held at once beside operands and results."""
_EDGES, _ROUNDS = 128, 3
"""The target that fits is looked for among so many at once, so many times: to within a two-millionth."""


@dataclass(frozen=True)
class KeptTiles:
    """Which key tiles every query tile reads, and what that comes to. Shares are means over tokens."""

    bits: Tensor
    """uint8 [B, H, N, ceil(N / 8)], the lowest bit first: an eighth of a byte for every pair of tiles."""
    tiles: int
    longest: int
    """Tiles in the longest list."""
    mean: float
    """Tiles in a list, on average."""
    by_head: tuple[float, float]
    """The same of the head with the shortest lists and of the one with the longest."""
    mass: float
    """Share of the attention held, as the masses said that the lists were made of."""
    density: float
    """Share of query-key pairs of the sequence that are computed, those of other tokens included."""
    bounded: bool
    """Whether the bound on work kept the target from being reached."""

    def mask(self, device: torch.device) -> Tensor:
        """bool [B, H, N, N] on a device."""
        return self._unpacked(self.bits.to(device))

    def mask_of(self, rows: Tensor) -> Tensor:
        """bool [B, H, n, N] of some query tiles, int64 [n], on their device."""
        return self._unpacked(self.bits[:, :, rows.to(self.bits.device)].to(rows.device))

    def _unpacked(self, bits: Tensor) -> Tensor:
        places = torch.arange(8, dtype=torch.uint8, device=bits.device)
        return ((bits[..., None] >> places) & 1).flatten(-2)[..., :self.tiles].bool()

    def lists(self, layout: TileLayout) -> tuple[Tensor, Tensor]:
        """indices and counts of the video's query blocks, as `kernels.block_sparse_attention` wants them."""
        return block_lists(self.mask(layout.token_rows.device), self.longest, layout.blocks_per_tile,
                           layout.num_other_blocks)

    @classmethod
    def joined(cls, parts: Sequence[KeptTiles]) -> KeptTiles:
        """The batch entries of all parts, in their order."""
        if len(parts) == 1:
            return parts[0]
        share = [len(part.bits) / sum(len(part.bits) for part in parts) for part in parts]

        def mean(name: str) -> float:
            return sum(weight * getattr(part, name) for weight, part in zip(share, parts, strict=True))

        lows, highs = zip(*(part.by_head for part in parts), strict=True)
        return cls(torch.cat([part.bits for part in parts]), parts[0].tiles, max(part.longest for part in parts),
                   mean("mean"), (min(lows), max(highs)), mean("mass"), mean("density"),
                   any(part.bounded for part in parts))


def require_target(target: float) -> None:
    """Raise ValueError for a share of the attention that cannot be aimed at."""
    if not 0.0 < target < 1.0:
        raise ValueError(f"share of the attention {target}: wanted above 0 and below 1")


def keep_mass(masses: Tensor, others: Tensor, target: float, most: float, layout: TileLayout) -> KeptTiles:
    """For every query tile its own tile and the smallest set of others, largest mass first, that reaches `target`.

    masses, others: as `mass.tile_masses` gives them; `masses` is overwritten. What other tokens hold counts as kept.
    most: tiles per list at most, on average over the heads and query tiles of a batch entry; from 1 on.
    Waits for the device once. Raises ValueError for a target outside 0 < target < 1 and a bound below 1.
    """
    require_target(target)
    if most < 1:
        raise ValueError(f"at most {most} tiles: wanted 1 or more")
    before = _mass_before(masses, others)
    rows = before.shape[1] * before.shape[2]
    wanted = torch.full((before.shape[0],), target, dtype=before.dtype, device=before.device)
    threshold = _threshold_that_fits(before, wanted, most * rows)
    kept = before < threshold[:, None, None, None]
    share = _held(before, kept)
    counts = kept.sum(-1)
    sizes = layout.variable_block_sizes.to(before.dtype)
    total, unseen = layout.total_seq_length, len(layout.grid.hidden)
    extra = layout.grid.num_other_tokens
    keys = _keys_kept(kept, sizes)
    pairs = ((keys + extra - unseen) @ sizes).mean() + extra * (total - unseen)
    heads = counts.to(sizes).mean((0, 2))
    numbers = torch.stack([counts.amax().to(sizes), heads.mean(), heads.amin(), heads.amax(),
                           (share @ sizes).mean() / sizes.sum(), pairs / (total * (total - unseen)),
                           (threshold < wanted).any().to(sizes)])
    longest, mean, low, high, mass, density, bounded = numbers.tolist()
    return KeptTiles(_packed(kept), kept.shape[-1], int(longest), mean, (low, high), mass, density, bool(bounded))


def block_lists(kept: Tensor, longest: int, blocks_per_tile: int, always: int) -> tuple[Tensor, Tensor]:
    """The kernel's lists of a mask of tiles, rows of different length.   kept: bool [B, H, N, N]

    -> indices int32 [B, H, N*m, longest*m + always], zeros behind the end of a list, and counts int32 [B, H, N*m],
    with m = blocks_per_tile. The `always` blocks after the last tile close every list.
    """
    batch, heads, rows, tiles = kept.shape
    width = longest * blocks_per_tile + always
    blocks = torch.arange(tiles * blocks_per_tile + always, dtype=torch.int32, device=kept.device)
    indices = torch.empty(batch * heads, rows, width, dtype=torch.int32, device=kept.device)
    counts = kept.sum(-1, dtype=torch.int32) * blocks_per_tile + always
    flat = kept.flatten(0, 1)
    step = max(1, _CHUNK_BYTES // (rows * len(blocks) * 24))
    for first in range(0, len(flat), step):
        part = flat[first:first + step].repeat_interleave(blocks_per_tile, -1)
        part = torch.nn.functional.pad(part, (0, always), value=True)
        place = torch.where(part, part.cumsum(-1) - 1, width)      # the slot `width` collects what is not kept
        found = indices.new_zeros(*part.shape[:2], width + 1)
        indices[first:first + step] = found.scatter_(-1, place, blocks.expand(part.shape))[..., :width]
    indices = indices.view(batch, heads, rows, width)
    if blocks_per_tile == 1:
        return indices, counts
    return indices.repeat_interleave(blocks_per_tile, 2), counts.repeat_interleave(blocks_per_tile, 2)


def _mass_before(masses: Tensor, others: Tensor) -> Tensor:
    """In the place of every mass what is held already when its tile's turn comes; -1 for the query's own tile."""
    flat, base = masses.flatten(0, 1), others.flatten(0, 1)
    step = max(1, _CHUNK_BYTES // (masses.shape[2] * masses.shape[3] * 24))
    for first in range(0, len(flat), step):
        part = flat[first:first + step].nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        rank = part.clone()
        rank.diagonal(dim1=1, dim2=2).fill_(torch.inf)
        order = rank.sort(dim=-1, descending=True, stable=True).indices
        part.copy_(rank.scatter_(-1, order, _held_before(part.gather(-1, order), base[first:first + step])))
        part.diagonal(dim1=1, dim2=2).fill_(-1.0)
    return masses


def _keys_kept(kept: Tensor, sizes: Tensor) -> Tensor:
    """The tokens of every list.   kept: bool [B, H, N, N], sizes: [N]  ->  [B, H, N]"""
    flat = kept.flatten(0, 1)
    step = max(1, _CHUNK_BYTES // (flat.shape[1] * flat.shape[2] * sizes.element_size()))
    parts = [flat[first:first + step].to(sizes.dtype) @ sizes for first in range(0, len(flat), step)]
    return torch.cat(parts).view(kept.shape[:3])


def _held_before(ranked: Tensor, base: Tensor) -> Tensor:
    held = ranked.cumsum(-1).roll(1, -1)
    held[..., 0] = 0
    return held.add_(base.nan_to_num(nan=0.0)[..., None])


def _held(before: Tensor, kept: Tensor) -> Tensor:
    """The share that every row's list holds: what the first tile left out finds.   -> [B, H, N]"""
    return torch.where(kept, torch.ones((), dtype=before.dtype, device=before.device), before).amin(-1)


def _threshold_that_fits(before: Tensor, wanted: Tensor, most: float) -> Tensor:
    """The highest target up to `wanted` at which the lists of a batch entry hold at most `most` tiles together. [B]"""
    return torch.stack([_fitting(entry.flatten(), bound, most) for entry, bound in zip(before, wanted, strict=True)])


def _fitting(before: Tensor, wanted: Tensor, most: float) -> Tensor:
    """The same of one batch entry; waits for nothing.   before: [H*N*N], wanted: []"""
    low, high, whole = torch.zeros_like(wanted), wanted, None
    share = torch.linspace(0, 1, _EDGES + 1, dtype=wanted.dtype, device=wanted.device)
    for _ in range(_ROUNDS):
        edges = torch.lerp(low, high, share)
        fits = _counts_below(before, edges) <= most
        whole = fits[-1] if whole is None else whole
        last = fits.sum(0, keepdim=True) - 1               # the first fits: own tiles alone lie below it
        low, high = edges.gather(0, last)[0], edges.gather(0, (last + 1).clamp(max=_EDGES))[0]
    return torch.where(whole, wanted, low)


def _counts_below(values: Tensor, edges: Tensor) -> Tensor:
    """How many values lie below every edge, float64.   values: [n], edges: [E], rising"""
    bins, step = len(edges) + 1, _CHUNK_BYTES // 8
    found = torch.zeros(bins, dtype=torch.float64, device=values.device)
    for first in range(0, len(values), step):              # fewer than 2^24 at once: float32 counts them exactly
        place = torch.bucketize(values[first:first + step], edges, right=True, out_int32=True)
        found += torch.histc(place.float(), bins, min=-0.5, max=bins - 0.5)
    return found.cumsum(0)[:-1]


def _packed(kept: Tensor) -> Tensor:
    """bool [..., N] -> uint8 [..., ceil(N / 8)], the lowest bit first."""
    eighths = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    places = torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (eighths << places).sum(-1, dtype=torch.uint8)
