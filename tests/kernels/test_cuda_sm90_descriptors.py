"""Matrix descriptors that the kernel really uses, against the documented bit fields and canonical layouts.

The formulas here are written a second time, from the documents and in their terms: units of 16 bytes, nested shapes
and strides, a swizzle as a function. Sources: PTX ISA, "Matrix Descriptor" and "Canonical Layouts" of wgmma; CUTLASS
`cute/arch/mma_sm90_desc.hpp` (bit fields) and `cute/atom/mma_traits_sm90_gmma.hpp` (canonical layouts).
"""
from __future__ import annotations

import ctypes
from math import prod

import pytest

import emulated_sm90
from pack.kernels.cuda_sm90 import loader
from pack.kernels.cuda_sm90.loader import constant
from test_cuda_sm90_emulation import operands

pytestmark = pytest.mark.skipif(emulated_sm90.unavailable() is not None, reason=str(emulated_sm90.unavailable()))

BASE = 1024
"""Where the emulator's slots begin."""
SWIZZLE_128B = 1


class Bits(ctypes.LittleEndianStructure):
    _fields_ = [("start", ctypes.c_uint64, 14), ("_2", ctypes.c_uint64, 2),
                ("leading", ctypes.c_uint64, 14), ("_4", ctypes.c_uint64, 2),
                ("stride", ctypes.c_uint64, 14), ("_6", ctypes.c_uint64, 3),
                ("base_offset", ctypes.c_uint64, 3), ("_8", ctypes.c_uint64, 10),
                ("layout", ctypes.c_uint64, 2)]


def bits_of(descriptor):
    return Bits.from_buffer_copy(ctypes.c_uint64(descriptor))


def place(index, shape, stride):
    """Where a layout puts its index-th element: mode by mode, the first one fastest, nested as they are written."""
    if isinstance(shape, int):
        return index % shape * stride
    at = 0
    for mode, step in zip(shape, stride, strict=True):
        at += place(index % size(mode), mode, step)
        index //= size(mode)
    return at


def size(shape):
    return shape if isinstance(shape, int) else prod(map(size, shape))


def swizzle_343(address):
    """Swizzle<3,4,3>: three bits from bit 7 on are xored into those from bit 4 on."""
    return address ^ (address & 0b111 << 7) >> 3


def k_major(fields, keys):
    """Chunk of 16 bytes (key, half of 16 dimensions) -> byte address. Swizzle o ((8,n),2):((8,SBO),1) in 16 bytes."""
    shape, stride = ((8, keys // 8), 2), ((8, fields.stride), 1)
    return {(i % keys, i // keys): 16 * (fields.start + place(i, shape, stride)) for i in range(2 * keys)}


def mn_major(fields, columns):
    """Chunk (8 columns, key) -> byte address. Swizzle o ((8,m),(8,k)):((1,LBO),(8,SBO)) in 16 bytes."""
    chunks = columns // 8
    shape, stride = ((8, chunks // 8), (8, 2)), ((1, fields.leading), (8, fields.stride))
    return {(i % chunks, i // chunks): 16 * (fields.start + place(i, shape, stride)) for i in range(16 * chunks)}


def used(dim, source=None):
    """(descriptors of keys, of values) of a run in which the ring has turned. A broken source may end it early."""
    cuda, every = emulated_sm90.EmulatedCuda(), tuple(range(17))
    try:
        emulated_sm90.run(*operands((every, every[1:]), dim, (64,) * 17), 0.1, False, cuda=cuda, source=source)
    except RuntimeError:
        assert source is not None
    return tuple(emulated_sm90.descriptors(cuda.library, values) for values in (False, True))


def fields_are_right(dim, keys, values):
    """Every field holds what the documents ask for."""
    slots, slot_bytes = constant("SLOTS", dim), constant("SLOT_BYTES", dim)
    assert len(keys) >= (slots // 2 - 1) * dim // 16 and len(values) >= (slots // 2 - 1) * 4
    for fields in map(bits_of, keys + values):
        assert (fields.layout, fields.base_offset) == (SWIZZLE_128B, 0)
        assert not any((fields._2, fields._4, fields._6, fields._8))
        assert BASE <= 16 * fields.start < BASE + slots * slot_bytes
        assert 16 * fields.stride == 8 * 128, "from 8 rows of 128 bytes to the next 8"
    assert {16 * bits_of(descriptor).leading for descriptor in values} == {64 * 128}, "from 64 columns to the next 64"


def keys_are_read_once(dim, keys, _):
    """Every 16 bytes of a slot are read by one product of keys, as what lies there."""
    read = {}
    for descriptor in keys:
        slot = (16 * bits_of(descriptor).start - BASE) // constant("SLOT_BYTES", dim)
        for (key, half), address in k_major(bits_of(descriptor), 64).items():
            assert (address - BASE) // 128 % 64 == key, "a key is a row of 128 bytes in each panel"
            assert address // 16 % 2 == half, "16 dimensions are two chunks that lie together"
            read.setdefault(slot, []).append(swizzle_343(address))
    slots_are_covered(read, dim)


def values_are_read_once(dim, _, values):
    """The same of values: a product reads all columns of 16 keys."""
    read = {}
    for descriptor in values:
        slot = (16 * bits_of(descriptor).start - BASE) // constant("SLOT_BYTES", dim)
        for (chunk, key), address in mn_major(bits_of(descriptor), dim).items():
            panel, inside = divmod(address - BASE - slot * constant("SLOT_BYTES", dim), 64 * 128)
            assert panel == chunk // 8 and inside // 16 % 8 == chunk % 8 and inside // 128 % 16 == key
            read.setdefault(slot, []).append(swizzle_343(address))
    slots_are_covered(read, dim)


def slots_are_covered(read, dim):
    assert len(read) >= constant("SLOTS", dim) // 2
    for slot, addresses in read.items():
        begin = BASE + slot * constant("SLOT_BYTES", dim)
        assert sorted(addresses) == list(range(begin, begin + constant("SLOT_BYTES", dim), 16))


CHECKS = (fields_are_right, keys_are_read_once, values_are_read_once)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("dim", [64, 128])
def test_the_descriptors_that_the_kernel_uses_are_those_of_the_documents(dim, check):
    check(dim, *used(dim))


@pytest.mark.parametrize(("check", "found", "replacement"), [
    (fields_are_right, "high = K_STRIDE_BYTES >> 4", "high = K_STRIDE_BYTES >> 5"),
    (fields_are_right, "(V_LEADING_BYTES >> 4) << 16", "(V_LEADING_BYTES >> 5) << 16"),
    (fields_are_right, "high = V_STRIDE_BYTES >> 4 |", "high = V_STRIDE_BYTES >> 4 | 1u << 49 - 32 |"),
    (keys_are_read_once, "% STEPS_PER_PANEL * K_STEP_BYTES", "% STEPS_PER_PANEL * 16"),
    (keys_are_read_once, "step / STEPS_PER_PANEL * PANEL_BYTES >> 4", "0 * step"),
    (values_are_read_once, "step * V_STEP_BYTES", "step * V_STEP_BYTES / 2"),
    (values_are_read_once, "(V_LEADING_BYTES >> 4) << 16", "(V_LEADING_BYTES >> 3) << 16")])
def test_a_descriptor_that_is_wrong_is_noticed(check, found, replacement):
    assert loader.source().count(found) == 1
    with pytest.raises(AssertionError):
        check(128, *used(128, loader.source().replace(found, replacement)))
