"""Every kernel against a float64 oracle, over a table of selections. All unread memory holds NaN or wild indices."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

import emulated_sm90
import interpreted_kernel
from kernel_oracle import block_sparse_attention_oracle, worst_block_error
from pack.kernels import reference

GATES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4e-3}
INTERPRETER_GATES = {**GATES, torch.bfloat16: 8e-3}
"""Triton's interpreter cuts bfloat16 off instead of rounding it."""

REFERENCE, INTERPRETED, EMULATED = "reference", "triton in the interpreter", "cuda_sm90 in the emulator"
HALVES = (torch.float16, torch.bfloat16)
NAN, HUGE = float("nan"), 2**31 - 1


@dataclass(frozen=True)
class Case:
    why: str
    lists: tuple[tuple[int, ...], ...]
    """The key blocks of every query block; head h of batch b starts with entry b + h."""
    sizes: tuple[int, ...] = (64, 64, 64, 64)
    dim: int = 64
    batch: int = 1
    heads: int = 1
    edit: Callable | None = None
    """edit(q, k, v) changes the values in place."""


def large_logits(q, k, v):
    q *= 30


def growing_rows(q, k, v):
    """Every later block beats all before it, so the running maximum moves each time."""
    direction = torch.randn(q.shape[-1])
    q += direction.to(q.dtype)
    for block in range(k.shape[1] // 64):
        k[:, block * 64:(block + 1) * 64] += (block * direction).to(k.dtype)


def constant_rows(q, k, v):
    q[:] = 0


def far_below_zero(q, k, v):
    """A maximum that starts at 0, or that padding keys with score 0 can reach, drives every weight to 0."""
    q[..., 0] = 16
    k[..., 0] = -20


CASES = (
    Case("all blocks selected is plain attention", ((0, 1, 2, 3), (0, 1, 2, 3))),
    Case("counts of none one odd and all in one launch", ((), (2,), (0, 1, 3), (0, 1, 2, 3))),
    Case("more keys than queries and a head_dim of two panels", ((0, 4), (1, 2, 5)), (64,) * 6, dim=128),
    Case("more queries than keys", ((0,), (1,), (0, 1), (), (1,)), (64, 64)),
    Case("every batch and head has its own lists", ((0, 3), (1,), (0, 1, 2)), batch=2, heads=2),
    Case("one key in a block and one missing", ((0, 1), (1, 2), (0, 2)), (1, 63, 64)),
    Case("the only listed block is empty", ((0,), (0, 1), (1, 2)), (0, 64, 0)),
    Case("the first listed blocks are empty", ((0, 1, 2), (0, 2)), (0, 0, 37)),
    Case("cut tiles of a real grid", ((0, 1, 2, 3), (3,)), (64, 32, 16, 8), dim=128),
    Case("logits thirty times too large", ((0, 1, 2, 3), (1, 3)), edit=large_logits, dim=128),
    Case("logits thirty times too large in cut blocks", ((0, 1, 2), (2,)), (9, 64, 33), edit=large_logits),
    Case("the row maximum comes last", ((0, 1, 2, 3), (0, 2)), edit=growing_rows),
    Case("all logits of a row are equal", ((0, 1, 2, 3), (3,)), (64, 17, 64, 5), edit=constant_rows),
    Case("all logits are far below zero", ((0, 1), (1,)), (64, 11), edit=far_below_zero),
)


def operands(case, dtype):
    """q, k, v, indices, counts, block_sizes. Padding slots, blocks no row lists and index tails are poisoned."""
    torch.manual_seed(sum(map(ord, case.why)))
    rows, blocks, width = len(case.lists), len(case.sizes), max(map(len, case.lists)) + 2
    q = torch.randn(case.batch, rows * 64, case.heads, case.dim).to(dtype)
    k, v = (torch.randn(case.batch, blocks * 64, case.heads, case.dim).to(dtype) for _ in range(2))
    if case.edit:
        case.edit(q, k, v)
    indices = torch.tensor([-1, HUGE], dtype=torch.int32).repeat(case.batch, case.heads, rows, (width + 1) // 2)
    counts = torch.zeros(case.batch, case.heads, rows, dtype=torch.int32)
    for b in range(case.batch):
        for h in range(case.heads):
            lists = [case.lists[(row + b + h) % rows] for row in range(rows)]
            for row, listed in enumerate(lists):
                counts[b, h, row] = len(listed)
                indices[b, h, row, :len(listed)] = torch.tensor(listed, dtype=torch.int32)
            for block, size in enumerate(case.sizes):
                read = size if any(block in listed for listed in lists) else 0
                for x in (k, v):
                    x[b, block * 64 + read:(block + 1) * 64, h] = NAN
    return q, k, v, indices, counts, torch.tensor(case.sizes, dtype=torch.int32)


@pytest.fixture(params=[REFERENCE, INTERPRETED, EMULATED])
def kernel(request):
    """(run, gates)"""
    if request.param == REFERENCE:
        return reference.run, GATES
    if request.param == EMULATED:
        if reason := emulated_sm90.unavailable():
            pytest.skip(reason)
        return emulated_sm90.run, GATES
    worker = request.getfixturevalue("worker")

    def run(*args):
        *tensors, scale, return_lse = args
        return interpreted_kernel.run(worker, *tensors, scale=scale, return_lse=return_lse)
    return run, INTERPRETER_GATES


EVERY_KERNEL_IN_EVERY_DTYPE = [
    pytest.param(kernel, dtype, id=f"{kernel} {str(dtype).removeprefix('torch.')}")
    for kernel, dtypes in ((REFERENCE, GATES), (INTERPRETED, HALVES), (EMULATED, HALVES)) for dtype in dtypes]


@pytest.mark.parametrize(("kernel", "dtype"), EVERY_KERNEL_IN_EVERY_DTYPE, indirect=["kernel"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_a_kernel_agrees_with_the_oracle_in_every_query_block(kernel, case, dtype):
    run, gates = kernel
    tensors, scale = operands(case, dtype), case.dim ** -0.5
    out, lse = run(*tensors, scale, True)
    expected, expected_lse = block_sparse_attention_oracle(*tensors, scale)
    assert out.shape == tensors[0].shape and out.dtype == dtype and out.is_contiguous()
    assert worst_block_error(out, expected) <= gates[dtype]
    assert lse.shape == expected_lse.shape and lse.dtype == torch.float32
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    seen = expected_lse > -torch.inf
    assert (lse.double() - expected_lse)[seen].abs().max().item() <= 1e-3


BASE = Case("lists of any length in cut blocks", ((), (2,), (0, 1, 3), (0, 1, 2)), (64, 7, 64, 33), batch=2, heads=2)


def transposed(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def slices_of_one_tensor(*tensors):
    return torch.stack(tensors, dim=2).unbind(2)


LAYOUTS = {
    "stored as BHSD": lambda q, k, v, *rest: (transposed(q), transposed(k), transposed(v), *rest),
    "slices of a fused qkv": lambda q, k, v, *rest: (*slices_of_one_tensor(q, k, v), *rest),
    "every tensor in its own layout": lambda q, k, v, *rest: (q, transposed(k), slices_of_one_tensor(v, v)[1], *rest),
    "indices with the list outermost": lambda q, k, v, i, c, s: (
        q, k, v, i.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), c.mT.contiguous().mT, s),
    "indices cut out of a wider tensor": lambda q, k, v, i, c, s: (
        q, k, v, torch.cat([torch.full_like(i, HUGE), i], -1)[..., i.shape[-1]:], c, s),
    "unaligned rows": lambda q, k, v, *rest: (*(torch.cat([x, x[..., :1]], -1)[..., :-1] for x in (q, k, v)), *rest),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_do_not_change_a_bit(kernel, layout):
    tensors = operands(BASE, torch.float16)
    views = layout(*tensors)
    assert any(a.stride() != b.stride() for a, b in zip(tensors, views))
    for got, wanted in zip(kernel[0](*views, 0.125, True), kernel[0](*tensors, 0.125, True)):
        assert torch.equal(got, wanted)


def test_one_selection_expanded_over_batch_and_heads_is_read_with_stride_0(kernel):
    q, k, v, indices, counts, sizes = operands(BASE, torch.float16)
    k, v = (x.nan_to_num(0.5) for x in (k, v))
    shared = (indices[:1, :1].expand_as(indices), counts[:1, :1].expand_as(counts))
    assert shared[0].stride()[:2] == shared[1].stride()[:2] == (0, 0)
    out, lse = kernel[0](q, k, v, *shared, sizes, 0.125, True)
    wanted, wanted_lse = kernel[0](q, k, v, *(x.contiguous() for x in shared), sizes, 0.125, True)
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)


def test_out_is_the_same_without_lse(kernel):
    tensors = operands(BASE, torch.float16)
    out, lse = kernel[0](*tensors, 0.125, False)
    assert lse is None and torch.equal(out, kernel[0](*tensors, 0.125, True)[0])


@pytest.mark.parametrize("scale", [-0.2, 0.0])
def test_any_scale_is_a_scale(kernel, scale):
    tensors = operands(BASE, torch.float16)
    expected, _ = block_sparse_attention_oracle(*tensors, scale)
    assert worst_block_error(kernel[0](*tensors, scale, False)[0], expected) <= 6e-4


def test_a_nan_in_a_query_stays_in_its_row(kernel):
    q, *rest = operands(BASE, torch.float16)
    clean, clean_lse = kernel[0](q, *rest, 0.125, True)
    q[0, 70, 1, 3] = NAN
    out, lse = kernel[0](q, *rest, 0.125, True)
    assert out[0, 70, 1].isnan().all()
    out[0, 70, 1], lse[0, 1, 70] = clean[0, 70, 1], clean_lse[0, 1, 70]
    assert torch.equal(out, clean) and torch.equal(lse, clean_lse)


def test_no_queries_and_no_list_places_give_empty_and_zero(kernel):
    q, k, v, indices, counts, sizes = operands(BASE, torch.float16)
    out, lse = kernel[0](q[:, :0], k, v, indices[:, :, :0], counts[:, :, :0], sizes, 0.125, True)
    assert out.shape == (2, 0, 2, 64) and lse.shape == (2, 2, 0)
    out, lse = kernel[0](q, k, v, indices[..., :0], torch.zeros_like(counts), sizes, 0.125, True)
    assert not out.any() and (lse == -torch.inf).all()


def test_heads_more_than_two_to_the_31_elements_apart_are_reached(worker):
    case = Case("offsets need 64 bits", ((0, 1), (1,)), (64, 5), heads=3)
    tensors = operands(case, torch.float16)
    try:
        out, _ = interpreted_kernel.run(worker, *tensors, scale=0.125, head_stride=2**30 + 64)
    except MemoryError as error:
        pytest.skip(f"cannot reserve 4 GB of address space: {error}")
    assert torch.equal(out, interpreted_kernel.run(worker, *tensors, scale=0.125)[0])


def test_all_blocks_selected_equals_sdpa(kernel):
    q, k, v, *selection = operands(CASES[0], torch.float16)
    out, _ = kernel[0](q, k, v, *selection, 0.125, False)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)))
    assert worst_block_error(out, dense.transpose(1, 2)) <= GATES[torch.float16]


def test_a_dropped_block_is_seen_by_this_measure_and_not_by_allclose():
    case = Case("a list as long as a real one", (tuple(range(144)),), (64,) * 144)
    tensors = operands(case, torch.bfloat16)
    expected, _ = block_sparse_attention_oracle(*tensors, 0.125)
    tensors[4][:] = 143
    wrong, _ = reference.run(*tensors, 0.125, False)
    assert torch.allclose(wrong.double(), expected, atol=1e-2, rtol=1e-2)
    assert worst_block_error(wrong, expected) > 9 * INTERPRETER_GATES[torch.bfloat16]
