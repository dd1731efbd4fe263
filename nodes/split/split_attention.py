"""Attention of one card among several: rows are traded for heads before it, and back behind it."""
from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...kernels import Span
from ..hook.layout import from_bshd, to_bshd
from ..trained.gates import FED, FedGate, HeldGate
from .shard import CannotSplit, Shard

_NAMES = "mask", "attn_precision", "skip_reshape", "skip_output_reshape"


@dataclass
class Times:
    """What one card did in one forward pass."""

    exchange: list[Span] = field(default_factory=list)
    attention: list[Span] = field(default_factory=list)


def split_attention(found, shard: Shard, contexts: frozenset[int], times: Times):
    """An override around `found`, the one that was there, or None: it sees all tokens and this card's heads.

    contexts: lengths of the sequences that cross-attention reads.
    """
    group = shard.group

    def override(func, q, k, v, heads, *args, **kwargs):
        given = {**dict(zip(_NAMES, args, strict=False)), **kwargs}
        call = func if found is None else partial(found, func)
        if shard.joined is None or not q.shape[-2] == k.shape[-2] == shard.local:
            return call(q, k, v, heads, **given)      # queries of some rows that read a whole sequence of another kind
        _require(shard, q, k, v, heads, contexts)
        skip = given.get("skip_reshape", False)
        parts, options = [to_bshd(x, heads, skip) for x in (q, k, v)], given.get("transformer_options") or {}
        if isinstance(fed := options.get(FED), FedGate):
            parts.append(fed.layer(fed.x).to(q.dtype).unflatten(-1, (heads, -1)).reshape(parts[0].shape))
        shares = group.heads_of(heads)
        shard.heads, mine = tuple(map(len, shares)), shares[group.rank_in_group]
        parts = _timed(times.exchange, q.device, _to_heads, shard, parts)
        if len(parts) > 3:
            options = {**options, FED: HeldGate(parts[3], mine)}
        mask = given.get("mask")
        if mask is not None and mask.ndim == 4 and mask.shape[1] == heads > 1:
            mask = mask[:, mine.start:mine.stop]
        given |= {"mask": mask, "skip_reshape": False, "skip_output_reshape": False, "transformer_options": options}
        skip_output = kwargs.get("skip_output_reshape", args[3] if len(args) > 3 else False)
        out = _timed(times.attention, q.device, call, *(x.flatten(2) for x in parts[:3]), len(mine), **given)
        out = _timed(times.exchange, q.device, _to_rows, shard, out.unflatten(-1, (len(mine), -1)), heads)
        return from_bshd(out, skip_output)

    return torch.compiler.disable(override)


def _require(shard: Shard, q: Tensor, k: Tensor, v: Tensor, heads: int, contexts: frozenset[int]) -> None:
    if not q.shape == k.shape == v.shape:
        raise CannotSplit("fewer key heads than query heads")
    if any(sum(rows[rank] for rows in shard.joined) in contexts for rank in range(shard.group.world_size)):
        raise CannotSplit("as many tokens on a card as the text has: self- or cross-attention")
    if heads < shard.group.world_size:
        raise CannotSplit(f"attention with {heads} heads on {shard.group.world_size} cards")


def _to_heads(shard: Shard, parts: list[Tensor]) -> list[Tensor]:
    """This card's rows of all heads -> all rows of its heads, stream behind stream."""
    streams, first, rank = [], 0, shard.group.rank_in_group
    for rows in shard.joined:
        streams.append(shard.group.heads_from_sequence([x[:, first:first + rows[rank]] for x in parts], rows))
        first += rows[rank]
    return streams[0] if len(streams) == 1 else [torch.cat(both, dim=1) for both in zip(*streams, strict=True)]


def _to_rows(shard: Shard, out: Tensor, heads: int) -> Tensor:
    """The inverse, of one tensor."""
    sizes = [sum(rows) for rows in shard.joined]
    parts = [shard.group.sequence_from_heads(x, rows, heads)
             for x, rows in zip(out.split(sizes, dim=1), shard.joined, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _timed(spans: list[Span], device: torch.device, run, *args, **kwargs) -> Any:
    span = Span(device)
    out = run(*args, **kwargs)
    span.end()
    spans.append(span)
    return out
