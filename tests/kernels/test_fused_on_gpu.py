"""The fused passes on a real GPU: gathered attention, tile means, selection, and all of them in a row."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pack.kernels import (
    KERNELS,
    Call,
    block_sparse_attention,
    explain_kernels,
    reference_tiles,
    select_tiles,
    tile_means,
)
from pack.kernels.tile_ops import MEANS_KERNELS, SELECT_KERNELS
from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder
from test_fused_attention import CASES, GATES, HALVES, operands, oracle, worst_error
from test_tile_grid import CASES as GRIDS
from test_tile_grid import expected, problem

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


MEANS, SELECT = MEANS_KERNELS[0], SELECT_KERNELS[0]


def need(*specs, dtype, dim):
    """Skip with a kernel's own words where it does not run on this GPU."""
    for spec in specs:
        if reason := spec.refusal(Call("cuda", torch.cuda.get_device_capability(), dtype, dim)):
            pytest.skip(f"{spec.name}: {reason}")


by_kernel = pytest.mark.parametrize("spec", [spec for spec in KERNELS if spec.files],
                                    ids=lambda spec: spec.name)


@by_kernel
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_gathered_attention_agrees_with_the_oracle_in_every_query_block(spec, case, dtype):
    named = operands(case, dtype)
    if reason := explain_kernels(Call("cuda", torch.cuda.get_device_capability(), dtype, case.dim))[spec.name]:
        pytest.skip(f"{spec.name}: {reason}")
    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in named.items()}
    out, lse = (x.cpu() for x in block_sparse_attention(**moved, backend=spec.name))
    expected, expected_lse = oracle(**named)
    assert worst_error(out, expected, named["token_rows"]) <= GATES[dtype]
    assert (lse.double() - expected_lse).nan_to_num(nan=torch.inf).abs().max().item() <= 1e-3


@by_kernel
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", GRIDS, ids=lambda case: case.why)
def test_tiles_read_in_place_agree_with_the_oracle_in_every_block_of_the_grid(spec, case, dim, dtype):
    named = problem(replace(case, dim=dim), dtype)
    if reason := explain_kernels(Call("cuda", torch.cuda.get_device_capability(), dtype, dim))[spec.name]:
        pytest.skip(f"{spec.name}: {reason}")
    moved = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in named.items()}
    out, lse = (x.cpu() for x in block_sparse_attention(**moved, backend=spec.name))
    wanted, wanted_lse = expected(named)
    assert worst_error(out, wanted, named["token_rows"]) <= GATES[dtype]
    assert (lse.double() - wanted_lse).nan_to_num(nan=torch.inf).abs().max().item() <= 1e-3


@by_kernel
def test_a_clip_read_in_place_is_right_fits_in_memory_and_is_bit_equal_every_time(spec):
    """21x30x52 tokens in tiles of 60 with text: long lists, rings that turn, dense query blocks beside sparse ones."""
    call = Call("cuda", torch.cuda.get_device_capability(), torch.bfloat16, 128)
    if reason := explain_kernels(call)[spec.name]:
        pytest.skip(f"{spec.name}: {reason}")
    md = VideoSparseAttentionMetadataBuilder().build(0, (21, 30, 52), (1, 1, 1), 0.9, "cuda", (3, 5, 4), suffix=77)
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v, gate = (torch.randn(1, md.total_seq_length, 4, 128, generator=generator, device="cuda").bfloat16()
                     for _ in range(4))
    impl, reference = (VideoSparseAttentionImpl(4, 128, backend=name) for name in (spec.name, "reference"))
    first = impl.attend(q, k, v, md, gate)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    impl.attend(q, k, v, md, gate)
    lists = 4 * (md.topk + md.num_other_blocks) * md.variable_block_sizes.numel() * 4
    assert torch.cuda.max_memory_allocated() - before < 2 * q.nbytes + lists
    for _ in range(200):
        assert torch.equal(impl.attend(q, k, v, md, gate), first)
    missed = (first.float() - reference.attend(q, k, v, md, gate).float()).norm(dim=(0, 3))    # [tokens, heads]
    size = first.float().norm(dim=(0, 3))
    right = missed <= 3 * GATES[torch.bfloat16] * size                 # a tile that nearly tied may be another one
    assert right.float().mean() > 0.99


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("keys, k", [(1, 1), (77, 77), (546, 55), (1440, 144), (2160, 1), (4096, 410)])
def test_exact_scores_give_exactly_the_lists_of_torch(keys, k, dim):
    need(SELECT, dtype=torch.float32, dim=dim)
    generator = torch.Generator().manual_seed(keys)
    queries, means = (torch.randint(-3, 4, (1, 3, n, dim), generator=generator).float() for n in (200, keys))
    wanted = reference_tiles.select_tiles(queries, means, k, 0.125, 1, 2)
    assert torch.equal(select_tiles(queries.cuda(), means.cuda(), k, 0.125, 1, 2, backend=SELECT.name).cpu(), wanted)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("thw, tile, others", [((21, 30, 52), (4, 4, 4), {}), ((9, 21, 33), (3, 5, 4), dict(suffix=77)),
                                               ((9, 40, 50), (4, 8, 8), dict(prefix=5))], ids=str)
def test_means_and_the_whole_op_are_those_of_torch_and_bit_equal_every_time(thw, tile, others, dtype):
    need(MEANS, dtype=dtype, dim=128)
    md = VideoSparseAttentionMetadataBuilder().build(0, raw_latent_shape=thw, patch_size=(1, 1, 1), VSA_sparsity=0.8,
                                                     device="cuda", tile_size=tile, **others)
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v, gate = (torch.randn(2, md.total_seq_length, 3, 128, generator=generator, device="cuda").to(dtype)
                     for _ in range(4))
    tiles, per_tile = md.variable_block_sizes.shape[0], md.blocks_per_tile
    for got, wanted in zip(*(tile_means((q, k, v), md.token_rows, tiles, per_tile, name)
                             for name in (MEANS.name, "reference"))):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    seen = []
    impl = VideoSparseAttentionImpl(3, 128, backend="triton", on_selection=lambda tiles, md: seen.append(tiles))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = impl.attend(q, k, v, md, gate)
    assert torch.cuda.max_memory_allocated() - before < 2 * q.nbytes + seen[0].nbytes
    for _ in range(20):
        assert torch.equal(impl.attend(q, k, v, md, gate), out)
    reference = VideoSparseAttentionImpl(3, 128, backend="reference", on_selection=lambda tiles, md: seen.append(tiles))
    wanted = reference.attend(q.float(), k.float(), v.float(), md, gate.float())
    same = (seen[0] == seen[-1]).all(-1)                               # near-ties may fall either way
    assert same.float().mean() > 0.99
    rows = md.token_rows[:md.num_video_slots].view(tiles, -1)
    for tile in range(0, tiles, 7):
        its = rows[tile][rows[tile] >= 0].long()
        error = (out[:, its] - wanted[:, its]).norm(dim=(1, 3)) / wanted[:, its].norm(dim=(1, 3))
        assert float(torch.where(same[:, :, tile], error, 0).max()) <= GATES[dtype]
