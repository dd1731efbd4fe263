"""The kernel's own text on an emulated CTA, its threads, copies and products in many orders; broken text is noticed."""
from __future__ import annotations

import pytest
import torch

import emulated_sm90
from kernel_oracle import block_sparse_attention_oracle, worst_block_error
from pack.kernels.cuda_sm90 import loader
from pack.kernels.cuda_sm90.launch import readable
from pack.kernels.tile_grid import TileGrid

pytestmark = pytest.mark.skipif(emulated_sm90.unavailable() is not None, reason=str(emulated_sm90.unavailable()))

SIZES = (64, 17, 64, 64, 0, 64, 33, 64, 64)


def operands(lists, dim=64, sizes=SIZES, dtype=torch.bfloat16):
    """One head; padding is NaN, index tails are wild."""
    generator = torch.Generator().manual_seed(len(lists) + dim)
    q = torch.randn(1, len(lists) * 64, 1, dim, generator=generator).to(dtype)
    k, v = (torch.randn(1, len(sizes) * 64, 1, dim, generator=generator).to(dtype) for _ in range(2))
    for block, size in enumerate(sizes):
        k[:, block * 64 + size:(block + 1) * 64] = v[:, block * 64 + size:(block + 1) * 64] = torch.nan
    indices = torch.full((1, 1, len(lists), 1 + max(map(len, lists))), -1, dtype=torch.int32)
    for row, listed in enumerate(lists):
        indices[0, 0, row, :len(listed)] = torch.tensor(listed, dtype=torch.int32)
    counts = torch.tensor([[[len(listed) for listed in lists]]], dtype=torch.int32)
    return q, k, v, indices, counts, torch.tensor(sizes, dtype=torch.int32)


def error_of(tensors, **kwargs):
    dim = tensors[0].shape[-1]
    out, lse = emulated_sm90.run(*tensors, dim ** -0.5, True, **kwargs)
    expected, expected_lse = block_sparse_attention_oracle(*tensors, dim ** -0.5)
    assert (lse.double() - expected_lse).nan_to_num().abs().max() <= 1e-3
    return worst_block_error(out, expected)


LISTS = {
    "own lists, so long that the rings turn": ((0, 1, 2, 3, 5, 6, 7, 8), (1, 2, 4, 5, 6, 7, 8)),
    "one list for both, odd": ((0, 1, 2, 3, 5, 6, 7, 8, 4), (0, 1, 2, 3, 5, 6, 7, 8, 4)),
    "one list for both, even": ((1, 2, 4, 5, 6, 8), (1, 2, 4, 5, 6, 8)),
    "equal but for the last entry": ((1, 2, 6), (1, 2, 7)),
    "one block without a partner": ((3, 4, 5),),
    "the partner has nothing to do": ((0, 1, 2, 3, 4), ()),
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
def test_any_order_of_events_gives_the_oracles_result(lists, seed):
    assert error_of(operands(lists), seed=seed) <= 4e-3


@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
def test_two_panels_give_the_oracles_result(lists):
    assert error_of(operands(lists, dim=128)) <= 4e-3


@pytest.mark.parametrize("dim", [64, 128])
def test_rings_that_turn_many_times_give_the_oracles_result(dim):
    """83 and 85 fillings of a consumer's own 14 or 7 slots, 88 of the 28 or 14 that both share."""
    every = tuple(range(43))
    sizes = (64, 64, 31, 64) * 10 + (64, 5, 64)
    for lists in ((every[1:], every[:41]), (every, every)):
        assert error_of(operands(lists, dim, sizes)) <= 4e-3


def test_the_order_of_events_does_not_change_a_bit():
    tensors = operands(LISTS["own lists, so long that the rings turn"])
    first, *others = (emulated_sm90.run(*tensors, 0.125, True, seed=seed) for seed in range(4))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))


BROKEN = {
    "values are released before their product is done": (
        "        wgmma_wait<0>();\n        ring.release(lane);\n        ring.release(lane);\n",
        "        ring.release(lane);\n        ring.release(lane);\n        wgmma_wait<0>();\n"),
    "scores are read before their product is done": ("        wgmma_wait<1>();\n", "        wgmma_wait<2>();\n"),
    "weights are packed while a product reads them": (
        "        wgmma_wait<0>();\n        ring.release(lane);\n        ring.release(lane);\n",
        "        wgmma_wait<1>();\n        ring.release(lane);\n        ring.release(lane);\n"),
    "cleared padding is not made visible": ("    fence_async_proxy();\n    sync_threads", "    sync_threads"),
    "a ring forgets that it has turned": ("            phase ^= 1;\n", ""),
    "both readers count as one": ("one_for_both ? CONSUMERS * WARPS_PER_CONSUMER", "one_for_both ? WARPS_PER_CONSUMER"),
    "a copy of other size is expected": ("expect(barrier, SLOT_BYTES)", "expect(barrier, SLOT_BYTES / 2)"),
    "steps along the keys are too short": ("step * V_STEP_BYTES >> 4", "step * V_STEP_BYTES / 2 >> 4"),
}


@pytest.mark.parametrize("edit", BROKEN.values(), ids=BROKEN)
def test_the_emulator_notices_when(edit):
    assert edit[0] in loader.source()
    broken = loader.source().replace(*edit)
    sizes, every = (64, 9) + (64,) * 11, tuple(range(13))
    problems = [operands(lists, 128, sizes) for lists in ((every, every[:-1]), (every, every))]

    def noticed(tensors, seed):
        try:
            return not error_of(tensors, seed=seed, source=broken) <= 4e-3
        except (RuntimeError, AssertionError):
            return True

    assert any(noticed(tensors, seed) for seed in range(12) for tensors in problems)


def test_tensors_that_the_copy_engine_cannot_read_are_copied_and_others_are_not():
    x = torch.randn(2, 128, 3, 64).bfloat16()
    fused = torch.randn(2, 128, 3, 3, 64).bfloat16()[:, :, 1]
    unaligned = torch.randn(2, 128, 3, 65).bfloat16()[..., :64]
    expanded = x[:, :, :1].expand(-1, -1, 3, -1)
    for grid in (None, TileGrid(3, 3, 5, 8, 3, 5, 4)):
        got = readable(x, fused, unaligned, 0.5, grid=grid)
        assert got[0] is x and got[1] is fused and got[2].is_contiguous() and torch.equal(got[2], unaligned)
        assert readable(expanded, x, x, 0.5, grid=grid)[0].is_contiguous()
        assert readable(x, x, x, 0.0, grid=grid)[4] > 0
        flipped = readable(x, x, x, -0.5, grid=grid)
        assert torch.equal(flipped[0], -x) and flipped[4] == 0.5
    assert readable(x, x, x, 0.5, fused)[3] is fused
    between = torch.randn(x.numel() + 1).bfloat16()[1:].view(x.shape)        # contiguous, and no pair is aligned
    for odd in (unaligned, between):
        got = readable(x, x, x, 0.5, odd)[3]
        assert got.data_ptr() % 4 == 0 and got.is_contiguous() and torch.equal(got, odd)
