"""Attention whose softmax has begun (`far`, `far_lse`), for every kernel, against a float64 oracle."""
from __future__ import annotations

from functools import partial

import pytest
import torch

import emulated_sm90
import interpreted_kernel
import test_fused_attention
import test_kernel_contract
from pack.kernels import block_sparse_attention, gathered, reference
from test_fused_attention import HALVES, NAN, oracle, worst_error
from test_tile_grid import CASES as GRIDS
from test_tile_grid import problem

GATES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4e-3}
INTERPRETER_GATES = {**GATES, torch.bfloat16: 8e-3}
REFERENCE, COPIES, INTERPRETED = "reference", "copies for a kernel that does not gather", "triton in the interpreter"
EMULATED = "cuda_sm90 in the emulator"


def begun(named, tiles, mass=4.0):
    """Operands with what `tiles` query tiles have seen; every third has seen nothing, its row of far is NaN."""
    generator = torch.Generator().manual_seed(tiles)
    batch, _, heads, dim = named["q"].shape
    wide = torch.promote_types(named["q"].dtype, torch.float32)
    lse = (2 * torch.randn(batch, heads, tiles, generator=generator) + mass).to(wide)
    far = torch.randn(batch, heads, tiles, dim, generator=generator).to(wide)
    lse[:, :, 2::3], far[:, :, 2::3] = -torch.inf, NAN
    return named | dict(far=far, far_lse=lse)


def begun_oracle(named):
    """out and lse of the sequence in float64: every token's own result and what its tile has seen, by their masses."""
    named = {"tile_grid": None, **named}
    far, far_lse, gate, coarse, _ = (named.pop(x) for x in ("far", "far_lse", "gate", "coarse", "tile_grid"))
    out, lse = oracle(**named, gate=None, coarse=None)
    for slot, row in enumerate(named["token_rows"].tolist()):
        tile = slot // 64 // named["blocks_per_tile"]
        if row < 0 or tile >= far.shape[2]:
            continue
        for b in range(out.shape[0]):
            for h in range(out.shape[2]):
                before, listed = far_lse[b, h, tile].double(), lse[b, h, row]
                if before == -torch.inf:
                    continue
                share = 1 / (1 + (listed - before).exp())
                out[b, row, h] = share * far[b, h, tile].double() + (1 - share) * out[b, row, h]
                lse[b, h, row] = torch.logaddexp(listed, before)
        if gate is not None:
            out[:, row] += gate[:, row].double() * coarse[:, :, tile].double()
    return out, lse


CASES = {case.why: partial(test_fused_attention.operands, case) for case in test_fused_attention.CASES}
BOXES = {case.why: partial(problem, case) for case in (GRIDS[1], GRIDS[2])}


def tiles_of(named):
    return named["indices"].shape[2] // named["blocks_per_tile"]


@pytest.fixture(params=[REFERENCE, COPIES, INTERPRETED, EMULATED])
def kernel(request):
    """(run by operands' names, gates)"""
    if request.param == EMULATED:
        if reason := emulated_sm90.unavailable():
            pytest.skip(reason)
        return emulated_sm90.run, GATES
    if request.param == INTERPRETED:
        worker = request.getfixturevalue("worker")
        names = ("q", "k", "v", "indices", "counts", "block_sizes", "scale", "return_lse", "token_rows", "gate",
                 "coarse", "blocks_per_tile", "tile_grid", "far", "far_lse")
        absent = dict.fromkeys(names) | dict(blocks_per_tile=1)
        return lambda **named: interpreted_kernel.call(
            worker, "block_sparse", *((absent | named)[name] for name in names)), INTERPRETER_GATES
    return reference.run if request.param == REFERENCE else partial(gathered.on_copies, reference.run), GATES


EVERY_KERNEL_IN_EVERY_DTYPE = [
    pytest.param(kernel, dtype, id=f"{kernel} {str(dtype).removeprefix('torch.')}")
    for kernel, dtypes in ((REFERENCE, GATES), (COPIES, (torch.float32,)), (INTERPRETED, (torch.float16,)))
    for dtype in dtypes]


def agrees(kernel, named):
    run, gates = kernel
    out, lse = run(**named)
    wanted, wanted_lse = begun_oracle(named)
    assert out.shape == named["q"].shape and out.dtype == named["q"].dtype and out.is_contiguous()
    assert worst_error(out, wanted, named["token_rows"]) <= gates[named["q"].dtype]
    assert torch.equal(lse == -torch.inf, wanted_lse == -torch.inf)
    assert (lse.double() - wanted_lse).nan_to_num(nan=torch.inf).abs().max().item() <= 1e-3


@pytest.mark.parametrize(("kernel", "dtype"), EVERY_KERNEL_IN_EVERY_DTYPE, indirect=["kernel"])
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_a_softmax_that_has_begun_goes_on_as_the_oracle_does(kernel, make, dtype):
    named = make(dtype)
    agrees(kernel, begun(named, tiles_of(named)))


@pytest.mark.parametrize(("kernel", "dtype"), [(EMULATED, dtype) for dtype in HALVES] + [(COPIES, torch.float32)],
                         indirect=["kernel"])
@pytest.mark.parametrize("make", BOXES.values(), ids=BOXES)
def test_tiles_in_boxes_go_on_as_the_oracle_does(kernel, make, dtype):
    named = make(dtype)
    agrees(kernel, begun(named, tiles_of(named)))


@pytest.mark.parametrize("mass", [-60.0, 60.0])
def test_a_mass_of_almost_nothing_or_almost_all_is_no_other_case(kernel, mass):
    """The peak of the list rises 2^80 times above the start, or never reaches it."""
    named = problem(GRIDS[1], torch.float16)
    agrees(kernel, begun(named, tiles_of(named), mass))


def in_slots(case, dtype):
    """Operands of `kernel_contract` by name, in slots: no rows of tokens, no tile but the block."""
    names = ("q", "k", "v", "indices", "counts", "block_sizes")
    return dict(zip(names, test_kernel_contract.operands(case, dtype), strict=True)) | dict(
        scale=case.dim ** -0.5, return_lse=True)


@pytest.mark.parametrize("case", test_kernel_contract.CASES[1:6], ids=lambda case: case.why)
def test_slots_go_on_too_and_an_empty_list_gives_what_was_seen(kernel, case):
    run, gates = kernel
    named = begun(in_slots(case, torch.float16), len(case.lists))
    out, lse = run(**named)
    fine, fine_lse = test_kernel_contract.block_sparse_attention_oracle(
        *(named[x] for x in ("q", "k", "v", "indices", "counts", "block_sizes", "scale")))
    before = named["far_lse"].double().repeat_interleave(64, 2)
    wanted_lse = torch.logaddexp(fine_lse, before)
    mine, theirs = ((x - wanted_lse).exp().nan_to_num(nan=0.0).transpose(1, 2)[..., None] for x in (fine_lse, before))
    wanted = mine * fine + theirs * named["far"].double().nan_to_num().repeat_interleave(64, 2).transpose(1, 2)
    assert test_kernel_contract.worst_block_error(out, wanted) <= gates[torch.float16]
    assert torch.equal(lse == -torch.inf, wanted_lse == -torch.inf)
    assert (lse.double() - wanted_lse).nan_to_num().abs().max() <= 1e-3
    empty = (named["counts"] == 0) & (named["far_lse"] > -torch.inf)
    for b, h, block in empty.nonzero().tolist():
        seen = named["far"][b, h, block].half()
        assert torch.equal(out[b, block * 64:(block + 1) * 64, h], seen.expand(64, -1))


def test_nothing_seen_is_the_same_bits_as_no_start_and_its_values_are_not_read(kernel):
    for named in (problem(GRIDS[1], torch.float16), in_slots(test_kernel_contract.BASE, torch.float16)):
        batch, _, heads, dim = named["q"].shape
        tiles = named["indices"].shape[2] // named.get("blocks_per_tile", 1)
        nothing = dict(far=torch.full((batch, heads, tiles, dim), NAN),
                       far_lse=torch.full((batch, heads, tiles), -torch.inf))
        for got, wanted in zip(kernel[0](**named, **nothing), kernel[0](**named), strict=True):
            assert torch.equal(got, wanted)


def test_queries_without_a_list_and_tiles_behind_the_last_start_do_not_change_a_bit(kernel):
    named = problem(GRIDS[1], torch.float16)
    started = begun(named, 1)
    out, lse = kernel[0](**started)
    wanted, wanted_lse = kernel[0](**named)
    first = named["token_rows"][:64 * named["blocks_per_tile"]]
    others = torch.ones(out.shape[1], dtype=torch.bool)
    others[first[first >= 0].long()] = False
    assert torch.equal(out[:, others], wanted[:, others]) and torch.equal(lse[:, :, others], wanted_lse[:, :, others])
    assert not torch.equal(out[:, ~others], wanted[:, ~others])


def test_strides_of_a_start_do_not_change_a_bit(kernel):
    named = begun(problem(GRIDS[1], torch.float16), 2)
    views = named | dict(far=named["far"].transpose(1, 2).contiguous().transpose(1, 2),
                         far_lse=torch.stack([named["far_lse"]] * 2, -1)[..., 0])
    assert all(views[name].stride() != named[name].stride() for name in ("far", "far_lse"))
    for got, wanted in zip(kernel[0](**views), kernel[0](**named), strict=True):
        assert torch.equal(got, wanted)


def test_a_start_is_the_merge_of_two_results_by_their_lse():
    """And of calls whose lists are parts of one, the start belongs to one of them."""
    case = test_kernel_contract.Case("lists to be cut in two", ((0, 1, 2, 3), (0, 2, 3), (1,), (0, 3)), (64, 9, 64, 33))
    named = in_slots(case, torch.float32)
    whole, whole_lse = block_sparse_attention(**named)
    first = named | dict(counts=torch.ones_like(named["counts"]))
    rest = named | dict(indices=named["indices"][..., 1:], counts=named["counts"] - 1)
    (a, a_lse), (b, b_lse) = block_sparse_attention(**first), block_sparse_attention(**rest)
    total = torch.logaddexp(a_lse, b_lse)
    merged = sum((lse - total).exp().transpose(1, 2)[..., None] * out for out, lse in ((a, a_lse), (b, b_lse)))
    assert (merged - whole).norm() <= 1e-6 * whole.norm() and (total - whole_lse).abs().max() <= 1e-5

    started = begun(named, 4)
    wanted, wanted_lse = block_sparse_attention(**started)
    (a, a_lse) = block_sparse_attention(**first, far=started["far"], far_lse=started["far_lse"])
    total = torch.logaddexp(a_lse, b_lse)
    merged = sum((lse - total).exp().transpose(1, 2)[..., None] * out for out, lse in ((a, a_lse), (b, b_lse)))
    assert (merged - wanted).norm() <= 1e-6 * wanted.norm() and (total - wanted_lse).abs().max() <= 1e-5


def test_a_list_cut_in_two_is_one_call_that_starts_from_the_others_result():
    """One query per block, so that a start for the block is a start for the query: equal to a merge by 1e-6."""
    named = in_slots(test_kernel_contract.Case("one query", ((0, 1, 2, 3),) * 3, (64, 9, 64, 33)), torch.float32)
    named["q"] = named["q"][:, ::64].repeat_interleave(64, 1)
    whole, whole_lse = block_sparse_attention(**named)
    half = named | dict(counts=named["counts"] - 2)
    seen, seen_lse = block_sparse_attention(**half)
    start = dict(far=seen[:, ::64].transpose(1, 2).contiguous(), far_lse=seen_lse[:, :, ::64].contiguous())
    out, lse = block_sparse_attention(**named | dict(indices=named["indices"][..., 2:], counts=named["counts"] - 2),
                                      **start)
    assert (out - whole).norm() <= 1e-6 * whole.norm() and (lse - whole_lse).abs().max() <= 1e-5


def test_without_any_key_or_place_in_a_list_what_was_seen_is_the_result(kernel):
    named = begun(in_slots(test_kernel_contract.BASE, torch.float16), 4)
    nothing = dict(indices=named["indices"][..., :0], counts=torch.zeros_like(named["counts"]))
    wanted = named["far"].nan_to_num().half().repeat_interleave(64, 2).transpose(1, 2)
    wanted_lse = named["far_lse"].repeat_interleave(64, 2)
    no_keys = dict(k=named["k"][:, :0], v=named["v"][:, :0], block_sizes=named["block_sizes"][:0])
    for fewer in (nothing, nothing | no_keys):
        out, lse = kernel[0](**named | fewer)
        assert torch.equal(out, wanted) and torch.allclose(lse, wanted_lse, rtol=1e-6, atol=0)


def started(**changes):
    named = test_fused_attention.operands(test_fused_attention.CASES[1], torch.float32)
    named = begun(named, 4)
    return named | {name: change(named[name]) if callable(change) else change for name, change in changes.items()}


@pytest.mark.parametrize(("changes", "message"), [
    (dict(far=None), "found far_lse without far, wanted both or none"),
    (dict(far_lse=None), "found far without far_lse, wanted both or none"),
    (dict(far=lambda x: x[..., :-1]),
     "found far [1, 1, 4, 63] in torch.float32, wanted [1, 1, tiles, 64] in torch.float32"),
    (dict(far=lambda x: x.half()), "in torch.float16, wanted [1, 1, tiles, 64] in torch.float32"),
    (dict(far=lambda x: torch.stack([x, x], -1)[..., 0]), "found far with head_dim stride 2"),
    (dict(far_lse=lambda x: x[..., 1:]), "found far_lse [1, 1, 3] in torch.float32, wanted [1, 1, 4] in torch.float32"),
    (dict(far_lse=lambda x: x.double()), "found far_lse [1, 1, 4] in torch.float64"),
    (dict(far=lambda x: x.repeat(1, 1, 2, 1), far_lse=lambda x: x.repeat(1, 1, 2)),
     "found far of 8 tiles of 1 blocks, wanted 1 to 4 blocks in all, those that have a list"),
    (dict(tile_grid=(0, 4, 8, 8, 4, 4, 8), gate=None, coarse=None), "found blocks_per_tile 1, wanted tile_grid's 2"),
])
def test_a_start_that_breaks_the_contract_is_named_with_what_was_wanted(changes, message):
    with pytest.raises(ValueError) as error:
        block_sparse_attention(**started(**changes))
    assert str(error.value).startswith("block_sparse_attention: ") and message in str(error.value)


def test_the_op_keeps_its_promises_to_the_compiler_with_a_start():
    named = started()
    named["far"].nan_to_num_()                                        # opcheck compares operands before and after
    scale, return_lse = named.pop("scale"), named.pop("return_lse")
    order = ("token_rows", "gate", "coarse", "blocks_per_tile", "tile_grid", "far", "far_lse")
    first, rest = list(named.values())[:6], [named.get(name) for name in order]
    op = torch.ops.video_sparse_attention.block_sparse_attention.default
    torch.library.opcheck(op, (*first, scale, "reference", return_lse, *rest))
