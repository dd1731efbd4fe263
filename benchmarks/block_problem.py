"""Block-sparse attention problems at the sizes of real clips, and what of a result can be checked at such sizes."""
from __future__ import annotations

import math
from itertools import product
from typing import NamedTuple

import torch

BLOCK = 64


class Shape(NamedTuple):
    """heads and head_dim of a model, and its token grid (t, h, w) for one clip; tiles are 4 x 4 x 4."""

    name: str
    heads: int
    grid: tuple[int, int, int]
    dim: int


SHAPES = (
    Shape("H12 32760", 12, (21, 30, 52), 128),
    Shape("H40 32760", 40, (21, 30, 52), 128),
    Shape("H40 75600", 40, (21, 45, 80), 128),
    Shape("H24 118800", 24, (33, 45, 80), 128),
    Shape("H40 75600 D64", 40, (21, 45, 80), 64),
)
TINY = Shape("tiny", 1, (5, 8, 12), 64)
"""What a dry run computes instead."""
LISTS = ("random", "video")


class Problem(NamedTuple):
    """q, k, v: [1, N*64, H, D] in tile order, padding zero; the rest as `kernels.block_sparse_attention` takes it."""

    shape: Shape
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    indices: torch.Tensor
    counts: torch.Tensor
    sizes: torch.Tensor

    def operands(self):
        return self[1:]

    def useful_flop(self) -> float:
        """Multiplications and additions over valid queries and valid keys of the lists, two products each."""
        sizes = self.sizes.double()
        keys = sizes[self.indices.long()].sum(-1)                           # [1, H, N]
        return float((keys * sizes).sum()) * 4 * self.shape.dim


def tile_sizes(grid) -> list[int]:
    """Valid tokens of every 4 x 4 x 4 tile in (t, h, w) order."""
    edges = [[min(4, size - at) for at in range(0, size, 4)] for size in grid]
    return [math.prod(edge) for edge in product(*edges)]


def make_problem(shape: Shape, sparsity: float, lists: str, device, dtype=torch.bfloat16) -> Problem:
    """lists "random": any blocks. "video": the best by pooled scores of queries and keys that vary smoothly over the
    clip, so that neighbouring rows choose alike."""
    generator = torch.Generator(device).manual_seed(7)
    sizes = torch.tensor(tile_sizes(shape.grid), dtype=torch.int32, device=device)
    blocks = len(sizes)
    kept = min(blocks, max(1, math.ceil(round((1 - sparsity) * blocks, 6))))
    valid = (torch.arange(BLOCK, device=device) < sizes[:, None]).flatten()[None, :, None, None]

    def noise():
        size = (1, blocks * BLOCK, shape.heads, shape.dim)
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    if lists == "random":
        q, k = noise(), noise()
        scores = torch.rand(1, shape.heads, blocks, blocks, generator=generator, device=device)
    else:
        field = smooth_field(shape, generator, device)                      # [N, H, D]
        spread = field.repeat_interleave(BLOCK, 0)[None].to(dtype)
        q, k = noise() + spread, noise() + spread
        scores = torch.einsum("nhd,mhd->hnm", field, field)[None]
    v = noise()
    for x in (q, k, v):
        x.mul_(valid)
    indices = scores.topk(kept, dim=-1).indices.sort(dim=-1).values.int()
    counts = torch.full(indices.shape[:3], kept, dtype=torch.int32, device=device)
    return Problem(shape, q, k, v, indices, counts, sizes)


def smooth_field(shape: Shape, generator, device) -> torch.Tensor:
    """Random features per tile, averaged over up to 3 x 5 x 5 neighbours, of unit variance. [N, H, D]"""
    tiles = [math.ceil(size / 4) for size in shape.grid]
    field = torch.randn(shape.heads, shape.dim, *tiles, generator=generator, device=device)
    window = [min(wanted, size - 1 + size % 2) for wanted, size in zip((3, 5, 5), tiles, strict=True)]
    field = torch.nn.functional.avg_pool3d(field, window, stride=1, padding=[side // 2 for side in window],
                                           count_include_pad=False)
    return (field / field.std()).flatten(2).permute(2, 0, 1).contiguous()


def sampled_error(out: torch.Tensor, problem: Problem, dense: bool, samples: int = 6) -> float:
    """Worst relative L2 of some query blocks of the first and last head against float64."""
    q, k, v, indices, _, sizes = problem.operands()
    blocks, worst = len(sizes), 0.0
    slot = torch.arange(BLOCK, device=q.device)
    for head in {0, problem.shape.heads - 1}:
        for row in {round(i * (blocks - 1) / max(samples - 1, 1)) for i in range(samples)}:
            listed = torch.arange(blocks, device=q.device) if dense else indices[0, head, row].long()
            seen = (listed[:, None] * BLOCK + slot)[slot < sizes[listed][:, None]]
            rows = slice(row * BLOCK, row * BLOCK + int(sizes[row]))
            queries, keys, values = (x[0, part, head].double() for x, part in ((q, rows), (k, seen), (v, seen)))
            wanted = torch.softmax(queries @ keys.T * problem.shape.dim ** -0.5, -1) @ values
            error = (out[0, rows, head].double() - wanted).norm() / wanted.norm()
            worst = max(worst, float(error) if math.isfinite(error) else math.inf)
    return worst
