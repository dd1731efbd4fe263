"""The fused passes on a real GPU: gathered attention, tile means, selection, and all of them in a row; far fields.

Rehearsed without one.
"""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import test_far_start as far_start
from on_gpu import HERE, INT8, MEANS, REHEARSED, SELECT, by_kernel, cases, need, peak_memory, to_device
from pack.kernels import Call, block_sparse_attention, reference_int8, reference_tiles, select_tiles, tile_means
from pack.kernels.problems import IN_HALF, TOLERANCE
from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder
from test_fused_attention import CASES, GATES, HALVES, operands, oracle, worst_error
from test_tile_grid import CASES as GRIDS
from test_tile_grid import expected, problem

pytestmark = pytest.mark.gpu


def attend(spec, named):
    out = block_sparse_attention(**{name: to_device(x) for name, x in named.items()}, backend=spec.name)
    return [x.cpu() for x in out]


def agrees(found, wanted, named, gates=GATES):
    (out, lse), (expected_out, expected_lse) = found, wanted
    assert worst_error(out, expected_out, named["token_rows"]) <= gates[named["q"].dtype]
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    assert (lse.double() - expected_lse).nan_to_num(nan=torch.inf).abs().max().item() <= 1e-3


@by_kernel
@pytest.mark.parametrize("dtype", cases(HALVES), ids=str)
@pytest.mark.parametrize("case", cases(CASES), ids=lambda case: case.why)
def test_gathered_attention_agrees_with_the_oracle_in_every_query_block(spec, case, dtype):
    need(spec, dtype, case.dim)
    named = operands(case, dtype)
    agrees(attend(spec, named), oracle(**named), named)


@pytest.mark.parametrize("dtype", cases(HALVES), ids=str)
@pytest.mark.parametrize("make", cases(far_start.CASES.values()), ids=cases(far_start.CASES))
def test_integer_scores_are_those_of_their_specification(make, dtype):
    named = make(dtype)
    need(INT8, dtype, named["q"].shape[-1])
    for given in (named, far_start.begun(named, far_start.tiles_of(named))):
        wide = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for name, x in given.items()}
        in_half = INT8.sums_in_half(Call.on(HERE, dtype, named["q"].shape[-1]))
        agrees(attend(INT8, given), reference_int8.run(**wide), given, IN_HALF if in_half else TOLERANCE)


@pytest.mark.parametrize("dtype", cases(HALVES), ids=str)
@pytest.mark.parametrize("make", cases(far_start.CASES.values()), ids=cases(far_start.CASES))
def test_integer_scores_with_sums_in_float16_are_those_of_their_specification_on_any_card(make, dtype):
    named = make(dtype)
    need(INT8, dtype, named["q"].shape[-1])
    half_sums = {} if REHEARSED else {"half_sums": True}
    for given in (named, far_start.begun(named, far_start.tiles_of(named))):
        wide = {name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
                for name, x in given.items()}
        found = INT8.load()(**{name: to_device(x) for name, x in given.items()}, **half_sums)
        agrees([x.cpu() for x in found], reference_int8.run(**wide), given, IN_HALF)


@by_kernel
@pytest.mark.parametrize("dtype", cases(HALVES), ids=str)
@pytest.mark.parametrize("make", cases(far_start.CASES.values()), ids=cases(far_start.CASES))
def test_a_softmax_that_has_begun_goes_on_as_the_oracle_does(spec, make, dtype):
    named = make(dtype)
    need(spec, dtype, named["q"].shape[-1])
    named = far_start.begun(named, far_start.tiles_of(named))
    agrees(attend(spec, named), far_start.begun_oracle(named), named)


@by_kernel
@pytest.mark.parametrize("dtype", cases(HALVES), ids=str)
@pytest.mark.parametrize("dim", cases([64, 128]))
@pytest.mark.parametrize("case", cases(GRIDS), ids=lambda case: case.why)
def test_tiles_read_in_place_agree_with_the_oracle_in_every_block_of_the_grid(spec, case, dim, dtype):
    need(spec, dtype, dim)
    case = replace(case, dim=dim)
    named = problem(case, dtype)
    agrees(attend(spec, named), expected(case, dtype), named)


@by_kernel
def test_a_clip_read_in_place_is_right_fits_in_memory_and_is_bit_equal_every_time(spec):
    """21x30x52 tokens in tiles of 60 with text: long lists, rings that turn, dense query blocks beside sparse ones."""
    need(spec, torch.bfloat16, 128)
    grid, heads, runs = ((3, 10, 9), 1, 2) if REHEARSED else ((21, 30, 52), 4, 200)
    md = VideoSparseAttentionMetadataBuilder().build(0, grid, (1, 1, 1), 0.9, HERE, (3, 5, 4), suffix=77)
    generator = torch.Generator(HERE).manual_seed(1)
    q, k, v, gate = (torch.randn(1, md.total_seq_length, heads, 128, generator=generator, device=HERE).bfloat16()
                     for _ in range(4))
    impl, reference = (VideoSparseAttentionImpl(heads, 128, backend=name) for name in (spec.name, "reference"))
    first = impl.attend(q, k, v, md, gate)
    lists = heads * (md.topk + md.num_other_blocks) * md.variable_block_sizes.numel() * 4
    assert peak_memory(lambda: impl.attend(q, k, v, md, gate))[1] < 2 * q.nbytes + lists
    for _ in range(runs):
        assert torch.equal(impl.attend(q, k, v, md, gate), first)
    missed = (first.float() - reference.attend(q, k, v, md, gate).float()).norm(dim=(0, 3))    # [tokens, heads]
    size = first.float().norm(dim=(0, 3))
    right = missed <= 3 * GATES[torch.bfloat16] * size                 # a tile that nearly tied may be another one
    assert right.float().mean() > 0.99


@pytest.mark.parametrize("dim", cases([64, 128]))
@pytest.mark.parametrize("keys, k", cases([(77, 77), (1, 1), (546, 55), (1440, 144), (2160, 1), (4096, 410)]))
@pytest.mark.parametrize("spec", SELECT, ids=lambda spec: spec.name)
def test_exact_scores_give_exactly_the_lists_of_torch(spec, keys, k, dim):
    need(spec, torch.float32, dim)
    generator = torch.Generator().manual_seed(keys)
    queries, means = (torch.randint(-3, 4, (1, 3, n, dim), generator=generator).float() for n in (200, keys))
    wanted = reference_tiles.select_tiles(queries, means, k, 0.125, 1, 2)
    found = select_tiles(queries.to(HERE), means.to(HERE), k, 0.125, 1, 2, backend=spec.name)
    assert torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("dtype", cases(HALVES), ids=str)
@pytest.mark.parametrize("thw, tile, others", cases([
    ((9, 21, 33), (3, 5, 4), dict(suffix=77)), ((21, 30, 52), (4, 4, 4), {}),
    ((9, 40, 50), (4, 8, 8), dict(prefix=5))]), ids=str)
@pytest.mark.parametrize("spec", MEANS, ids=lambda spec: spec.name)
def test_means_and_the_whole_op_are_those_of_torch_and_bit_equal_every_time(spec, thw, tile, others, dtype):
    need(spec, dtype, 128)
    md = VideoSparseAttentionMetadataBuilder().build(0, raw_latent_shape=thw, patch_size=(1, 1, 1), VSA_sparsity=0.8,
                                                     device=HERE, tile_size=tile, **others)
    generator, heads = torch.Generator(HERE).manual_seed(1), 1 if REHEARSED else 3
    q, k, v, gate = (torch.randn(2, md.total_seq_length, heads, 128, generator=generator, device=HERE).to(dtype)
                     for _ in range(4))
    tiles, per_tile = md.variable_block_sizes.shape[0], md.blocks_per_tile
    for got, wanted in zip(*(tile_means((q, k, v), md.token_rows, tiles, per_tile, name)
                             for name in (spec.name, "reference"))):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    seen = []
    impl, reference = (VideoSparseAttentionImpl(heads, 128, backend=name,
                                                on_selection=lambda tiles, md: seen.append(tiles))
                       for name in ("reference" if REHEARSED else "triton", "reference"))
    out, taken = peak_memory(lambda: impl.attend(q, k, v, md, gate))
    assert taken < 2 * q.nbytes + seen[0].nbytes
    for _ in range(1 if REHEARSED else 20):
        assert torch.equal(impl.attend(q, k, v, md, gate), out)
    wanted = reference.attend(q.float(), k.float(), v.float(), md, gate.float())
    same = (seen[0] == seen[-1]).all(-1)                               # near-ties may fall either way
    assert same.float().mean() > 0.99
    rows = md.token_rows[:md.num_video_slots].view(tiles, -1)
    for tile in range(0, tiles, 7):
        its = rows[tile][rows[tile] >= 0].long()
        error = (out[:, its] - wanted[:, its]).norm(dim=(1, 3)) / wanted[:, its].norm(dim=(1, 3))
        assert float(torch.where(same[:, :, tile], error, 0).max()) <= GATES[dtype]
