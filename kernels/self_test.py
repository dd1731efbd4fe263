"""Checks a kernel against the reference before its first use on a device, dtype and head_dim.

A few milliseconds, once per process. The problem holds what goes wrong in practice: odd and empty lists, two equal
lists side by side, cut and empty blocks, NaN in padding and wild indices behind the end of a list.
"""
from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable

import torch

from .spec import BLOCK, Call, KernelSpec, KernelUnusable
from .tile_grid import TileGrid

log = logging.getLogger(__name__)

TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1.2e-3, torch.float32: 2e-5, torch.float64: 1e-6}
"""Largest relative L2 of a block against float64: twice what the tests allow. A dropped block is above 0.1."""
LSE_TOLERANCE = 2e-3

_LISTS = ((0, 2, 5), (0, 2, 5), (0, 1, 3, 4, 5), (3,), (), (1, 2, 3, 4), (0, 1, 2, 3, 4, 5))
_SIZES = (64, 17, 64, 0, 64, 33)
_HEADS = 2
_GRID = TileGrid(3, 5, 5, 6, 3, 5, 4)
"""Tiles of 60 tokens, cut along two axes, and tokens before them; seven come behind."""

_verdicts: dict[tuple, str | None] = {}
"""(kernel, call, device) -> None when it passed, else the reason it may not run."""
_lock = threading.Lock()


def refusal(spec: KernelSpec, call: Call) -> str | None:
    """Why `spec` failed earlier in this process on any device for such calls, or None."""
    return next((verdict for (name, seen, _), verdict in _verdicts.items()
                 if verdict is not None and (name, seen) == (spec.name, call)), None)


def ready(spec: KernelSpec, call: Call, device: torch.device, reference: Callable,
          difference: Callable | None = None) -> Callable:
    """The kernel's `run`, loaded and, on first use, tested. Raises KernelUnusable, with the same reason ever after.

    reference: `run` of the reference kernel. A kernel that has no `source` of its own is not tested.
    difference(run, call, device, reference): None or what is wrong; by default for attention kernels.
    """
    run = spec.load()
    if spec.source is None:
        return run
    key = spec.name, call, str(device)
    with _lock:
        if key not in _verdicts:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise KernelUnusable("its self-test cannot run while a CUDA graph is recorded: run once before")
            if reason := spec.unproven():
                log.warning("kernel %s was asked for and is %s", spec.name, reason)
            difference = difference or (_difference_and_gathered if spec.gathers(_GRID) else _difference)
            _verdicts[key] = _verdict(run, call, device, reference, difference)
            if _verdicts[key] is None:
                log.info("kernel %s passed its self-test on %s for %s", spec.name, device, _words(call))
            else:
                log.warning("kernel %s: %s", spec.name, _verdicts[key])
        verdict = _verdicts[key]
    if verdict is not None:
        raise KernelUnusable(f"{spec.name}: {verdict}")
    return run


def _verdict(run: Callable, call: Call, device: torch.device, reference: Callable, difference: Callable) -> str | None:
    try:
        return difference(run, call, device, reference)
    except torch.OutOfMemoryError:
        raise
    except KernelUnusable as error:
        return str(error)
    except Exception as error:
        return f"self-test on {device} for {_words(call)} failed: {type(error).__name__}: {error}"


def _difference(run: Callable, call: Call, device: torch.device, reference: Callable) -> str | None:
    """Run the problem; returns a sentence when the result is off."""
    tensors = problem(call)
    scale = call.head_dim ** -0.5
    wanted, wanted_lse = reference(*(x.double() for x in tensors[:3]), *tensors[3:], scale, True)
    out, lse = run(*(x.to(device) for x in tensors), scale, True)
    out, lse = out.double().cpu(), lse.double().cpu()
    errors = _per_block(out - wanted) / _per_block(wanted).clamp_min(1e-30)
    errors = torch.where(_per_block(wanted) == 0, _per_block(out), errors)
    worst = torch.where(errors.isnan(), torch.inf, errors).max().item()
    tolerance = TOLERANCE[call.dtype]
    seen = wanted_lse > -torch.inf
    lse_error = torch.where(seen, lse - wanted_lse, torch.where(lse == -torch.inf, 0.0, torch.inf)).abs()
    lse_worst = torch.where(lse_error.isnan(), torch.inf, lse_error).max().item()
    if worst <= tolerance and lse_worst <= LSE_TOLERANCE:
        return None
    return (f"self-test on {device} for {_words(call)} failed: found relative L2 {worst:.1e} and LSE error "
            f"{lse_worst:.1e}, wanted at most {tolerance:.1e} and {LSE_TOLERANCE:.0e}")


def _difference_and_gathered(run: Callable, call: Call, device: torch.device, reference: Callable) -> str | None:
    """`_difference`, and the same for tokens in the order of the sequence with a coarse branch."""
    if sentence := _difference(run, call, device, reference):
        return sentence
    tensors, token_rows, gate, coarse = gathered_problem(call)
    scale = call.head_dim ** -0.5
    wanted, _ = reference(*(x.double() for x in tensors[:3]), *tensors[3:], scale, False, token_rows, gate.double(),
                          coarse.double(), 1, _GRID)
    out, _ = run(*(x.to(device) for x in tensors), scale, False, *(x.to(device) for x in (token_rows, gate, coarse)),
                 1, _GRID)
    out, worst = out.double().cpu(), 0.0
    for rows in token_rows.view(-1, BLOCK):
        rows = rows[rows >= 0].long()
        error = ((out - wanted)[:, rows].norm(dim=(1, 3)) / wanted[:, rows].norm(dim=(1, 3))).max().item()
        worst = max(worst, torch.inf if error != error else error)
    tolerance = TOLERANCE[call.dtype]
    if worst <= tolerance:
        return None
    return (f"self-test on {device} for {_words(call)} failed where tokens are gathered: found relative L2 "
            f"{worst:.1e}, wanted at most {tolerance:.1e}")


def gathered_problem(call: Call) -> tuple:
    """(q, k, v, indices, counts, block_sizes), token_rows, gate, coarse: the four tiles of _GRID, then a dense query
    block whose last token is hidden as a key."""
    generator = torch.Generator().manual_seed(1234)
    rows = _tile_rows(_GRID)
    video = [row for tile in rows for row in tile]
    tokens = _GRID.prefix + len(video) + 7
    rows.append([row for row in range(tokens) if row not in video])
    lists = ((0, 3), (0, 1, 2, 3, 4), (2,), ())
    shape = (1, tokens, _HEADS, call.head_dim)
    q, k, v, gate = (torch.randn(shape, generator=generator).to(call.dtype) for _ in range(4))
    for x in (k, v):
        x[:, rows[-1][-1]] = torch.nan
    indices = torch.full((1, _HEADS, len(lists), max(map(len, lists)) + 1), -1, dtype=torch.int32)
    for row, listed in enumerate(lists):
        indices[..., row, :len(listed)] = torch.tensor(listed, dtype=torch.int32)
    counts = torch.tensor([len(listed) for listed in lists], dtype=torch.int32).expand(1, _HEADS, -1).contiguous()
    sizes = torch.tensor([*map(len, rows[:-1]), len(rows[-1]) - 1], dtype=torch.int32)
    token_rows = torch.tensor([row + [-1] * (BLOCK - len(row)) for row in rows], dtype=torch.int32).flatten()
    coarse = torch.randn(1, _HEADS, len(lists), call.head_dim, generator=generator)
    if call.dtype == torch.float64:
        coarse = coarse.double()
    return (q, k, v, indices, counts, sizes), token_rows, gate, coarse


def _tile_rows(grid: TileGrid) -> list[list[int]]:
    """The tokens of every tile of at most 64, as rows of the sequence."""
    tiles: dict[tuple[int, ...], list[int]] = {}
    for raster in range(math.prod(grid.thw)):
        place = raster // (grid.h * grid.w), raster // grid.w % grid.h, raster % grid.w
        tile = tuple(p // side for p, side in zip(place, grid.tile, strict=True))
        tiles.setdefault(tile, []).append(grid.prefix + raster)
    return [tiles[tile] for tile in sorted(tiles)]


def problem(call: Call) -> tuple[torch.Tensor, ...]:
    """q, k, v, indices, counts and block_sizes on the CPU, the same in every process."""
    generator = torch.Generator().manual_seed(1234)
    rows, blocks, longest = len(_LISTS), len(_SIZES), max(map(len, _LISTS))

    def random(count):
        return torch.randn(1, count * BLOCK, _HEADS, call.head_dim, generator=generator).to(call.dtype)

    q, k, v = random(rows), random(blocks), random(blocks)
    for block, size in enumerate(_SIZES):
        for x in (k, v):
            x[:, block * BLOCK + size:(block + 1) * BLOCK] = torch.nan
    indices = torch.full((1, _HEADS, rows, longest + 1), -1, dtype=torch.int32)
    counts = torch.zeros(1, _HEADS, rows, dtype=torch.int32)
    for head in range(_HEADS):
        for row in range(rows):
            listed = _LISTS[row - head]
            counts[0, head, row] = len(listed)
            indices[0, head, row, :len(listed)] = torch.tensor(listed, dtype=torch.int32)
    return q, k, v, indices, counts, torch.tensor(_SIZES, dtype=torch.int32)


def _per_block(x: torch.Tensor) -> torch.Tensor:
    """[1, S, H, D] -> L2 norm per block and head, [S / 64, H]"""
    return x.reshape(-1, BLOCK, *x.shape[2:]).square().sum((1, 3)).sqrt()


def _words(call: Call) -> str:
    return f"{str(call.dtype).removeprefix('torch.')} and head_dim {call.head_dim}"
