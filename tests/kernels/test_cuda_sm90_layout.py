"""Addresses and registers of the CUDA kernel, from the constants of its own text, against the documented layouts.

Sources: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout" and "Register Fragments and Shared
Memory Matrix Layouts" of wgmma.mma_async.m64nNk16; "Tensor copies, swizzling modes". Nothing here runs the kernel.
"""
from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from pack.kernels.cuda_sm90.loader import constant, source
from pack.kernels.cuda_sm90.tensor_map import box_layout, packed_layout
from pack.kernels.tile_grid import TileGrid

DIMS = (64, 128)
SLOT = 5


def swizzled(address):
    """128-byte swizzle: address bits 4..6 are xored with bits 7..9."""
    return address ^ (address >> 7 & 7) << 4


def copy(memory, target, source, described, at):
    """What one copy does: the box at these coordinates, innermost first, zeros for what lies outside. -> bytes"""
    place = 0
    for index in np.ndindex(*reversed(described.box)):
        coordinate = [start + i for start, i in zip(at, reversed(index), strict=True)]
        inside = all(0 <= c < size for c, size in zip(coordinate, described.sizes, strict=True))
        offset = coordinate[0] * 2 + sum(c * s for c, s in zip(coordinate[1:], described.strides, strict=True))
        memory[swizzled(target + 2 * place) // 2] = source[offset // 2] if inside else 0
        place += 1
    return 2 * place


def copied_packed_block(dim):
    """(shared memory in elements of 2 bytes, address of the copy, the block it copied); every element differs."""
    tensor = torch.arange(1, 2 * 192 * 3 * dim + 1).short().view(2, 192, 3, dim)
    wide = torch.arange(1, tensor.numel() + 1).view(tensor.shape)
    memory = np.full(constant("SHARED_BYTES", dim) // 2, -1, dtype=np.int64)
    base = SLOT * constant("SLOT_BYTES", dim)
    brought = copy(memory, base, wide.flatten().numpy(), packed_layout(tensor), (0, 64, 0, 1, 1))
    assert brought == constant("SLOT_BYTES", dim), "what a barrier waits for is what a copy brings"
    return memory, base, wide[1, 64:128, 1].numpy()


def copied_box(dim):
    """The same for a tile of 60 that the grid's edge cuts: rows outside are 0, those behind the box untouched."""
    grid = TileGrid(5, 4, 7, 6, 3, 5, 4)
    tensor = torch.arange(1, (grid.prefix + 168 + 2) * 3 * dim + 1).short().view(1, -1, 3, dim)
    wide = torch.arange(1, tensor.numel() + 1).view(tensor.shape)
    memory = np.full(constant("SHARED_BYTES", dim) // 2, -1, dtype=np.int64)
    base, brought = SLOT * constant("SLOT_BYTES", dim), 0
    source = wide[:, grid.prefix:].flatten().numpy()
    described = box_layout(tensor, grid, grid.tile)
    for panel in range(constant("PANELS", dim)):
        columns = panel * constant("PANEL_COLUMNS", dim)
        brought += copy(memory, base + panel * constant("PANEL_BYTES", dim), source, described, (columns, 4, 5, 3, 1))
    assert brought == 60 * constant("PANELS", dim) * constant("ROW_BYTES", dim)
    block = np.zeros((64, dim), dtype=np.int64)
    block[60:] = -1
    for slot, (t, h, w) in enumerate(np.ndindex(3, 5, 4)):
        if 3 + t < 4 and 5 + h < 7 and 4 + w < 6:
            block[slot] = wide[0, grid.prefix + ((3 + t) * 7 + 5 + h) * 6 + 4 + w, 1]
    assert (block[:60] > 0).any(1).sum() == 4
    return memory, base, block


every_copy = pytest.mark.parametrize("copied_block", [copied_packed_block, copied_box])


def descriptor(low, high):
    """(start, leading byte offset, stride byte offset, swizzle mode) as the hardware takes them apart."""
    return (low & 0x3fff) << 4, (low >> 16 & 0x3fff) << 4, (high & 0x3fff) << 4, high >> 30


@every_copy
@pytest.mark.parametrize("dim", DIMS)
def test_a_step_over_dimensions_reads_its_16_columns_of_every_key(dim, copied_block):
    memory, base, block = copied_block(dim)
    per_panel, panel_bytes, step_bytes = (constant(x, dim) for x in ("STEPS_PER_PANEL", "PANEL_BYTES", "K_STEP_BYTES"))
    low = base >> 4 | constant("K_LEADING_BYTES", dim) >> 4 << 16
    high = constant("K_STRIDE_BYTES", dim) >> 4 | constant("DESCRIPTOR_SWIZZLE_128", dim)
    for step in range(dim // 16):
        advanced = low + (step // per_panel * panel_bytes >> 4) + (step % per_panel * step_bytes >> 4)
        start, _, stride, mode = descriptor(advanced, high)
        assert mode == 1
        n, k = np.mgrid[:64, :16]
        addresses = swizzled(start + n // 8 * stride + n % 8 * 128 + k * 2)     # K-major: ((8,n),2):((8,SBO),1)
        np.testing.assert_array_equal(memory[addresses // 2], block[:, 16 * step:16 * step + 16])


@every_copy
@pytest.mark.parametrize("dim", DIMS)
def test_a_step_over_keys_reads_all_columns_of_its_16_values(dim, copied_block):
    memory, base, block = copied_block(dim)
    low = base >> 4 | constant("V_LEADING_BYTES", dim) >> 4 << 16
    high = constant("V_STRIDE_BYTES", dim) >> 4 | constant("DESCRIPTOR_SWIZZLE_128", dim)
    for step in range(4):
        start, leading, stride, mode = descriptor(low + (step * constant("V_STEP_BYTES", dim) >> 4), high)
        assert mode == 1
        k, n = np.mgrid[:16, :dim]                            # MN-major: ((8,n),(8,k)):((1,LBO),(8,SBO))
        addresses = swizzled(start + n // 64 * leading + k // 8 * stride + k % 8 * 128 + n % 64 * 2)
        np.testing.assert_array_equal(memory[addresses // 2], block[16 * step:16 * step + 16])


@pytest.mark.parametrize("dim", DIMS)
def test_every_slot_starts_where_the_swizzle_starts_and_fits_a_descriptor(dim):
    assert constant("SLOT_BYTES", dim) % constant("SLOT_ALIGNMENT", dim) == 0
    assert constant("PANEL_BYTES", dim) % constant("SLOT_ALIGNMENT", dim) == 0
    assert constant("SHARED_BYTES", dim) < 1 << 18, "a descriptor holds 18 bits of an address"
    assert constant("SHARED_BYTES", dim) <= 227 * 1024
    assert constant("SLOTS", dim) // constant("CONSUMERS", dim) >= 6, "q or: keys, values and the next keys"
    for name in ("FULL_OFFSET", "EMPTY_OFFSET", "NOTES_OFFSET"):
        assert constant(name, dim) % constant("BARRIER_BYTES", dim) == 0


def accumulator(lane, i, warp=0):
    """(row, column) of register i of a 64xN float32 accumulator."""
    return warp * 16 + lane // 4 + i // 2 % 2 * 8, i // 4 * 8 + lane % 4 * 2 + i % 2


def operand_a(lane, register, half):
    """(row, k) of one half of register 0..3 of a 16-bit A fragment, 64x16."""
    return lane // 4 + register % 2 * 8, lane % 4 * 2 + register // 2 * 8 + half


def test_packed_weights_are_the_fragments_of_the_next_product():
    assert "p[i] = packed(s[2 * i], s[2 * i + 1]);" in source()
    assert "wgmma_outputs(o, p, FIRST / 4 + step," in source() and "FRAGMENT(p, 4 * step)" in source()
    for lane in range(32):
        for block in range(2):
            for step in range(4):
                for register in range(4):
                    p = 4 * (block * constant("WEIGHTS", 64) // 4 + step) + register
                    for half in range(2):
                        score = 2 * p + half
                        row, column = accumulator(lane, score % constant("SCORES", 64))
                        assert score // constant("SCORES", 64) == block
                        assert (row, column - 16 * step) == operand_a(lane, register, half)


def test_the_mask_and_the_rows_of_softmax_follow_the_accumulator():
    assert "there >>= lane % 4 * 2;" in source()
    assert "there >> (i / 4 * 8 + i % 2) & 1)) s[FIRST + half * (SCORES / 2) + i] = none();" in source()
    assert "int r = i / 2 % 2;" in source() and "o[i] *= decay[i / 2 % 2]" in source()
    for lane in range(32):
        for i in range(constant("SCORES", 64)):
            row, column = accumulator(lane, i)
            half, place = divmod(i, constant("SCORES", 64) // 2)
            assert column == 32 * half + lane % 4 * 2 + place // 4 * 8 + place % 2
            assert row == lane // 4 + 8 * (i // 2 % 2)
    rows = {frozenset(accumulator(lane, i)[0] for i in range(0, 32, 4)) for lane in range(4)}
    assert len(rows) == 1, "the four lanes that share a row are neighbours: shuffles over 1 and 2 reduce it"


@pytest.mark.parametrize("dim", DIMS)
def test_every_output_element_is_stored_once(dim):
    assert "low = o[i] * inverse, high = o[i + 1] * inverse" in source()
    assert "line[i / 4 * 4] = packed(low, high)" in source() and "mean[i / 4 * 8 + 1], high)" in source()
    assert "+ lane % 4;" in source() and "for (int i = 2 * r; i < OUTPUTS; i += 4)" in source()
    stored = np.zeros((64, dim), dtype=int)
    for warp in range(4):
        for lane in range(32):
            for r in range(2):
                row = warp * 16 + lane // 4 + 8 * r
                for i in range(2 * r, constant("OUTPUTS", dim), 4):
                    for half in range(2):
                        column = (i // 4 * 4 + lane % 4) * 2 + half
                        assert (row, column) == accumulator(lane, i + half, warp)
                        stored[row, column] += 1
    assert (stored == 1).all()


@every_copy
@pytest.mark.parametrize("dim", DIMS)
def test_matrix_loads_of_q_give_the_fragments_of_the_first_product(dim, copied_block):
    memory, base, block = copied_block(dim)
    panel, row_bytes, steps = (constant(name, dim) for name in ("PANEL_BYTES", "ROW_BYTES", "STEPS_PER_PANEL"))
    for warp in range(4):
        for step in range(dim // 16):
            address = [base + step // steps * panel + (row := warp * 16 + lane % 16) * row_bytes
                       + ((step % steps * 2 + lane // 16) ^ row % 8) * 16 for lane in range(32)]
            for lane in range(32):
                for register in range(4):                       # ldmatrix .x4: lanes 8i..8i+7 address matrix i
                    words = address[register * 8 + lane // 4] + lane % 4 * 4
                    for half in range(2):
                        row, k = operand_a(lane, register, half)
                        assert memory[words // 2 + half] == block[warp * 16 + row, 16 * step + k]


def test_the_source_needs_no_header_and_bounds_every_wait():
    assert "#include" not in source()
    assert source().count("barrier_try_wait(") == 3, "its definition and the two bounded loops"
    assert re.search(r"tries < WAIT_TRIES.*?clock_turns\(\) - start < WAIT_TURNS\);\s+stop_kernel", source(), re.DOTALL)
    assert constant("WAIT_TRIES", 64) * constant("WAIT_NANOSECONDS", 64) < 1e9
    assert 8e9 < (constant("WAIT_TURNS", 64) - 1) * 2 ** 32 and constant("WAIT_TURNS", 64) * 2 ** 32 < 13e9
    registers = constant("PRODUCER_REGISTERS", 64) + 2 * constant("CONSUMER_REGISTERS", 64)
    assert registers * 128 <= 65536
