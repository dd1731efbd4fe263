"""Kernels for a CPU that are right, or wrong in one way each, and the tables that hold them."""
from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from pack.kernels import KernelSpec, reference

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def spec_of(run, name="candidate", files=(Path(__file__),), **fields):
    return KernelSpec(name, lambda: run, ("cpu",), ("cpu",), DTYPES, head_dims=(64, 128), files=files,
                      gathers=lambda grid: True, **fields)


def right(*operands, **buffers):
    return reference.run(*operands, **buffers)


def _edit(**changes):
    """The reference with operands changed by name: each change gets the operand and all of them."""
    names = ("q", "k", "v", "indices", "counts", "block_sizes", "scale", "return_lse", "token_rows", "gate", "coarse",
             "blocks_per_tile", "tile_grid", "far", "far_lse")

    def run(*operands, **buffers):
        named = dict(zip(names, operands))
        edited = named | {name: change(named[name], named) for name, change in changes.items()
                          if named.get(name) is not None}
        return reference.run(**edited, **buffers)
    return run


drops_the_last_block = _edit(counts=lambda x, _: (x - 1).clamp_min(0))
drops_blocks_of_long_lists = _edit(counts=lambda x, _: x.clamp_max(40))
ignores_padding = _edit(block_sizes=lambda x, _: torch.full_like(x, 64))
loses_a_key_of_a_cut_block = _edit(block_sizes=lambda x, _: torch.where((x > 0) & (x < 64), x - 1, x))
scale_off_by_three_percent = _edit(scale=lambda x, _: x * 1.03)
forgets_the_gate = _edit(gate=lambda x, _: x * 0)
takes_the_mean_of_another_tile = _edit(coarse=lambda x, _: x.roll(1, 2))
forgets_what_was_seen = _edit(far_lse=lambda x, _: torch.full_like(x, -torch.inf))
reads_what_nobody_has_seen = _edit(far_lse=lambda x, _: x.nan_to_num(neginf=-1e4))
starts_in_binary_logarithms = _edit(far_lse=lambda x, _: x * 1.4427)
starts_from_another_tile = _edit(far=lambda x, _: x.roll(4, 2))
counts_tiles_by_blocks = _edit(blocks_per_tile=lambda x, _: 1)
reads_the_lists_of_the_first_batch = _edit(
    indices=lambda x, _: x[:1].expand_as(x), counts=lambda x, _: x[:1].expand_as(x))
takes_every_tensor_for_contiguous = _edit(v=lambda x, _: x.as_strided(x.shape, torch.empty(x.shape).stride()))


def writes_nothing(*operands, out, lse=None):
    reference.run(*operands)
    return out, lse


def wrong_lse(*operands, **buffers):
    out, lse = reference.run(*operands, **buffers)
    return out, None if lse is None else lse.mul_(1.4427)


def overflows(q, k, v, indices, counts, sizes, scale, *rest, **buffers):
    out, lse = reference.run(q, k, v, indices, counts, sizes, scale, *rest, **buffers)
    if float((q.nan_to_num() * scale).abs().max()) > 5:
        out[:, -1] = torch.inf
    return out, lse


def an_empty_list_leaves_what_was_there(*operands, out, **buffers):
    before = out.clone()
    found, lse = reference.run(*operands, out=out, **buffers)
    empty = (found == 0).all(-1, keepdim=True)
    return out.copy_(torch.where(empty, before, found)), lse


def a_nan_spreads_in_its_block(*operands, **buffers):
    out, lse = reference.run(*operands, **buffers)
    out[:, 1] += out[:, 0] * 0
    return out, lse


def loses_the_last_head_of_many(*operands, **buffers):
    out, lse = reference.run(*operands, **buffers)
    if out.shape[2] > 3:
        out[:, :, -1] = 0
    return out, lse


def writes_behind_its_output(*operands, out, **buffers):
    found = reference.run(*operands, out=out, **buffers)
    out.as_strided((out.numel() + 7,), (1,))[-7:] = 1.0
    return found


def writes_into_its_operands(q, *rest, **buffers):
    found = reference.run(q, *rest, **buffers)
    q[:, -1] = 0
    return found


def answers_somewhere_else(*operands, out, lse=None):
    return reference.run(*operands)


class Wavering:
    """The last bit of one number is another one in every third run."""

    runs = 0

    def __call__(self, *operands, **buffers):
        out, lse = reference.run(*operands, **buffers)
        self.runs += 1
        if self.runs % 3 == 0:
            out[0, -1, 0, 0] = torch.nextafter(out[0, -1, 0, 0], torch.tensor(torch.inf))
        return out, lse


def raises(*operands, **buffers):
    raise RuntimeError("PTX was not understood\nand more")


def runs_out_of_memory(*operands, **buffers):
    raise torch.OutOfMemoryError("no room")


def ends_the_process(*operands, **buffers):
    print("an illegal instruction was encountered", flush=True)
    os._exit(134)


def hangs(*operands, **buffers):
    time.sleep(3600)


def slow(milliseconds):
    def run(*operands, **buffers):
        time.sleep(milliseconds / 1e3)
        return reference.run(*operands, **buffers)
    return run


APART = tuple(spec_of(run, name, proven_apart=True) for name, run in (
    ("well", right), ("wrong", drops_the_last_block), ("fatal", ends_the_process), ("stuck", hangs),
    ("full", runs_out_of_memory)))
"""Kernels of a table that only a process of their own may try."""
