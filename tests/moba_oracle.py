"""VMoBA in float64 from its definition: every gate at once, every pool sorted, one softmax over what a query sees.

Shares no code with the pack. Tensors are [B, S, H, D]: `prefix` tokens, the video's in raster order, `suffix` tokens.
"""
from __future__ import annotations

from itertools import product

import torch

PAIRS = [("topk", "query_head"), ("topk", "overall"), ("topk", "head_global"), ("threshold", "query_head"),
         ("threshold", "block"), ("threshold", "overall"), ("threshold", "head_global")]


def chunk_of_token(thw, size) -> list[int]:
    """The chunk of every video token in raster order; a size is frames, (h, w) or (t, h, w)."""
    t, h, w = thw
    if not isinstance(size, (tuple, list)):
        length = int(size * h * w)
        return [place // length for place in range(t * h * w)]
    ct, ch, cw = size if len(size) == 3 else (t, *size)
    rows, columns = -(-h // ch), -(-w // cw)
    return [(a // ct * rows + b // ch) * columns + c // cw for a, b, c in product(range(t), range(h), range(w))]


def _picked(values, is_own, mode, topk, threshold):
    """One pool: the places that are chosen besides the own ones, and how near the first loser was to the last winner.

    values: the pool's gates;  topk: how many others.
    """
    others = [i for i, own in enumerate(is_own) if not own]
    if mode == "topk":
        ranked = sorted(others, key=lambda i: -values[i])
        count = min(topk, len(others))
    else:
        low, high = min(values), max(values)
        span = high - low if high - low > 1e-6 else 1.0
        values = [(value - low) / span for value in values]
        total = sum(values) + 1e-6
        need = max(0.0, threshold - sum(value for value, own in zip(values, is_own) if own) / total)
        ranked = sorted(others, key=lambda i: -values[i])
        running, count = 0.0, len(others)
        for place, i in enumerate(ranked):
            running += values[i] / total
            if running >= need:
                count = place + 1
                break
    gap = values[ranked[count - 1]] - values[ranked[count]] if 0 < count < len(ranked) else 1.0
    return ranked[:count], gap


def moba_seen(q, k, owner, mode, pool, topk, threshold, queries=None):
    """bool [B, H, n, C]: the chunks that every query sees, its own one included; and the smallest gap at a cut.

    q, k: [B, n, H, D], video only;  owner: the chunk of every token;  queries: that of every query, where they differ.
    """
    batch, n, heads, _ = q.shape
    chunks = max(owner) + 1
    of = torch.tensor(owner)
    means = torch.stack([k[:, of == c].double().mean(1) for c in range(chunks)], 1)             # [B, C, H, D]
    gates = torch.einsum("bnhd,bchd->bhnc", q.double(), means)
    own = torch.nn.functional.one_hot(of if queries is None else torch.tensor(queries), chunks).bool()
    seen, smallest = own.expand(batch, heads, n, chunks).clone(), 1.0
    for b in range(batch):
        places = {
            "query_head": [[(h, s, c) for c in range(chunks)] for h in range(heads) for s in range(n)],
            "block": [[(h, s, c) for h in range(heads) for s in range(n)] for c in range(chunks)],
            "head_global": [[(h, s, c) for s in range(n) for c in range(chunks)] for h in range(heads)],
            "overall": [[(h, s, c) for h in range(heads) for s in range(n) for c in range(chunks)]],
        }[pool]
        for members in places:
            h, s, c = torch.tensor(members).T
            others = (topk - 1) * len({(int(x), int(y)) for x, y in zip(h, s)})
            chosen, gap = _picked(gates[b, h, s, c].tolist(), own[s, c].tolist(), mode, others, threshold)
            smallest = min(smallest, gap)
            for i in chosen:
                seen[b, h[i], s[i], c[i]] = True
    return seen, smallest


def moba_oracle(q, k, v, thw, size, mode="threshold", pool="query_head", topk=3, threshold=0.25, prefix=0, hidden=(),
                seen=None):
    """[B, S, H, D] in float64. hidden: places in the sequence that no query sees.   seen: what queries see, or None."""
    owner = chunk_of_token(thw, size)
    video = slice(prefix, prefix + len(owner))
    if seen is None:
        seen = moba_seen(q[:, video], k[:, video], owner, mode, pool, topk, threshold)[0]
    mask = torch.ones(q.shape[0], q.shape[2], q.shape[1], q.shape[1], dtype=torch.bool)
    mask[:, :, video, video] = seen[..., torch.tensor(owner)]
    mask[..., list(hidden)] = False
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.double())


def worst(found, wanted) -> float:
    """The largest relative L2 distance of any (batch, head, run of 64 queries)."""
    errors = []
    for first in range(0, found.shape[1], 64):
        part = slice(first, first + 64)
        off, size = ((x[:, part].transpose(1, 2).flatten(2).norm(dim=2)) for x in (found.double() - wanted, wanted))
        errors.append((off / size).max().item())
    return max(errors)
