"""Attention on the tiles of a token grid, read in place, against a float64 oracle that knows only rows and lists."""
from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch

import emulated_sm90
import interpreted_kernel
from pack import kernels
from pack.kernels import TileGrid, block_sparse_attention, cuda_sm90, gathered, reference
from pack.kernels.cuda_sm90 import launch
from pack.kernels.cuda_sm90.boxes import LARGEST_COORDINATE, box_of, boxes_of
from pack.kernels.cuda_sm90.loader import constant, source
from pack.vsa_core.backends.sliding_tile_attn import SlidingTileAttentionImpl, SlidingTileAttentionMetadataBuilder
from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder
from pack.vsa_core.grid import TokenGrid
from pack.vsa_core.layout import TileLayout
from test_fused_attention import GATES, HALVES, INTERPRETER_GATES, oracle, worst_error

REFERENCE, COPIES = "reference", "copies"
INTERPRETED, EMULATED = "triton in the interpreter", "cuda_sm90 in the emulator"
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    why: str
    thw: tuple[int, int, int]
    tile: tuple[int, int, int] = (4, 4, 4)
    prefix: int = 0
    suffix: int = 0
    hidden: tuple[int, ...] = ()
    keep: int = 2
    """Tiles that a query tile reads, random for every head."""
    dim: int = 64
    batch: int = 1
    heads: int = 1
    gated: bool = True


CASES = (
    Case("full tiles", (8, 4, 8)),
    Case("all three axes cut", (5, 6, 7), keep=5, heads=2),
    Case("tiles of 60 between other tokens", (5, 5, 6), (3, 5, 4), prefix=3, suffix=7, hidden=(9,)),
    Case("tiles of 60 in so long lists that rings turn", (3, 5, 80), (3, 5, 4), suffix=70, keep=17, dim=128),
    Case("all tiles kept so that neighbours share a ring", (3, 5, 63), (3, 5, 4), keep=99, dim=128),
    Case("a batch of two with two panels", (6, 5, 9), (3, 5, 4), dim=128, batch=2, heads=2),
    Case("a tile of two boxes of which one is outside", (3, 9, 10), (2, 8, 8), keep=1, suffix=70, hidden=(3, 5)),
    Case("boxes that are no runs of their tile", (9, 10, 4), (8, 8, 3), keep=3, prefix=1),
    Case("a grid smaller than one tile of six boxes", (2, 7, 8), (6, 8, 8), keep=1, dim=128),
    Case("no coarse branch", (4, 5, 7), (3, 5, 4), keep=3, gated=False, batch=2),
    Case("one token", (1, 1, 1), keep=1),
    Case("more other tokens than video", (1, 4, 4), prefix=130, suffix=65, hidden=(0, 131), keep=1),
)


def problem(case, dtype):
    """Arguments of `block_sparse_attention` by name. Keys that nobody sees are NaN."""
    generator = torch.Generator().manual_seed(sum(map(ord, case.why)))
    layout = TileLayout.of_grid(TokenGrid(case.thw, case.prefix, case.suffix, case.hidden), case.tile, "cpu")
    tiles, per_tile = layout.variable_block_sizes.numel(), layout.blocks_per_tile
    shape = (case.batch, layout.total_seq_length, case.heads, case.dim)
    q, k, v, gate = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    rows = [i if i < case.prefix else i + math.prod(case.thw) for i in case.hidden]
    k[:, rows], v[:, rows] = NAN, NAN
    coarse = torch.randn(case.batch, case.heads, tiles, case.dim, generator=generator)
    scores = torch.rand(case.batch, case.heads, tiles, tiles, generator=generator)
    kept = scores.topk(min(case.keep, tiles)).indices.sort(-1).values
    blocks = (kept[..., None] * per_tile + torch.arange(per_tile)).flatten(3)
    others = torch.arange(tiles * per_tile, layout.kernel_block_sizes.numel())
    lists = torch.cat([blocks, others.expand(*blocks.shape[:3], -1)], -1).repeat_interleave(per_tile, 2).int()
    return dict(q=q, k=k, v=v, indices=lists, counts=torch.full(lists.shape[:3], lists.shape[3], dtype=torch.int32),
                block_sizes=layout.kernel_block_sizes, scale=case.dim ** -0.5, return_lse=True,
                token_rows=layout.token_rows, gate=gate if case.gated else None,
                coarse=coarse.to(torch.promote_types(dtype, torch.float32)) if case.gated else None,
                blocks_per_tile=per_tile, tile_grid=layout.tile_grid)


def expected(named):
    return oracle(**{name: value for name, value in named.items() if name != "tile_grid"})


@pytest.fixture(params=[REFERENCE, COPIES, INTERPRETED, EMULATED])
def kernel(request):
    """(run by operands' names, gates)"""
    if request.param == EMULATED:
        if reason := emulated_sm90.unavailable():
            pytest.skip(reason)
        return emulated_sm90.run, GATES
    if request.param == INTERPRETED:
        worker = request.getfixturevalue("worker")
        return lambda **named: interpreted_kernel.call(worker, "block_sparse", *named.values()), INTERPRETER_GATES
    return reference.run if request.param == REFERENCE else partial(gathered.on_copies, reference.run), GATES


EVERY_KERNEL_IN_EVERY_DTYPE = [
    pytest.param(kernel, dtype, id=f"{kernel} {str(dtype).removeprefix('torch.')}")
    for kernel, dtypes in ((REFERENCE, (torch.float64, torch.bfloat16)), (COPIES, (torch.float32,)),
                           (INTERPRETED, (torch.float16,)), (EMULATED, HALVES)) for dtype in dtypes]


@pytest.mark.parametrize(("kernel", "dtype"), EVERY_KERNEL_IN_EVERY_DTYPE, indirect=["kernel"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_a_kernel_agrees_with_the_oracle_in_every_block_of_the_grid(kernel, case, dtype):
    run, gates = kernel
    named = problem(case, dtype)
    out, lse = run(**named)
    wanted, wanted_lse = expected(named)
    assert out.shape == named["q"].shape and out.dtype == dtype and out.is_contiguous()
    assert worst_error(out, wanted, named["token_rows"]) <= gates[dtype]
    assert (lse.double() - wanted_lse).nan_to_num(nan=torch.inf).abs().max().item() <= 1e-3


def stored_as_bhsd(*tensors):
    return tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)


def slices_of_one_tensor(*tensors):
    return torch.stack(tensors, dim=2).unbind(2)


def odd_strides(*tensors):
    return tuple(torch.cat([x, x[..., :1]], -1)[..., :-1] for x in tensors)


@pytest.mark.parametrize("layout", [stored_as_bhsd, slices_of_one_tensor, odd_strides])
def test_strides_of_every_operand_do_not_change_a_bit(kernel, layout):
    named = problem(CASES[5], torch.float16)
    names = ("q", "k", "v", "gate")
    views = named | dict(zip(names, layout(*(named[name] for name in names)), strict=True))
    views["coarse"] = named["coarse"].transpose(1, 2).contiguous().transpose(1, 2)
    assert all(views[name].stride() != named[name].stride() for name in (*names, "coarse"))
    for got, wanted in zip(kernel[0](**views), kernel[0](**named), strict=True):
        assert torch.equal(got, wanted)


def test_a_nan_in_a_query_or_a_gate_stays_in_its_token(kernel):
    """Also where a box of 60 tokens follows it into the same place in shared memory."""
    named = problem(CASES[3], torch.float16)
    clean, _ = kernel[0](**named)
    tokens = named["q"].shape[1]
    named["q"][0, [70, tokens - 8], 0, 3], named["gate"][0, 90, 0, 5] = NAN, NAN
    out, _ = kernel[0](**named)
    touched = (out != clean).any(-1)[0, :, 0].nonzero().flatten().tolist()
    assert touched == [70, 90, tokens - 8] and out[0, 70].isnan().all() and out[0, 90].isnan().sum() == 1


@pytest.mark.skipif(emulated_sm90.unavailable() is not None, reason=str(emulated_sm90.unavailable()))
@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_events_does_not_change_a_bit(seed):
    named = problem(CASES[3], torch.bfloat16)
    for got, wanted in zip(emulated_sm90.run(**named, seed=seed + 1), emulated_sm90.run(**named), strict=True):
        assert torch.equal(got, wanted)


BROKEN = {
    "what lies in a slot at the start is taken for zeros": ("stale(~0u)", "stale(0)"),
    "all bytes of a slot are awaited": ("boxes.rows * PANELS * ROW_BYTES", "SLOT_BYTES"),
    "the second panel is a copy of the first": ("barrier, panel * PANEL_COLUMNS,", "barrier, 0,"),
    "height and width are swapped": ("at[1] << COORDINATE_BITS | at[2]", "at[2] << COORDINATE_BITS | at[1]"),
    "the mask ignores the edge": ("inside[axis] < boxes.box[axis]", "false"),
    "the grid starts with the sequence": ("return boxes.prefix + ((", "return (("),
    "dense blocks are read from a list": ("(consumer == 0 ? dense_0 : dense_1) ? nullptr :", ""),
    "the gate of another token": ("coarse.gate + row * coarse.gate_row", "coarse.gate + slot * coarse.gate_row"),
    "the mean of another tile": ("tile * coarse.mean_tile", "block * coarse.mean_tile + 0 * tile"),
}


@pytest.mark.skipif(emulated_sm90.unavailable() is not None, reason=str(emulated_sm90.unavailable()))
@pytest.mark.parametrize("edit", BROKEN.values(), ids=BROKEN)
def test_the_emulator_notices_when(edit):
    assert source().count(edit[0]) == 1
    broken = source().replace(*edit)
    cases = CASES[3], CASES[1], CASES[6], CASES[2]

    def noticed(case):
        named = problem(case, torch.bfloat16)
        for row in range(case.suffix and 40):                    # queries that a box must not take for values
            named["q"][:, -1 - row] = NAN
        try:
            out, lse = emulated_sm90.run(**named, source=broken)
        except (RuntimeError, AssertionError):
            return True
        wanted, wanted_lse = expected(named)
        kept = ~wanted.isnan()
        out, wanted = torch.where(kept, out.double(), 0), torch.where(kept, wanted, 0)
        return not (out - wanted).norm() <= 4e-3 * wanted.norm()

    assert any(noticed(case) for case in cases)


def test_the_kernel_reads_the_grid_where_the_sequence_has_it():
    named = problem(CASES[2], torch.bfloat16)
    seen = []

    class Recorder(emulated_sm90.EmulatedDriver):
        def encode(self, address, dtype, layout):
            seen.append((address, layout))
            return super().encode(address, dtype, layout)

    recorder = Recorder()
    shapes = [shape for shape, _ in launch.grid_launches(recorder, "bfloat16", **arguments(named))]
    blocks = named["token_rows"].numel() // 64
    assert shapes == [(-(-blocks // 2), 1, 1)]
    row = named["q"].stride(1) * 2
    for (address, described), x in zip(seen[:3], (named["q"], named["k"], named["v"]), strict=True):
        assert address == x.data_ptr() + 3 * row
        assert described == ((64, 6, 5, 5, 1), (row, 6 * row, 30 * row, 128), (64, 4, 5, 3, 1))
    assert [described.sizes[1] for _, described in seen[3:]] == [64] * 3, "only the tokens around the grid are copied"


def arguments(named):
    out, lse = torch.empty_like(named["q"]), torch.empty(1, 1, named["q"].shape[1])
    return {name: named[name] for name in ("q", "k", "v", "indices", "counts", "block_sizes", "scale", "token_rows",
                                           "gate", "coarse", "blocks_per_tile")} | dict(
        out=out, lse=lse, grid=named["tile_grid"])


TILES = [(4, 4, 4), (3, 5, 4), (2, 8, 8), (6, 8, 8), (8, 8, 3), (4, 4, 8), (1, 1, 64), (5, 64, 1), (12, 4, 4),
         (16, 3, 8)]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_boxes_of_a_tile_cover_it_and_hold_at_most_64_tokens(tile):
    box = box_of(tile)
    assert all(side % part == 0 for side, part in zip(tile, box, strict=True))
    assert math.prod(box) == min(64, math.prod(tile))
    assert math.prod(tile) // math.prod(box) == TileGrid(0, 1, 1, 1, *tile).blocks_per_tile


@pytest.mark.parametrize("thw", [(5, 6, 7), (8, 8, 8), (4, 9, 3)], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_mask_has_a_bit_for_every_token_of_a_box_inside_the_grid(thw, tile):
    boxes, box = boxes_of(TileGrid(0, *thw, *tile)), box_of(tile)
    last = [(-(-length // side) - 1) * side for length, side in zip(thw, box, strict=True)]
    for cut, choice in enumerate(itertools.product(*([0, 1] for _ in range(3)))):
        if any(edge and not length % side for edge, length, side in zip(choice, thw, box, strict=True)):
            continue
        if any(not edge and side > length for edge, length, side in zip(choice, thw, box, strict=True)):
            continue
        at = [first if edge else 0 for edge, first in zip(choice, last, strict=True)]
        places = itertools.product(*(range(first, first + side) for first, side in zip(at, box, strict=True)))
        inside = [all(p < length for p, length in zip(place, thw, strict=True)) for place in places]
        assert [boxes.masks[cut] >> slot & 1 for slot in range(64)] == inside + [0] * (64 - len(inside))


def test_a_side_that_has_no_room_in_a_coordinate_is_copied_instead():
    assert constant("LARGEST_COORDINATE", 64) == LARGEST_COORDINATE
    assert cuda_sm90.SPEC.gathers(TileGrid(0, 2, 3, 1020, 3, 5, 4))
    assert not cuda_sm90.SPEC.gathers(TileGrid(0, 2, 3, 1021, 3, 5, 4))
    assert not cuda_sm90.SPEC.gathers(None)


@pytest.mark.parametrize(("grid", "message"), [
    ((0, 5, 5, 6), "found tile_grid [0, 5, 5, 6], wanted (prefix, t, h, w, tile_t, tile_h, tile_w)"),
    ((3, 5, 5, 0, 3, 5, 4), "wanted sides from 1 on, a tile of at most 64 tokens or a multiple of it"),
    ((3, 5, 5, 6, 3, 5, 5), "wanted sides from 1 on, a tile of at most 64 tokens or a multiple of it"),
    ((3, 5, 5, 7, 3, 5, 4), "of 178 tokens in 4 blocks, wanted at most 160 tokens in 5 blocks"),
    ((3, 5, 5, 6, 1, 5, 4), "of 153 tokens in 10 blocks, wanted at most 160 tokens in 5 blocks"),
    ((0, 2, 3, 4, 2, 8, 8), "found blocks_per_tile 1, wanted tile_grid's 2"),
])
def test_a_grid_that_is_none_is_named_with_what_was_wanted(grid, message):
    with pytest.raises(ValueError) as error:
        block_sparse_attention(**problem(CASES[2], torch.float32) | dict(tile_grid=grid))
    assert str(error.value).startswith("block_sparse_attention: ") and message in str(error.value)


def test_the_op_takes_a_grid_and_keeps_its_promises_to_the_compiler():
    named = problem(CASES[2], torch.float32)
    scale, return_lse = named.pop("scale"), named.pop("return_lse")
    first, (*rest, grid) = list(named.values())[:6], list(named.values())[6:]
    op = torch.ops.video_sparse_attention.block_sparse_attention.default
    torch.library.opcheck(op, (*first, scale, "reference", return_lse, *rest, list(grid)))


@pytest.fixture
def emulated_backend(monkeypatch):
    """The kernel under its own name on the CPU; making copies is an error."""
    if reason := emulated_sm90.unavailable():
        pytest.skip(reason)

    def refuse(*args):
        raise AssertionError("tokens were copied")

    spec = replace(cuda_sm90.SPEC, load=lambda: emulated_sm90.run, device_types=("cpu",), files=())
    monkeypatch.setattr(kernels, "KERNELS", (spec, reference.SPEC))
    monkeypatch.setattr(gathered, "on_copies", refuse)
    return spec.name


@pytest.mark.parametrize(("thw", "tile", "others"), [
    ((5, 9, 7), (3, 5, 4), dict(suffix=70, hidden=(2,))), ((4, 8, 12), (4, 4, 8), dict(prefix=2))], ids=str)
def test_video_sparse_attention_reads_its_tiles_in_place(emulated_backend, thw, tile, others):
    md = VideoSparseAttentionMetadataBuilder().build(0, thw, (1, 1, 1), 0.5, "cpu", tile, **others)
    generator = torch.Generator().manual_seed(3)
    q, k, v, gate = (torch.randn(2, md.total_seq_length, 2, 64, generator=generator).bfloat16() for _ in range(4))
    got, wanted = (VideoSparseAttentionImpl(2, 64, backend=name).attend(q, k, v, md, gate)
                   for name in (emulated_backend, "reference"))
    assert (got - wanted).float().norm() <= 4e-3 * wanted.float().norm()


@pytest.mark.parametrize("tile", [(6, 8, 8), (3, 5, 4)], ids=str)
def test_windows_of_tiles_are_read_in_place(emulated_backend, tile):
    windows = [[((1, 3, 1), (3, 1, 3), (1, 1, 1))]]
    md = SlidingTileAttentionMetadataBuilder().build(windows, 0, (7, 9, 17), device="cpu", tile_size=tile, suffix=5,
                                                     layer=0)
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(1, 7 * 9 * 17 + 5, 3, 64, generator=generator).bfloat16() for _ in range(3))
    got, wanted = (SlidingTileAttentionImpl(3, 64, backend=name).attend(q, k, v, md)
                   for name in (emulated_backend, "reference"))
    assert (got - wanted).float().norm() <= 4e-3 * wanted.float().norm()
