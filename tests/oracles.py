"""Float64 answers from the definitions, one token, tile or query group at a time. Shares no code with the pack.

Tensors are [B, S, H, D] in raster order: `prefix` tokens, then the video's (t, h, w), then `suffix` tokens.
A tile is numbered (t, h, w) too. Nothing here is fast, and nothing here is clever.
"""
from __future__ import annotations

import math
from fractions import Fraction
from itertools import product

import torch


def tile_of_token(thw, tile) -> list[int]:
    """The tile of every video token in raster order, by integer division of its coordinates."""
    _, along_h, along_w = (math.ceil(Fraction(size, side)) for size, side in zip(thw, tile))
    return [((t // tile[0]) * along_h + h // tile[1]) * along_w + w // tile[2]
            for t, h, w in product(*map(range, thw))]


def tokens_of_tiles(thw, tile, prefix=0) -> list[list[int]]:
    """For every tile its tokens' places in the raster sequence, in raster order."""
    owner = tile_of_token(thw, tile)
    tiles = [[] for _ in range(max(owner) + 1)]
    for place, index in enumerate(owner):
        tiles[index].append(prefix + place)
    return tiles


def other_tokens(thw, prefix=0, suffix=0) -> list[int]:
    """The places of prefix and suffix tokens in the raster sequence."""
    after_video = prefix + math.prod(thw)
    return [*range(prefix), *range(after_video, after_video + suffix)]


def tiled_layout(thw, tile, prefix=0, suffix=0) -> list[int | None]:
    """For every slot of the tiled sequence the raster place of its token, None where the slot is padding."""
    slots = 64 * math.ceil(Fraction(math.prod(tile), 64))
    layout = []
    for tokens in tokens_of_tiles(thw, tile, prefix):
        layout += tokens + [None] * (slots - len(tokens))
    others = other_tokens(thw, prefix, suffix)
    return layout + others + [None] * (-len(others) % 64)


def exact_topk(sparsity, num_tiles: int) -> int:
    """clamp(ceil((1 - sparsity) * num_tiles), 1, num_tiles), exact for the decimal number as written."""
    kept = math.ceil((1 - Fraction(str(sparsity))) * num_tiles)
    return min(max(kept, 1), num_tiles)


def top_indices(scores: list[float], k: int) -> list[int]:
    """The k highest scores' indices, ascending; equal scores go to the lower index, NaN is lower than any number."""
    def preference(j):
        return (True, 0.0, j) if math.isnan(scores[j]) else (False, -scores[j], j)

    best_first = sorted(range(len(scores)), key=preference)
    return sorted(best_first[:k])


def softmax(scores: torch.Tensor) -> torch.Tensor:
    weights = (scores - scores.max(dim=-1, keepdim=True).values).exp()
    return weights / weights.sum(dim=-1, keepdim=True)


def attend(q, k, v, scale) -> torch.Tensor:
    """Softmax attention of queries [n, D] over keys and values [m, D]."""
    return softmax(q @ k.T * scale) @ v


def dense_attention_oracle(q, k, v, scale=None) -> torch.Tensor:
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(q)
    for b, h in product(range(q.shape[0]), range(q.shape[2])):
        out[b, :, h] = attend(q[b, :, h], k[b, :, h], v[b, :, h], scale)
    return out


def vsa_attention_oracle(q, k, v, gate, thw, tile, sparsity_or_k, prefix=0, suffix=0, scale=None, selection=None):
    """Video sparse attention -> (out, selection, gaps), both keyed by (b, h, query tile).

    sparsity_or_k: an int is the number of tiles kept, anything else a sparsity. selection: read only the tiles that
    selection[b, h, i] names, instead of the best-scored ones. gaps: how far the last tile kept by score lies above
    the first one left out, inf when all are kept. gate None leaves the coarse term out.
    """
    q, k, v = q.double(), k.double(), v.double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tiles = tokens_of_tiles(thw, tile, prefix)
    others = other_tokens(thw, prefix, suffix)
    kept = sparsity_or_k if type(sparsity_or_k) is int else exact_topk(sparsity_or_k, len(tiles))
    assert 1 <= kept <= len(tiles), f"found {kept} tiles to keep of {len(tiles)}"
    out, chosen, gaps = torch.empty_like(q), {}, {}
    for b, h in product(range(q.shape[0]), range(q.shape[2])):
        queries, keys, values = q[b, :, h], k[b, :, h], v[b, :, h]
        q_means, k_means, v_means = (torch.stack([x[tokens].mean(dim=0) for tokens in tiles])
                                     for x in (queries, keys, values))
        scores = q_means @ k_means.T * scale
        for i, tokens in enumerate(tiles):
            ranked = sorted(scores[i].tolist(), reverse=True)
            gaps[b, h, i] = ranked[kept - 1] - ranked[kept] if kept < len(tiles) else math.inf
            chosen[b, h, i] = top_indices(scores[i].tolist(), kept) if selection is None else selection[b, h, i]
            seen = [token for j in chosen[b, h, i] for token in tiles[j]] + others
            out[b, tokens, h] = attend(queries[tokens], keys[seen], values[seen], scale)
            if gate is not None:
                out[b, tokens, h] += gate[b, tokens, h].double() * (softmax(scores[i]) @ v_means)
        if others:
            out[b, others, h] = attend(queries[others], keys, values, scale)
    return out, chosen, gaps


def vsa_one_query_oracle(q, k, v, gate, thw, tile, kept, place, prefix=0, suffix=0) -> list[list[list[float]]]:
    """The same definition for the single video query at raster `place`, in Python floats only -> [B][H][D]."""
    q, k, v = q.double().tolist(), k.double().tolist(), v.double().tolist()
    dim, tiles, others = len(q[0][0][0]), tokens_of_tiles(thw, tile, prefix), other_tokens(thw, prefix, suffix)
    mine = next(i for i, tokens in enumerate(tiles) if place in tokens)

    def dot(x, y):
        return math.fsum(a * b for a, b in zip(x, y)) / math.sqrt(dim)

    def mean(x, b, h, tokens):
        return [math.fsum(x[b][token][h][d] for token in tokens) / len(tokens) for d in range(dim)]

    def mix(scores, vectors):
        weights = [math.exp(score - max(scores)) for score in scores]
        return [math.fsum(w * x[d] for w, x in zip(weights, vectors)) / math.fsum(weights) for d in range(dim)]

    out = []
    for b in range(len(q)):
        out.append([])
        for h in range(len(q[0][0])):
            scores = [dot(mean(q, b, h, tiles[mine]), mean(k, b, h, tokens)) for tokens in tiles]
            seen = [token for j in top_indices(scores, kept) for token in tiles[j]] + others
            fine = mix([dot(q[b][place][h], k[b][token][h]) for token in seen], [v[b][token][h] for token in seen])
            coarse = mix(scores, [mean(v, b, h, tokens) for tokens in tiles])
            gates = [0.0] * dim if gate is None else gate.double()[b, place, h].tolist()
            out[-1].append([f + g * c for f, g, c in zip(fine, gates, coarse)])
    return out


def selection_by_probe(attention, q, k, thw, tile, prefix=0, suffix=0) -> dict[tuple[int, int, int], list[int]]:
    """Which tiles every query tile reads, found from outside: a value is nonzero only in its own tile's column.

    attention(q, k, v) -> out, without a coarse term. A tile whose weight underflows for all queries goes unseen,
    and then does not matter to the output either.
    """
    tiles, dim, seen = tokens_of_tiles(thw, tile, prefix), q.shape[-1], {}
    for first in range(0, len(tiles), dim):
        columns = range(first, min(first + dim, len(tiles)))
        v = torch.zeros_like(k)
        for j in columns:
            v[:, tiles[j], :, j - first] = 1
        out = attention(q, k, v)
        for b, i, h in product(range(q.shape[0]), range(len(tiles)), range(q.shape[2])):
            weight = out[b, tiles[i], h].double().amax(dim=0)
            seen.setdefault((b, h, i), []).extend(j for j in columns if weight[j - first] > 0)
    return seen


def query_groups(thw, tile, prefix=0, suffix=0) -> list[list[int]]:
    """Raster places grouped as errors are judged: each tile, then the other tokens in runs of at most 64."""
    others = other_tokens(thw, prefix, suffix)
    return tokens_of_tiles(thw, tile, prefix) + [others[i:i + 64] for i in range(0, len(others), 64)]


def relative_l2_per_tile(actual, expected, thw, tile, prefix=0, suffix=0) -> torch.Tensor:
    """|actual - expected| / |expected| in float64 for every (batch, head, query group): [B, H, groups]."""
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape, f"{list(actual.shape)} against {list(expected.shape)}"
    errors = [(actual[:, g] - expected[:, g]).square().sum(dim=(1, 3)).sqrt()
              / expected[:, g].square().sum(dim=(1, 3)).sqrt() for g in query_groups(thw, tile, prefix, suffix)]
    return torch.stack(errors, dim=-1)
