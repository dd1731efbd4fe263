"""The attention problems that a kernel has to solve on the user's card before it is used there.

Small, fixed, the same in every process. Together they hold what a kernel can be asked: lists of 0, 1, an odd number and
all blocks, neighbours with equal lists, cut and empty blocks, tiles read in boxes and tokens in any order, tokens
before and behind the clip, hidden ones, a coarse branch, a softmax that has begun, the LSE, strides, batches, sharp
scores, lists long enough that a pipeline's ring turns several times, and more work than the card has multiprocessors.
What no query may see is NaN, and so is every output before it is written.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import gathered, reference, reference_int8
from .guarded import Guarded
from .spec import BLOCK, Call, KernelSpec
from .tile_grid import TileGrid

TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4, torch.float32: 1e-5, torch.float64: 1e-6}
"""Largest relative L2 of a block of queries against float64. A dropped block is above 0.1."""
IN_HALF = TOLERANCE | {torch.float16: 1.5e-3}
"""The same where a kernel sums weights times values in float16, 64 at a time. Emulated in steps of 16: at worst 4.7e-4
if a tensor core rounds to nearest, 1.2e-3 if it cuts off."""
LSE_TOLERANCE = 1e-3
WILD = 2**31 - 1
"""What stands behind the end of a list."""


@dataclass(frozen=True)
class AttentionProblem:
    """One call: its lists, and how its tokens lie. Head h of batch b takes the lists from the (h + b)-th on."""

    shows: str
    lists: tuple[tuple[int, ...], ...]
    """The key tiles of every query tile; without a grid tiles are blocks."""
    sizes: tuple[int, ...] = ()
    """Tokens in every block, where there is no grid."""
    grid: TileGrid | None = None
    """The tiles of a grid, read where the sequence has them."""
    scattered: bool = False
    """Without a grid: tokens lie in the sequence in any order. Else the blocks lie one after the other."""
    behind: int = 0
    """Tokens behind the grid. They see everything."""
    hidden: int = 0
    """How many of those no query sees."""
    gate: bool = False
    far: bool = False
    """Query tiles have seen something already; every fourth has not."""
    lse: bool = False
    batch: int = 1
    heads: int | None = 2
    """None: as many as make more work than the card has multiprocessors."""
    sharpness: float = 1.0
    """Scores are so many times as large."""
    fused: bool = False
    """q, k and v are slices of one tensor, and heads lie before tokens."""

    def tensors(self, call: Call, multiprocessors: int) -> dict:
        """The operands of `run` by name, on the CPU, and "blocks": [blocks, 64] rows of the output, -1 for none."""
        generator = torch.Generator().manual_seed(len(self.shows) + len(self.lists))
        rows, valid, per_tile = self._rows(generator)
        seen = {row for block, count in zip(rows, valid, strict=True) for row in block[:count]}
        tokens = 1 + max(max(block, default=-1) for block in rows)
        heads = self.heads or -(-2 * multiprocessors // -(-len(rows) // 2)) + 1
        shape = (self.batch, tokens, heads, call.head_dim)
        q, k, v, gate = (torch.randn(shape, generator=generator) for _ in range(4))
        if self.grid is None and not self.scattered:       # then queries need not be as many as keys
            q, rows = q[:, :len(self.lists) * BLOCK], rows[:len(self.lists)]
        q *= self.sharpness
        q[0, rows[0][0], 0] = torch.nan                                # stays in its own row
        q, k, v, gate = self._laid_out(*(x.to(call.dtype) for x in (q, k, v, gate)))
        unseen = [row for row in range(tokens) if row not in seen]
        k[:, unseen], v[:, unseen] = torch.nan, torch.nan
        indices, counts = self._indices(heads, per_tile, len(rows))
        named = dict(q=q, k=k, v=v, indices=indices, counts=counts, block_sizes=torch.tensor(valid, dtype=torch.int32),
                     scale=call.head_dim ** -0.5, return_lse=self.lse, token_rows=None, gate=None, coarse=None,
                     blocks_per_tile=per_tile, tile_grid=self.grid)
        blocks = torch.tensor([block + [-1] * (BLOCK - len(block)) for block in rows], dtype=torch.int32)
        if self.grid is not None or self.scattered:
            named |= dict(token_rows=blocks.flatten())
        if self.gate:
            wide = torch.promote_types(call.dtype, torch.float32)
            coarse = torch.randn(self.batch, heads, len(self.lists), call.head_dim, generator=generator).to(wide)
            named |= dict(gate=gate, coarse=coarse)
        if self.far:
            named |= self._seen(heads, call, generator)
        return named | dict(blocks=blocks.long())

    def _seen(self, heads: int, call: Call, generator) -> dict:
        wide = torch.promote_types(call.dtype, torch.float32)
        lse = 3 * torch.randn(self.batch, heads, len(self.lists), generator=generator).to(wide) + 4
        far = torch.randn(*lse.shape, call.head_dim, generator=generator).to(wide)
        lse[:, :, 3::4], far[:, :, 3::4] = -torch.inf, torch.nan
        return dict(far=far, far_lse=lse)

    def _rows(self, generator) -> tuple[list[list[int]], list[int], int]:
        """Rows of the sequence in every block, how many of them may be seen, and blocks per tile."""
        if self.grid is None:
            if not self.scattered:
                return [list(range(i * BLOCK, (i + 1) * BLOCK)) for i in range(len(self.sizes))], list(self.sizes), 1
            order = torch.randperm(sum(self.sizes), generator=generator).tolist()
            rows = [[order.pop() for _ in range(size)] for size in self.sizes]
            return rows, list(self.sizes), 1
        rows, per_tile = _tile_rows(self.grid), self.grid.blocks_per_tile
        inside = {row for tile in rows for row in tile}
        rows = [tile[part * BLOCK:(part + 1) * BLOCK] for tile in rows for part in range(per_tile)]
        others = [row for row in range(self.grid.prefix + len(inside) + self.behind) if row not in inside]
        visible = len(others) - self.hidden
        valid = [len(block) for block in rows]
        for first in range(0, len(others), BLOCK):
            rows.append(others[first:first + BLOCK])
            valid.append(max(0, min(BLOCK, visible - first)))
        return rows, valid, per_tile

    def _laid_out(self, q, k, v, gate):
        if not self.fused:
            return q, k, v, gate
        q, k, v = torch.stack([x.transpose(1, 2) for x in (q, k, v)], 3).unbind(3)
        return (*(x.transpose(1, 2) for x in (q, k, v)), gate.transpose(1, 2).contiguous().transpose(1, 2))

    def _indices(self, heads: int, per_tile: int, blocks: int) -> tuple[Tensor, Tensor]:
        listed = len(self.lists) * per_tile
        closing = list(range(listed, blocks)) if self.grid is not None else []
        longest = max(map(len, self.lists)) * per_tile + len(closing) + 1
        indices = torch.full((self.batch, heads, listed, longest), WILD, dtype=torch.int32)
        counts = torch.zeros(self.batch, heads, listed, dtype=torch.int32)
        for turn in range(self.batch + heads - 1):
            for row in range(listed):
                kept = self.lists[(row // per_tile + turn) % len(self.lists)]
                names = [tile * per_tile + part for tile in kept for part in range(per_tile)] + closing
                for b in range(max(0, turn - heads + 1), min(self.batch, turn + 1)):
                    indices[b, turn - b, row, :len(names)] = torch.tensor(names, dtype=torch.int32)
                    counts[b, turn - b, row] = len(names)
        return indices, counts

    def prepare(self, spec: KernelSpec, call: Call, device: torch.device, multiprocessors: int) -> Prepared:
        """The problem on a device, with the answer that its specification gives in float64."""
        named = self.tensors(call, multiprocessors)
        blocks = named.pop("blocks")
        guarded = {name: Guarded(x, device) for name, x in named.items() if isinstance(x, Tensor)}
        named |= {name: guard.tensor for name, guard in guarded.items()}
        doubled = {name: x.double() if isinstance(x, Tensor) and x.dtype.is_floating_point else x
                   for name, x in named.items()}
        specification = reference if spec.exact else reference_int8
        wanted = specification.run(**doubled | dict(return_lse=True))
        return Prepared(self, spec, call, named, guarded, blocks.to(device), wanted)


@dataclass(frozen=True)
class Prepared:
    """A problem on a device, ready to be given to a kernel."""

    problem: AttentionProblem
    spec: KernelSpec
    call: Call
    named: dict
    guarded: dict[str, Guarded]
    blocks: Tensor
    wanted: tuple[Tensor, Tensor]

    def attempt(self, run: Callable) -> tuple[tuple[Tensor, ...], str | None]:
        """What a kernel answers, and what it did that it must not."""
        q, device = self.named["q"], self.blocks.device
        if self.named["token_rows"] is not None and not self.spec.gathers(self.named["tile_grid"]):
            out, lse = gathered.on_copies(run, **self.named)
            return ((out,) if lse is None else (out, lse)), self._damage()
        outputs = [Guarded.output(q.shape, q.dtype, device)]
        if self.problem.lse:
            outputs.append(Guarded.output((q.shape[0], q.shape[2], q.shape[1]), torch.float32, device))
        buffers = dict(zip(("out", "lse"), (output.tensor for output in outputs), strict=False))
        found = [x for x in run(*self.named.values(), **buffers) if x is not None]
        if [x.data_ptr() for x in found] != [x.data_ptr() for x in buffers.values()]:
            return tuple(found), "the result is not where it was to be written"
        if not all(output.bands_are_whole() for output in outputs):
            return tuple(found), "memory beside the result was written to"
        return tuple(found), self._damage()

    def _damage(self) -> str | None:
        spoiled = [name for name, guard in self.guarded.items() if not guard.is_unchanged()]
        return f"{', '.join(spoiled)} or memory beside was written to" if spoiled else None

    def error(self, found: tuple[Tensor, ...]) -> tuple[float, str | None]:
        """(largest relative L2 of a block of queries, a sentence if that or the LSE is off)"""
        worst = self._worst_block(found[0].double(), self.wanted[0])
        tolerance = (IN_HALF if self.spec.sums_in_half(self.call) else TOLERANCE)[self.call.dtype]
        if not worst <= tolerance:
            return worst, f"relative L2 {worst:.1e}, allowed {tolerance:.0e}"
        if self.problem.lse:
            lse, wanted = found[1].double(), self.wanted[1].double()
            missed = torch.where(lse == wanted, 0.0, (lse - wanted).abs())
            missed = torch.where(wanted.isnan() & lse.isnan(), 0.0, missed)
            missed = missed.nan_to_num(nan=math.inf, posinf=math.inf).max().item()
            if not missed <= LSE_TOLERANCE:
                return worst, f"LSE off by {missed:.1e}, allowed {LSE_TOLERANCE:.0e}"
        return worst, None

    def _worst_block(self, found: Tensor, wanted: Tensor) -> float:
        rows, is_row = self.blocks.clamp(min=0).flatten(), (self.blocks >= 0)[None, :, :, None, None]
        found, wanted = (x.index_select(1, rows).unflatten(1, self.blocks.shape) for x in (found, wanted))
        found, wanted = (torch.where(is_row, x, 0) for x in (found, wanted))       # [B, blocks, 64, H, D]
        poisoned = wanted.isnan()
        if bool((found.isnan() != poisoned).any()):
            return math.inf
        missed, size = (torch.where(poisoned, 0, x).square().sum((2, 4)).sqrt() for x in (found - wanted, wanted))
        relative = torch.where(size > 0, missed / size, torch.where(missed == 0, 0.0, math.inf))
        return relative.nan_to_num(nan=math.inf, posinf=math.inf).max().item()


def _tile_rows(grid: TileGrid) -> list[list[int]]:
    """The tokens of every tile as rows of the sequence, in the order that fills its blocks."""
    tiles: dict[tuple[int, ...], list[int]] = {}
    for raster in range(math.prod(grid.thw)):
        place = raster // (grid.h * grid.w), raster // grid.w % grid.h, raster % grid.w
        tile = tuple(p // side for p, side in zip(place, grid.tile, strict=True))
        tiles.setdefault(tile, []).append(grid.prefix + raster)
    return [tiles[tile] for tile in sorted(tiles)]


def _every(count: int, *left_out: int) -> tuple[int, ...]:
    return tuple(i for i in range(count) if i not in left_out)


SMALL = TileGrid(3, 5, 5, 6, 3, 5, 4)
LONG = TileGrid(0, 3, 5, 83, 3, 5, 4)
BOXES = TileGrid(0, 3, 9, 10, 2, 8, 8)
MANY = TileGrid(0, 5, 14, 15, 3, 5, 4)

ATTENTION_PROBLEMS = (
    AttentionProblem("odd, empty and equal lists over cut and empty blocks",
                     ((0, 2, 5), (0, 2, 5), (0, 1, 3, 4, 5), (3,), (), (1, 2, 3, 4)), (64, 17, 64, 0, 64, 33),
                     lse=True),
    AttentionProblem("lists so long that rings turn",
                     (_every(48), _every(48, 3), _every(47), _every(47), (5,), (), _every(44), (1, 7)),
                     (64, 9, *[64] * 44, 33, 64), heads=1),
    AttentionProblem("scores thirty times as large", ((0, 1, 2, 3), (3,), (0, 2), (0, 2)), (64, 64, 20, 64), lse=True,
                     sharpness=30.0),
    AttentionProblem("blocks of a batch through strides", ((0, 1, 2), (2,), (0, 1)), (64, 30, 64), batch=2, heads=3,
                     fused=True, lse=True),
    AttentionProblem("tiles of a grid between other tokens", ((0, 3), (0, 1, 2, 3), (2,), ()), grid=SMALL, behind=7,
                     hidden=1, gate=True, lse=True),
    AttentionProblem("tiles in lists so long that rings turn", (_every(21),) * 19 + (_every(21, 2), (4,)), grid=LONG,
                     behind=70, gate=True, heads=1),
    AttentionProblem("tiles of two boxes of which some lie outside",
                     ((0, 1), (5,), (0, 3, 7), (2,), (6, 7), (1,), (4,), ()), grid=BOXES, behind=3, hidden=2,
                     gate=True),
    AttentionProblem("tiles of a batch through strides", ((1, 2), (0, 1, 2, 3), (0,), (0, 3)), grid=SMALL, behind=80,
                     batch=2, heads=3, fused=True, lse=True),
    AttentionProblem("tokens in any order", ((0, 2, 3), (1,), (0, 1, 2, 3), (0, 2)), (64, 41, 60, 1), scattered=True,
                     batch=2, lse=True),
    AttentionProblem("more work than the card has multiprocessors",
                     tuple(tuple(sorted({i, (7 * i + 3) % 24, (5 * i + 11) % 24, i ^ 1, (i + 9) % 24}))
                           for i in range(24)),
                     grid=MANY, behind=5, heads=None),
    AttentionProblem("blocks whose softmax has begun",
                     ((0, 2, 5), (), (1,), (3, 4), (0, 1, 2, 3, 4, 5), (2, 4)),
                     (64, 17, 64, 0, 64, 33), far=True, lse=True, batch=2, sharpness=3.0),
    AttentionProblem("tiles of a grid whose softmax has begun",
                     ((0, 1), (5,), (0, 3, 7), (2,), (6, 7), (1,), (4,), ()), grid=BOXES, behind=70, hidden=2,
                     gate=True, far=True, lse=True, batch=2),
)
