"""Attention whose scores are products of 8-bit integers: against the same integers in float64, and against exact."""
from __future__ import annotations

from functools import partial

import pytest
import torch

import interpreted_kernel
import test_fused_attention
import test_kernel_contract
import test_tile_grid
from kernel_oracle import block_sparse_attention_oracle, worst_block_error
from pack.kernels import reference_int8
from test_far_start import begun, begun_oracle, tiles_of
from test_fused_attention import oracle, worst_error
from test_kernel_contract import BASE, LAYOUTS, operands

NAMES = ("q", "k", "v", "indices", "counts", "block_sizes", "scale", "return_lse", "token_rows", "gate", "coarse",
         "blocks_per_tile", "tile_grid", "far", "far_lse")
SAME_INTEGERS = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 6e-4, torch.bfloat16: 8e-3}
"""The interpreter cuts bfloat16 off instead of rounding it."""


@pytest.fixture(params=["reference", "triton in the interpreter"])
def run(request):
    """run(**operands) -> out, lse"""
    if request.param == "reference":
        return reference_int8.run
    worker = request.getfixturevalue("worker")
    absent = dict.fromkeys(NAMES) | dict(blocks_per_tile=1)
    return lambda **named: interpreted_kernel.call(
        worker, "int8_scores", *((absent | named)[name] for name in NAMES))


@pytest.fixture
def in_half(worker):
    """run(**operands) of the kernel that sums weights times values in float16, as on GeForce RTX 30, 40 and 50."""
    absent = dict.fromkeys(NAMES) | dict(blocks_per_tile=1)
    return lambda **named: interpreted_kernel.call(
        worker, "int8_scores", *((absent | named)[name] for name in NAMES), half_sums=True)


def half_away(x):
    return torch.where(x < 0, -((-x + 0.5).floor()), (x + 0.5).floor())


def with_the_integers(named):
    """The operands with q and k as their integers hold them, in float64 and with one channel more, in which queries
    and keys multiply to what all keys of a row share: exact attention of these is what the kernel has to give. Which
    integer it is, is decided in float32, as by the kernel: at a half float64 may decide otherwise."""
    q, k = named["q"].float(), named["k"].float()
    sizes, rows = named["block_sizes"].tolist(), named.get("token_rows")
    rows = range(k.shape[1]) if rows is None else rows.tolist()
    held, shared = torch.zeros(*k.shape[:3], 1 + k.shape[3], dtype=torch.float64), torch.zeros(*q.shape[:3], 1).double()
    blocks = [[row for row in rows[64 * n:64 * n + size] if row >= 0] for n, size in enumerate(sizes)]
    seen = [row for block in blocks for row in block]
    queries = torch.empty_like(q, dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[2]):
            keys = k[b, :, h]
            finite = torch.where(keys.isfinite(), keys, 0)
            mean = finite[seen].sum(0) / max(sum(sizes), 1)
            for block in filter(None, blocks):
                off = keys[block] - mean
                scale = off.abs().max() / 127 + 1e-7
                held[b, block, h, :-1] = half_away(off / scale).double() * scale.double()
            scale = q[b, :, h].abs().amax(1, keepdim=True) / 127 + 1e-7
            queries[b, :, h] = half_away(q[b, :, h] / scale).double() * scale.double()
            shared[b, :, h] = q[b, :, h].double() @ mean[:, None].double()
    held[..., -1] = 1

    def wider(x):
        return torch.cat([x.double(), torch.zeros(*x.shape[:-1], 1, dtype=torch.float64)], -1)
    more = {name: wider(named[name]) for name in ("v", "gate", "coarse", "far") if named.get(name) is not None}
    return named | more | dict(q=torch.cat([queries, shared], -1), k=held)


def as_named(case, dtype):
    names = ("q", "k", "v", "indices", "counts", "block_sizes")
    return dict(zip(names, operands(case, dtype), strict=True)) | dict(scale=case.dim ** -0.5, return_lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", test_kernel_contract.CASES, ids=lambda case: case.why)
def test_it_is_attention_of_the_integers_in_every_query_block(run, case, dtype):
    named = as_named(case, dtype)
    out, lse = run(**named)
    wide = with_the_integers(named)
    expected, expected_lse = block_sparse_attention_oracle(
        *(wide[name] for name in ("q", "k", "v", "indices", "counts", "block_sizes")), named["scale"])
    assert worst_block_error(out, expected[..., :-1]) <= SAME_INTEGERS[dtype]
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    seen = expected_lse > -torch.inf
    assert (lse.double() - expected_lse)[seen].abs().max().item() <= 1e-3


GATHERED = {case.why: partial(test_fused_attention.operands, case) for case in test_fused_attention.CASES}
BOXES = {case.why: partial(test_tile_grid.problem, case) for case in test_tile_grid.CASES[1:4]}


@pytest.mark.parametrize(("dtype", "has_begun"), [(torch.float32, False), (torch.float32, True),
                                                  (torch.bfloat16, True)], ids=str)
@pytest.mark.parametrize("make", [*GATHERED.values(), *BOXES.values()], ids=[*GATHERED, *BOXES])
def test_tokens_in_any_order_gates_and_a_softmax_that_has_begun(run, make, dtype, has_begun):
    named = make(dtype)
    if has_begun:
        named = begun(named, tiles_of(named))
    out, lse = run(**named)
    wide = with_the_integers(named)
    wide.pop("tile_grid", None)
    wanted, wanted_lse = begun_oracle(wide) if has_begun else oracle(**wide)
    assert worst_error(out, wanted[..., :-1], named["token_rows"]) <= SAME_INTEGERS[dtype]
    assert (lse.double() - wanted_lse).nan_to_num(nan=torch.inf).abs().max().item() <= 1e-3


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_do_not_change_a_bit(run, layout):
    named = as_named(BASE, torch.float16)
    wanted = run(**named)
    names = ("q", "k", "v", "indices", "counts", "block_sizes")
    moved = dict(zip(names, layout(*(named[name] for name in names)), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(run(**named | moved), wanted))


def test_a_nan_in_a_query_stays_in_its_row_and_one_in_a_key_in_the_rows_that_read_its_block(run):
    named = as_named(test_kernel_contract.Case("", ((0, 1), (2,), (1, 2)), (64, 64, 64)), torch.float32)
    named["q"][0, 70] = torch.nan
    named["k"][0, 5] = torch.nan
    out, _ = run(**named)
    broken = out.isnan().any((0, 2, 3))
    assert broken[70] and broken[:64].all() and not broken[64:70].any() and not broken[71:].any()


def fields(kind, dim, seed=3):
    """(q, k, v) [1, 512, 2, dim] of eight full blocks: white noise, or smooth along the tokens, with what is asked."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, 512, 2, dim, generator=generator)
    if kind != "white noise":
        rough = torch.randn(3, 1, 20, 2, dim, generator=generator)
        q, k, v = (torch.nn.functional.interpolate(x.permute(0, 2, 3, 1).flatten(0, 1), 512, mode="linear").unflatten(
            0, (1, 2)).permute(0, 3, 1, 2) + 0.05 * y for x, y in zip(rough, (q, k, v)))
    if "offset" in kind:
        k = k + 30
    if "outlier" in kind:
        k[..., 3] *= 20
        q[..., 3] /= 20
    return q.contiguous(), k.contiguous(), v.contiguous()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("kind", "bound"), [
    ("white noise", 2e-2), ("smooth", 5e-3), ("smooth, keys with an offset of 30", 5e-3),
    ("smooth, one outlier channel", 5e-2)])
def test_the_error_against_exact_attention_is_that_of_8_bits(run, kind, bound, dim):
    q, k, v = fields(kind, dim)
    indices = torch.arange(8, dtype=torch.int32).expand(1, 2, 8, 8).contiguous()
    counts = torch.full((1, 2, 8), 8, dtype=torch.int32)
    named = dict(q=q, k=k, v=v, indices=indices, counts=counts, block_sizes=torch.full((8,), 64, dtype=torch.int32),
                 scale=dim ** -0.5, return_lse=True)
    out, lse = run(**named)
    exact, exact_lse = block_sparse_attention_oracle(*(named[name] for name in NAMES[:6]), named["scale"])
    assert 1e-5 < worst_block_error(out, exact) <= bound
    assert (lse.double() - exact_lse).abs().max() <= 0.05, "the mean of the keys is in it"


IN_HALF = {torch.float16: 6e-4, torch.bfloat16: 8e-3}
"""The interpreter rounds to float16 once for 64 weights times values, where a tensor core does so 4 times."""


def differences(run, named):
    """(worst error of a block of queries, largest one of the LSE) against the oracle with the same integers."""
    wide = with_the_integers(named)
    wide.pop("tile_grid", None)
    wanted, wanted_lse = begun_oracle(wide) if "far" in named else oracle(**wide)
    out, lse = run(**named)
    return (worst_error(out, wanted[..., :-1], named["token_rows"]),
            (lse.double() - wanted_lse).nan_to_num(nan=torch.inf).abs().max().item())


@pytest.mark.parametrize("dtype", IN_HALF, ids=str)
@pytest.mark.parametrize("make", [*list(GATHERED.values())[:3], *list(BOXES.values())[:1]],
                         ids=[*list(GATHERED)[:3], *list(BOXES)[:1]])
@pytest.mark.parametrize("has_begun", [False, True], ids=["", "begun"])
def test_sums_in_float16_are_as_good_as_8_bits_need_and_the_lse_is_the_same(in_half, make, dtype, has_begun):
    named = make(dtype)
    error, of_lse = differences(in_half, begun(named, tiles_of(named)) if has_begun else named)
    assert error <= IN_HALF[dtype] and of_lse <= 1e-3


@pytest.mark.parametrize(("dtype", "size"), [
    (torch.bfloat16, 3e4), (torch.bfloat16, 1e30), (torch.bfloat16, 1e-20), (torch.float16, 2e3),
    (torch.float16, 1e-3)], ids=str)
@pytest.mark.parametrize("has_begun", [False, True], ids=["", "begun"])
def test_values_of_any_size_fit_into_sums_in_float16(in_half, dtype, size, has_begun):
    named = test_tile_grid.problem(test_tile_grid.CASES[1], dtype)
    if has_begun:
        named = begun(named, tiles_of(named))
    named |= {name: named[name] * size for name in ("v", "coarse", "far") if name in named}
    error, of_lse = differences(in_half, named)
    assert error <= IN_HALF[dtype] and of_lse <= 1e-3


def test_the_largest_sum_of_a_block_does_not_overflow_in_float16(in_half):
    """All weights 1 and all values the largest there is: their sum is 64 times as much."""
    named = as_named(BASE, torch.float16)
    named["q"], largest = torch.zeros_like(named["q"]), torch.finfo(torch.float16).max
    named["v"] = torch.full_like(named["v"], largest)
    out, _ = in_half(**named)
    wanted = reference_int8.run(**named)[0]
    assert (wanted == largest).any() and ((out == wanted) | ((out / wanted - 1).abs() < 2e-3)).all()


def test_a_nan_or_infinity_among_values_stays_in_the_rows_that_read_its_block(in_half):
    for dtype in IN_HALF:
        for odd in (torch.nan, torch.inf):
            named = as_named(test_kernel_contract.Case("", ((0, 1), (2,), (1, 2)), (64, 64, 64)), dtype)
            named["v"][0, 5] = odd
            out, _ = in_half(**named)
            broken = (~out.isfinite()).any((0, 2, 3))
            assert broken[:64].all() and not broken[64:].any()
            assert in_half(**named)[0].isnan().equal(out.isnan())


def test_cards_that_sum_twice_as_fast_in_float16_do():
    from pack.kernels.triton.configs import sums_in_half
    faster = {(8, 6), (8, 7), (8, 9), (12, 0), (12, 1)}
    assert {card for card in [(8, 0), (9, 0), (10, 0), (10, 3), *faster] if sums_in_half(card)} == faster
    assert not sums_in_half(None)
