"""Sparse-linear attention from its definition in float64, one run of queries at a time. Shares no code with the pack.

Tensors are [B, S, H, D]; a run is `query_run` or 64 consecutive tokens, the last one may be short. `others` are tokens
behind the runs that every query reads and whose queries read everything.
"""
from __future__ import annotations

import math
from itertools import product

import torch

PHI = {"softmax": lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
       "elu": lambda x: torch.where(x > 0, x + 1, x.exp()),
       "relu": lambda x: x * (x > 0)}


def runs_of(tokens: int, run: int) -> list[list[int]]:
    return [list(range(first, min(first + run, tokens))) for first in range(0, tokens, run)]


def best(scores: list[float], count: int) -> list[int]:
    """The `count` highest scores' places, ascending; equal scores go to the lower place."""
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count])


def kept_lists(q, k, ratio, query_run, video=None) -> tuple[dict, dict]:
    """((b, h, run) -> runs of keys that upstream's rule keeps, the same -> gap between the last kept and the next).

    Upstream's steps: k minus its mean, means of runs, unscaled products, int(ratio * runs) of them; but one at least.
    """
    video = q.shape[1] if video is None else video
    queries, keys = runs_of(video, query_run), runs_of(video, 64)
    count = min(len(keys), max(1, int(ratio * len(keys))))
    lists, gaps = {}, {}
    for b, h in product(range(q.shape[0]), range(q.shape[2])):
        smooth = k[b, :video, h].double() - k[b, :video, h].double().mean(0)
        pooled = torch.stack([smooth[run].mean(0) for run in keys])
        for i, run in enumerate(queries):
            scores = (pooled @ q[b, run, h].double().mean(0)).tolist()
            lists[b, h, i] = best(scores, count)
            ranked = sorted(scores, reverse=True)
            gaps[b, h, i] = ranked[count - 1] - ranked[count] if count < len(ranked) else math.inf
    return lists, gaps


def linear_oracle(q, k, v, weight, bias, feature, seen=None):
    """proj_l(o_l) in upstream's order: o_l per token first, then the projection. [B, S, H, D]"""
    phi, out = PHI[feature], torch.empty(q.shape, dtype=torch.float64)
    seen = list(range(k.shape[1])) if seen is None else seen
    for b, h in product(range(q.shape[0]), range(q.shape[2])):
        queries, keys, values = phi(q[b, :, h].double()), phi(k[b, seen, h].double()), v[b, seen, h].double()
        weights = queries @ keys.T                                  # every query with every key
        out[b, :, h] = (weights @ values) / (1e-5 + weights.sum(1, keepdim=True))
    return out @ weight.double().T + bias.double()


def sla_oracle(q, k, v, ratio, query_run, feature="softmax", weight=None, bias=None, lists=None, video=None,
               hidden=(), scale=None):
    """The whole of SLA; without a weight the sparse branch alone."""
    video = q.shape[1] if video is None else video
    others = [token for token in range(video, q.shape[1]) if token not in hidden]
    lists = lists or kept_lists(q, k, ratio, query_run, video)[0]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    keys, out = runs_of(video, 64), torch.empty(q.shape, dtype=torch.float64)
    for b, h in product(range(q.shape[0]), range(q.shape[2])):
        rows = [(run, [token for j in lists[b, h, i] for token in keys[j]] + others)
                for i, run in enumerate(runs_of(video, query_run))]
        rows.append((list(range(video, q.shape[1])), list(range(video)) + others))
        for run, seen in rows:
            scores = q[b, run, h].double() @ k[b, seen, h].double().T * scale
            weights = (scores - scores.amax(1, keepdim=True)).exp() if run else scores
            out[b, run, h] = weights @ v[b, seen, h].double() / weights.sum(1, keepdim=True)
    if weight is not None:
        seen = [token for token in range(q.shape[1]) if token not in hidden]
        out += linear_oracle(q, k, v, weight, bias, feature, seen)
    return out


def worst_run(found, wanted, run=64) -> float:
    """Largest relative L2 of a (batch, head, run of `run` queries)."""
    missed, size = (found.double() - wanted.double()), wanted.double()
    return max(float(missed[b, rows, h].norm() / size[b, rows, h].norm())
               for b, h in product(range(found.shape[0]), range(found.shape[2]))
               for rows in runs_of(found.shape[1], run))
