"""How much attention every query tile pays to every key tile, in float64 from the definition, one tile at a time."""
from __future__ import annotations

from itertools import product

import torch

from oracles import other_tokens, softmax, tokens_of_tiles


def tile_masses_oracle(q, k, thw, tile, prefix=0, suffix=0, hidden=()):
    """Softmax weight by key tile, mean over a query tile's tokens -> float64 ([B, H, N, N], [B, H, N] of the others).

    hidden: other tokens, counted from the first, that no query sees.
    """
    q, k, scale = q.double(), k.double(), q.shape[-1] ** -0.5
    tiles, others = tokens_of_tiles(thw, tile, prefix), other_tokens(thw, prefix, suffix)
    seen = [token for place, token in enumerate(others) if place not in hidden]
    masses = torch.zeros(q.shape[0], q.shape[2], len(tiles), len(tiles), dtype=torch.float64)
    rest = torch.zeros(masses.shape[:3], dtype=torch.float64)
    for b, h in product(range(q.shape[0]), range(q.shape[2])):
        for i, tokens in enumerate(tiles):
            order = [token for keys in tiles for token in keys] + seen
            weights = softmax(q[b, tokens, h] @ k[b, order, h].T * scale).mean(0)
            start = 0
            for j, keys in enumerate(tiles):
                masses[b, h, i, j] = weights[start:start + len(keys)].sum()
                start += len(keys)
            rest[b, h, i] = weights[start:].sum()
    return masses, rest


def held(masses, others, kept):
    """What lists hold of it -> [B, H, N].   kept: bool [B, H, N, N]"""
    return (masses * kept).sum(-1) + others
