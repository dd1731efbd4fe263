"""What a better approximation of the tiles that are left out would gain: the far field, and what lies beyond it.

    python quality/far_field_orders.py [--seeds 16] [--out FILE]

Clips of the tiny model, with the tiles that VSA chooses by tile means, in plain torch. Tiles that a query tile does not
read are told to its softmax in several ways, from not at all to each tile's second order. First the error of attention
calls of dense samplings, a screen; then finished clips, sampled so after a dense start, against the dense ones.
"""
import argparse
import functools
import itertools
import math
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "dev"))
from load_pack import load_pack  # noqa: E402

load_pack()
from pack.quality import judge, methods  # noqa: E402
from pack.quality.gated import tiles_of, tokens_of  # noqa: E402
from pack.quality.table import KEPT, SEED, begin  # noqa: E402

GRID = 8, 16, 16
SHARES, DENSE_STEPS, EVERY = (0.1, 0.2, 0.3), 3, 20
DENSE = "dense"
WAYS = {
    "left out": "nothing of them",
    "far field": "a mean value and a mass per query tile: what the nodes do",
    "mass to first order": "the same, and the mass goes with the query: a vector per query tile",
    "mass and value to first order": "both go with the query: a matrix per query tile besides",
    "pooled tiles": "every query weighs the mean keys itself",
    "pooled tiles to second order": "and with each tile's covariances of keys and values",
}

ON_CLIPS = tuple(WAYS)[:-1]


def answers(q, k, v, share, ways):
    """({way: attention}, dense attention, if that is among the ways) of q, k and v [B, H, tiles, 64, D]."""
    scale, tiles, size = q.shape[-1] ** -0.5, q.shape[2], q.shape[3]
    scores = torch.einsum("bhqid,bhkjd->bhqikj", q, k) * scale
    mean_q, mean_k, mean_v = (x.mean(3) for x in (q, k, v))
    pooled = mean_q @ mean_k.transpose(-1, -2) * scale                                   # [B, H, tiles, tiles]
    listed = torch.zeros_like(pooled, dtype=torch.bool).scatter_(
        -1, pooled.topk(max(1, round(share * tiles))).indices, True)
    peak = scores.amax((-2, -1), keepdim=True)
    every = (scores - peak).exp()
    weights = every.masked_fill(~listed[:, :, :, None, :, None], 0)
    mass, value = weights.sum((-2, -1)), torch.einsum("bhqikj,bhkjd->bhqid", weights, v)

    logits = (pooled + math.log(size)).masked_fill(listed, -torch.inf)
    lse, shares = logits.logsumexp(-1), logits.softmax(-1)
    far, apart = (shares @ mean_v)[:, :, :, None], q - mean_q[:, :, :, None]
    slope = shares @ mean_k * scale                                                      # of the mass
    grown = lse[..., None] + torch.einsum("bhqid,bhqd->bhqi", apart, slope)
    at_query = torch.einsum("bhqid,bhkd->bhqik", q, mean_k) * scale + math.log(size)
    at_query = at_query.masked_fill(listed[:, :, :, None], -torch.inf)

    def joined(far_mass, far_value):
        """far_mass: its logarithm, [B, H, tiles, tokens].   far_value: [B, H, tiles, tokens, D]"""
        extra = (far_mass - peak[..., 0, 0]).exp()
        return (value + extra[..., None] * far_value) / (mass + extra)[..., None]

    def value_to_first_order():
        turn = torch.einsum("bhqk,bhkd,bhke->bhqde", shares, mean_k, mean_v) * scale
        return far + torch.einsum("bhqid,bhqde->bhqie", apart, turn - slope[..., None] * far)

    def second_order():
        spread = scores - scores.mean(-1, keepdim=True)
        told = at_query + 0.5 * spread.square().mean(-1)
        tilted = torch.einsum("bhqikj,bhkjd->bhqikd", spread, v - mean_v[:, :, :, None]) / size
        of = told.softmax(-1)
        return joined(told.logsumexp(-1), torch.einsum("bhqik,bhkd->bhqid", of, mean_v)
                      + torch.einsum("bhqik,bhqikd->bhqid", of, tilted))

    makers = {
        DENSE: lambda: torch.einsum("bhqikj,bhkjd->bhqid", every, v) / every.sum((-2, -1))[..., None],
        "left out": lambda: value / mass[..., None],
        "far field": lambda: joined(lse[..., None].expand_as(grown), far),
        "mass to first order": lambda: joined(grown, far),
        "mass and value to first order": lambda: joined(grown, value_to_first_order()),
        "pooled tiles": lambda: joined(at_query.logsumexp(-1), at_query.softmax(-1) @ mean_v[:, :, None]),
        "pooled tiles to second order": second_order,
    }
    return {way: makers[way]() for way in ways}


def attention_of(model, attend):
    """A clone of the model whose self-attention is attend(q, k, v, transformer options) of [B, tokens, H, D], or its
    own where that gives None."""
    clone = model.clone()

    def override(func, q, k, v, *args, **kwargs):
        if q.shape[-2] == k.shape[-2]:
            heads = args[0] if args else kwargs["heads"]
            parts = [x.unflatten(-1, (heads, -1)) for x in (q, k, v)]
            found = attend(*parts, kwargs["transformer_options"])
            if found is not None:
                return found.flatten(2)
        return func(q, k, v, *args, **kwargs)
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


def errors_of_calls(seed):
    """[(share, {way: relative L2}), ...] of the self-attention calls of a dense sampling, one of EVERY."""
    from pack.quality import clips
    found, calls = [], itertools.count(1)

    def look(q, k, v, options):
        if next(calls) % EVERY == 0:
            parts = [tiles_of(x[:1].double(), GRID) for x in (q, k, v)]
            for share in SHARES:
                several = answers(*parts, share, (DENSE, *WAYS))
                exact = several.pop(DENSE)
                found.append((share, {way: judge.relative(x, exact) for way, x in several.items()}))
    clips.sample(attention_of(clips.load("dense"), look), seed)
    return found


def error_of_a_clip(seed, way, share):
    """Relative L2 of the finished latent against the dense one."""
    from pack.quality import clips

    def approximate(q, k, v, options):
        step = int((options["sample_sigmas"] > options["sigmas"].max() + 1e-6).sum())
        if step >= DENSE_STEPS:
            tiles = [tiles_of(x, GRID) for x in (q, k, v)]
            return tokens_of(answers(*tiles, share, (way,))[way], GRID)
    return judge.relative(clips.sample(attention_of(clips.load("dense"), approximate), seed), dense_clip(seed))


@functools.lru_cache
def dense_clip(seed):
    from pack.quality import clips
    return clips.sample(clips.load("dense"), seed)


def table(caption, figures):
    """figures: {(way, share): number}"""
    shares = list(dict.fromkeys(share for _, share in figures))
    lines = [f"| {caption} | " + " | ".join(f"{share:.0%} of {methods.TILES} tiles" for share in shares) + " | |",
             "| --- |" + " --- |" * (len(shares) + 1)]
    for way in dict.fromkeys(way for way, _ in figures):
        lines.append(f"| {way} | " + " | ".join(f"{figures[way, share]:.3f}" for share in shares) + f" | {WAYS[way]} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--shares", default="0.1,0.2,0.3", help="of the tiles, for the finished clips")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=KEPT / "far_field_orders.md")
    args = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    shares = [float(share) for share in args.shares.split(",")]
    seeds, begun = range(SEED, SEED + args.seeds), time.time()
    cases = [(seed, way, share) for seed in seeds for way in ON_CLIPS for share in shares]
    with ProcessPoolExecutor(args.jobs, initializer=begin) as pool:
        calls = [call for clip in pool.map(errors_of_calls, seeds[:2]) for call in clip]
        errors = {}
        for done, (case, error) in enumerate(zip(cases, pool.map(error_of_a_clip, *zip(*cases, strict=True)),
                                                 strict=True), 1):
            errors[case] = error
            print(f"\rclip {done} of {len(cases)}, {time.time() - begun:.0f} s\x1b[K", end="", flush=True)
    print()
    screen = {(way, share): statistics.mean(one[way] for of, one in calls if of == share)
              for way in WAYS for share in SHARES}
    finished = {(way, share): statistics.median(errors[seed, way, share] for seed in seeds)
                for way in ON_CLIPS for share in shares}
    text = "\n\n".join([
        table(f"error of a call, mean of {len(calls) // len(SHARES)}", screen),
        table(f"latent error of the finished clip, median of {args.seeds}, {DENSE_STEPS} dense steps", finished)])
    args.out.write_text(f"`{' '.join(['python quality/far_field_orders.py', *sys.argv[1:]])}`, torch "
                        f"{torch.__version__}\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    main()
