"""Attention to chunks of keys: exactly, every query to those it chose, or in blocks of 64 queries that choose together.

Exactly: all queries attend to their own chunk; then the queries of a head that chose a chunk are gathered, chunk by
chunk, and attend to it; what a query got is merged by its log-sum-exp. It is one softmax over all that a query sees.
Kernels run block lists as always: nothing here needs a kernel of its own.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..kernels import BLOCK, block_sparse_attention, tile_means
from .chunk_gate import ChunkRule, choose
from .chunks import Chunks

OnSelection = Callable[[Tensor, Chunks], None]
"""Told, for one element and head after the other, the other chunks that are looked at, bool [queries, C]. Queries are
the video's tokens in raster order, or blocks of 64 of them in the order of the chunks."""

_GATHERED_BYTES = {"cpu": 32 << 20}
"""Bound on gathered queries and their results held at once."""
_GATHERED_BYTES_ELSEWHERE = 256 << 20
_LIST_BYTES = 64 << 20
"""Bound on the lists of one launch."""


def attend_exactly(q: Tensor, k: Tensor, v: Tensor, chunks: Chunks, rule: ChunkRule, scale: float, backend: str,
                   on_selection: OnSelection | None = None) -> Tensor:
    """Every query of the video attends to its own chunk, those that it chose, and all tokens that are not video.

    q, k, v: [B, S, H, D] in the order of the sequence -> the same, contiguous.
    """
    batch, heads = q.shape[0], q.shape[2]
    lists = (x.expand(batch, heads, *x.shape) for x in (chunks.own_indices, chunks.own_counts))
    out, lse = block_sparse_attention(q, k, v, *lists, chunks.layout.kernel_block_sizes, scale, backend, True,
                                      token_rows=chunks.layout.token_rows)
    means, video = chunks.means(k, backend), chunks.video
    rows = chunks.layout.token_rows[:chunks.video_slots].clamp(min=0).long()
    for b in range(batch):
        for h, chosen in enumerate(choose(q[b, video], means[b], chunks.own, rule)):
            if on_selection is not None:
                on_selection(chosen, chunks)
            keys, values = (x[b, :, h].index_select(0, rows)[None, :, None] for x in (k, v))
            _add_chosen(out[b, video, h], lse[b, h, video], q[b, video, h], keys, values, chosen, chunks, scale,
                        backend)
    return out


def _add_chosen(out: Tensor, lse: Tensor, q: Tensor, keys: Tensor, values: Tensor, chosen: Tensor, chunks: Chunks,
                scale: float, backend: str) -> None:
    """Merge what one head's queries get from the chunks that they chose into their attention so far, in place.

    out, q: [n, D];  lse: [n];  keys, values: [1, slots, 1, D];  chosen: bool [n, C]
    """
    tokens, dim = q.shape
    taken = chosen.sum(0)
    in_blocks = -(-taken // BLOCK)
    chunk, query = chosen.T.nonzero(as_tuple=True)                     # by chunk, then by query
    if not len(query):
        return
    first, before = (x.cumsum(0) - x for x in (in_blocks * BLOCK, taken))
    chunk_of = torch.arange(chunks.number, device=q.device).repeat_interleave(in_blocks)
    rows = torch.full((len(chunk_of) * BLOCK,), tokens, device=q.device)
    rows[(first - before)[chunk] + torch.arange(len(query), device=q.device)] = query
    place = torch.arange(chunks.per_chunk, device=q.device)
    lists = (chunk_of[:, None] * chunks.per_chunk + place).to(torch.int32)[None, None]
    counts = chunks.blocks[chunk_of][None, None]
    wide = torch.promote_types(q.dtype, torch.float32)
    total = torch.cat([out, out.new_ones(tokens, 1)], 1).to(wide)      # the last column sums up weights
    peak = lse.to(wide, copy=True)
    per_block = BLOCK * dim * (2 * q.element_size() + 2 * total.element_size())
    step = max(1, _GATHERED_BYTES.get(q.device.type, _GATHERED_BYTES_ELSEWHERE) // per_block)
    for start in range(0, len(chunk_of), step):
        part = slice(start, start + step)
        picked = rows[start * BLOCK:(start + step) * BLOCK]
        gathered = q.index_select(0, picked.clamp(max=tokens - 1))[None, :, None]
        more, more_lse = block_sparse_attention(gathered, keys, values, lists[:, :, part], counts[:, :, part],
                                                chunks.video_sizes, scale, backend, True)
        _merge(total, peak, more[0, :, 0], more_lse[0, 0].to(wide), picked)
    out.copy_(total[:, :-1] / total[:, -1:])


def _merge(total: Tensor, peak: Tensor, more: Tensor, lse: Tensor, rows: Tensor) -> None:
    """Add the results `more` [m, D] of the queries `rows`, weighted by their log-sum-exp, in place.

    total: [n, D + 1] sums weighted by exp(-peak), then the weights' own sum;  peak: [n];  lse: [m];  rows: n for none.
    A sum per query in a fixed order: the same seed gives the same clip.
    """
    tokens = len(peak)
    lse = torch.where(rows < tokens, lse, -torch.inf)
    higher = torch.cat([peak, peak.new_zeros(1)]).scatter_reduce_(0, rows, lse, "amax")
    total *= (peak - higher[:-1]).exp_()[:, None]
    weighted = torch.cat([more, more.new_ones(len(more), 1)], 1).to(total.dtype)
    ordered, order = rows.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(tokens + 1, device=rows.device))
    weights = (lse - higher[rows]).exp_()[order]
    total += embedding_bag(order, weighted, starts, mode="sum", per_sample_weights=weights)[:-1]
    peak.copy_(higher[:-1])


def attend_pooled(q: Tensor, k: Tensor, v: Tensor, chunks: Chunks, rule: ChunkRule, scale: float, backend: str,
                  on_selection: OnSelection | None = None) -> Tensor:
    """As `attend_exactly`, but the 64 queries of a block share what their mean chooses: not VMoBA, and much cheaper."""
    batch, heads, layout = q.shape[0], q.shape[2], chunks.layout
    blocks = chunks.number * chunks.per_chunk
    means = chunks.means(k, backend)
    pooled = tile_means((q,), layout.token_rows, blocks, 1, backend)[0].transpose(1, 2)
    filled = (chunks.video_sizes > 0).nonzero()[:, 0]
    own = filled // chunks.per_chunk
    own_too = own[:, None] == torch.arange(chunks.number, device=q.device)
    at_once = max(1, _LIST_BYTES // (4 * batch * blocks * len(layout.kernel_block_sizes)))
    parts, seen = [], []
    chosen = [choose(pooled[b, filled], means[b], own, rule) for b in range(batch)]
    for h in range(heads):
        seen.append(torch.stack([next(of) for of in chosen]))                           # [B, filled, C]
        if on_selection is not None:
            for of in seen[-1]:
                on_selection(of, chunks)
        if len(seen) == at_once or h == heads - 1:
            indices, counts = _lists(torch.stack(seen, 1) | own_too, filled, chunks)
            part = slice(h + 1 - len(seen), h + 1)
            parts.append(block_sparse_attention(q[:, :, part], k[:, :, part], v[:, :, part], indices, counts,
                                                layout.kernel_block_sizes, scale, backend,
                                                token_rows=layout.token_rows))
            seen = []
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _lists(seen: Tensor, filled: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """indices and counts, as a kernel wants them, for the chunks that blocks of queries see, bool [B, H, filled, C]."""
    sizes = chunks.layout.kernel_block_sizes
    blocks = chunks.number * chunks.per_chunk
    read = seen.repeat_interleave(chunks.per_chunk, -1) & (sizes[:blocks] > 0)
    others = torch.ones((), dtype=torch.bool, device=seen.device).expand(*read.shape[:-1], len(sizes) - blocks)
    read = torch.cat([read, others], -1)
    of_filled = read.sum(-1, dtype=torch.int32)
    longest = int(of_filled.max())
    order = torch.sort((~read).byte(), dim=-1, stable=True).indices[..., :longest].to(torch.int32)
    indices = order.new_zeros((*seen.shape[:2], blocks, longest)).index_copy_(2, filled, order)
    counts = of_filled.new_zeros((*seen.shape[:2], blocks)).index_copy_(2, filled, of_filled)
    return indices, counts
