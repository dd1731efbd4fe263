"""Attention on tokens in the order of the sequence, gathered and combined in the kernel, against a float64 oracle."""
from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch

import interpreted_kernel
from kernel_oracle import block_sparse_attention_oracle
from pack.kernels import block_sparse_attention, gathered, reference

GATES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4e-3}
INTERPRETER_GATES = {**GATES, torch.bfloat16: 8e-3}
REFERENCE, COPIES, INTERPRETED = "reference", "copies for a kernel that does not gather", "triton in the interpreter"
HALVES = (torch.float16, torch.bfloat16)
NAN, HUGE = float("nan"), 2**31 - 1


@dataclass(frozen=True)
class Case:
    why: str
    tiles: tuple[int, ...]
    """Tokens in every tile."""
    lists: tuple[tuple[int, ...], ...]
    """The tiles that every query tile reads; head h of batch b starts with entry b + h."""
    blocks_per_tile: int = 1
    others: int = 0
    hidden: int = 0
    """How many of the other tokens no query sees."""
    dim: int = 64
    batch: int = 1
    heads: int = 1
    gated: bool = True


CASES = (
    Case("full tiles of 64", (64, 64, 64), ((0, 1, 2), (1,), (0, 2))),
    Case("tiles of 60 with tokens before and after the clip", (60, 60, 30, 60), ((0, 3), (1, 2), (2,), (0, 1, 3)),
         others=70),
    Case("cut tiles of 64 in a batch of two", (64, 32, 16, 8), ((0, 1, 2, 3), (3,), (1, 2), (0,)), batch=2, heads=2),
    Case("tiles of 128 that end in an empty block", (128, 64, 5), ((0, 2), (1,), (0, 1, 2)), 2, others=3, dim=128),
    Case("tiles of 256", (256, 100), ((0, 1), (1,)), 4, others=1, hidden=1),
    Case("text of which a part is hidden", (64, 20), ((0,), (0, 1)), others=130, hidden=66, dim=128, heads=2),
    Case("no gate", (64, 40, 64), ((0, 2), (1,), (0, 1, 2)), others=5, gated=False, batch=2),
    Case("one tile of one token", (1,), ((0,),), others=1),
)


def operands(case, dtype):
    """Arguments of `block_sparse_attention` by name. Keys that nobody sees and index tails are poisoned."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.why)))
    per_tile = case.blocks_per_tile * 64
    tokens = sum(case.tiles) + case.others
    order = torch.randperm(tokens, generator=generator).tolist()
    rows, sizes = [], []
    for count in case.tiles:
        rows += [order.pop() for _ in range(count)] + [-1] * (per_tile - count)
        sizes += [max(0, min(64, count - 64 * block)) for block in range(case.blocks_per_tile)]
    listed, hidden = len(sizes), order[:case.hidden]
    if case.others:
        seen = case.others - case.hidden
        rows += order[::-1] + [-1] * (-case.others % 64)
        sizes += [max(0, min(64, seen - 64 * block)) for block in range(-(-case.others // 64))]
    shape = (case.batch, tokens, case.heads, case.dim)
    q, k, v, gate = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    coarse = torch.randn(case.batch, case.heads, len(case.tiles), case.dim, generator=generator).to(
        torch.promote_types(dtype, torch.float32))
    k[:, hidden], v[:, hidden] = NAN, NAN
    longest = (max(map(len, case.lists))) * case.blocks_per_tile + len(sizes) - listed
    indices = torch.full((case.batch, case.heads, listed, longest + 2), HUGE, dtype=torch.int32)
    counts = torch.zeros(case.batch, case.heads, listed, dtype=torch.int32)
    for b in range(case.batch):
        for h in range(case.heads):
            for tile in range(len(case.tiles)):
                kept = case.lists[(tile + b + h) % len(case.lists)]
                blocks = [key * case.blocks_per_tile + i for key in kept for i in range(case.blocks_per_tile)]
                blocks += range(listed, len(sizes))
                for row in range(tile * case.blocks_per_tile, (tile + 1) * case.blocks_per_tile):
                    indices[b, h, row, :len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
                    counts[b, h, row] = len(blocks)
    return dict(q=q, k=k, v=v, indices=indices, counts=counts, block_sizes=torch.tensor(sizes, dtype=torch.int32),
                scale=case.dim ** -0.5, return_lse=True, token_rows=torch.tensor(rows, dtype=torch.int32),
                gate=gate if case.gated else None, coarse=coarse if case.gated else None,
                blocks_per_tile=case.blocks_per_tile)


def oracle(q, k, v, indices, counts, block_sizes, scale, return_lse, token_rows, gate, coarse, blocks_per_tile):
    """out and lse in the order of the sequence, float64: every slot laid out by hand, dense rows by full lists."""
    slots, blocks = token_rows.tolist(), len(block_sizes)
    laid = [torch.stack([x[:, row] if row >= 0 else torch.zeros_like(x[:, 0]) for row in slots], 1)
            for x in (q, k, v)]
    lists = torch.zeros(*indices.shape[:2], blocks, max(blocks, indices.shape[3]), dtype=torch.int32)
    lists[..., :blocks] = torch.arange(blocks, dtype=torch.int32)
    lengths = torch.full(lists.shape[:3], blocks, dtype=torch.int32)
    lists[:, :, :indices.shape[2], :indices.shape[3]] = indices
    lengths[:, :, :indices.shape[2]] = counts
    fine, fine_lse = block_sparse_attention_oracle(*laid, lists, lengths, block_sizes, scale)
    out = torch.full(q.shape, NAN, dtype=torch.float64)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), NAN, dtype=torch.float64)
    for slot, row in enumerate(slots):
        if row < 0:
            continue
        out[:, row], lse[:, :, row] = fine[:, slot], fine_lse[:, :, slot]
        tile = slot // 64 // blocks_per_tile
        if gate is not None and tile < coarse.shape[2]:
            out[:, row] += gate[:, row].double() * coarse[:, :, tile].double()
    return out, lse


def worst_error(out, expected, token_rows):
    """The largest relative L2 error of any (batch, head, query block); inf where a NaN is."""
    worst = 0.0
    for block in token_rows.view(-1, 64):
        rows = block[block >= 0].long()
        if not len(rows):
            continue
        missed = (out[:, rows].double() - expected[:, rows]).norm(dim=(1, 3))
        worst = max(worst, (missed / expected[:, rows].norm(dim=(1, 3))).nan_to_num(nan=torch.inf).max().item())
    return worst


@pytest.fixture(params=[REFERENCE, COPIES, INTERPRETED])
def kernel(request):
    """(run by operands' names, gates)"""
    if request.param == REFERENCE:
        return (lambda **named: reference.run(**named)), GATES
    if request.param == COPIES:
        return partial(gathered.on_copies, lambda *eight: reference.run(*eight)), GATES
    worker = request.getfixturevalue("worker")
    return (lambda **named: interpreted_kernel.call(worker, "block_sparse", *named.values())), INTERPRETER_GATES


EVERY_KERNEL_IN_EVERY_DTYPE = [
    pytest.param(kernel, dtype, id=f"{kernel} {str(dtype).removeprefix('torch.')}")
    for kernel, dtypes in ((REFERENCE, GATES), (COPIES, GATES), (INTERPRETED, HALVES)) for dtype in dtypes]


@pytest.mark.parametrize(("kernel", "dtype"), EVERY_KERNEL_IN_EVERY_DTYPE, indirect=["kernel"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_gathered_attention_agrees_with_the_oracle_in_every_query_block(kernel, case, dtype):
    run, gates = kernel
    named = operands(case, dtype)
    out, lse = run(**named)
    expected, expected_lse = oracle(**named)
    assert out.shape == named["q"].shape and out.dtype == dtype and out.is_contiguous()
    assert worst_error(out, expected, named["token_rows"]) <= gates[dtype]
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    assert (lse.double() - expected_lse).nan_to_num(nan=torch.inf).abs().max().item() <= 1e-3


def stored_as_bhsd(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def cut_out_of_a_wider_tensor(x):
    return torch.cat([x, torch.full_like(x, NAN)], 2)[:, :, :x.shape[2]]


@pytest.mark.parametrize("layout", [stored_as_bhsd, cut_out_of_a_wider_tensor])
def test_strides_of_every_operand_do_not_change_a_bit(kernel, layout):
    named = operands(CASES[2], torch.float16)
    views = named | {name: layout(named[name]) for name in ("q", "k", "v", "gate")}
    views["coarse"] = named["coarse"].transpose(1, 2).contiguous().transpose(1, 2)
    assert all(views[name].stride() != named[name].stride() for name in ("q", "k", "v", "gate", "coarse"))
    for got, wanted in zip(kernel[0](**views), kernel[0](**named)):
        assert torch.equal(got, wanted)


def test_slots_in_the_order_of_the_sequence_are_plain_block_sparse_attention(kernel):
    named = operands(CASES[0], torch.float16) | dict(gate=None, coarse=None)
    q = named["q"]
    out, lse = kernel[0](**named | dict(token_rows=torch.arange(q.shape[1], dtype=torch.int32)))
    wanted, wanted_lse = kernel[0](**named | dict(token_rows=None))
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)


def test_a_nan_in_a_query_or_a_gate_stays_in_its_token(kernel):
    named = operands(CASES[1], torch.float16)
    clean, _ = kernel[0](**named)
    named["q"][0, 70, 0, 3], named["gate"][0, 90, 0, 5] = NAN, NAN
    out, _ = kernel[0](**named)
    touched = (out != clean).any(-1)[0, :, 0].nonzero().flatten().tolist()
    assert touched == [70, 90] and out[0, 70].isnan().all() and out[0, 90].isnan().sum() == 1


def edited(**changes):
    named = operands(CASES[1], torch.float32)
    return named | {name: change(named[name]) if callable(change) else change for name, change in changes.items()}


@pytest.mark.parametrize(("changes", "message"), [
    (dict(token_rows=lambda x: x[:-1]), "found token_rows [383], wanted [slots], contiguous, a multiple of 64"),
    (dict(token_rows=lambda x: x.long()), "found token_rows in torch.int64 on cpu, wanted int32 on cpu"),
    (dict(k=lambda x: x[:, 1:], v=lambda x: x[:, 1:]), "wanted one shape, with token_rows"),
    (dict(indices=lambda x: x[:, 0]), "wanted [1, 1, at most 6, K]"),
    (dict(counts=lambda x: x[..., 1:]), "found counts [1, 1, 3], wanted [1, 1, 4]"),
    (dict(block_sizes=lambda x: x[1:]), "found block_sizes [5], wanted [6]"),
    (dict(gate=None), "found coarse without gate, wanted both or none"),
    (dict(coarse=None), "found gate without coarse, wanted both or none"),
    (dict(gate=lambda x: x.half()), "in torch.float16 on cpu, wanted [1, 280, 1, 64] in torch.float32 on cpu"),
    (dict(gate=lambda x: torch.stack([x, x], -1)[..., 0]), "found gate with head_dim stride 2"),
    (dict(coarse=lambda x: x.half()), "in torch.float16, wanted [1, 1, tiles, 64] in torch.float32"),
    (dict(blocks_per_tile=2), "found 4 tiles of 2 blocks, wanted 1 to 6 blocks in all"),
    (dict(token_rows=None, q=lambda x: x[:, :64], k=lambda x: x[:, :64], v=lambda x: x[:, :64]),
     "found gate, coarse or tile_grid without token_rows, wanted token_rows too"),
])
def test_operands_that_break_the_contract_are_named_with_what_was_wanted(changes, message):
    with pytest.raises(ValueError) as error:
        block_sparse_attention(**edited(**changes))
    assert str(error.value).startswith("block_sparse_attention: ") and message in str(error.value)


@pytest.mark.parametrize("gated", [False, True])
def test_the_op_keeps_its_promises_to_the_compiler(gated):
    named = edited() if gated else edited(gate=None, coarse=None)
    scale, return_lse = named.pop("scale"), named.pop("return_lse")
    first, rest = list(named.values())[:6], list(named.values())[6:]
    op = torch.ops.video_sparse_attention.block_sparse_attention.default
    torch.library.opcheck(op, (*first, scale, "reference", return_lse, *rest))
