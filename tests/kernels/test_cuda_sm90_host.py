"""What the host hands to the driver is what the driver API takes; the emulated driver refuses the rest in its words."""
from __future__ import annotations

import ctypes

import pytest
import torch

import tensor_map_rules
from emulated_sm90 import EmulatedCuda
from pack.kernels.cuda_sm90.boxes import box_of, boxes_of
from pack.kernels.cuda_sm90.driver import Driver, DriverError, _aligned_map
from pack.kernels.cuda_sm90.loader import constant
from pack.kernels.cuda_sm90.tensor_map import Layout, box_layout, fits, packed_layout
from pack.kernels.tile_grid import TileGrid
from test_tile_grid import TILES

GOOD = Layout((64, 192, 2, 2, 1), (512, 128, 256, 128), (64, 64, 2, 1, 1), 256)
ADDRESS = 1 << 12


def encode(address=ADDRESS, dtype="bfloat16", layout=GOOD):
    return Driver(EmulatedCuda()).encode(address, dtype, layout)


def replaced(values, place, value):
    return (*values[:place], value, *values[place + 1:])


def test_a_map_that_the_driver_takes_is_written():
    assert any(bytes(encode())) and ctypes.addressof(encode()) % 128 == 0


@pytest.mark.parametrize(("layout", "reason"), [
    (GOOD._replace(sizes=GOOD.sizes[:2], strides=GOOD.strides[:1], box=GOOD.box[:2]), "rank 2 with 2 sizes"),
    (GOOD._replace(sizes=replaced(GOOD.sizes, 3, 0)), r"size 0 is not from 1 to 2\^32"),
    (GOOD._replace(sizes=replaced(GOOD.sizes, 1, (1 << 32) + 1)), r"size 4294967297 is not from 1 to 2\^32"),
    (GOOD._replace(strides=replaced(GOOD.strides, 2, 24)), r"stride 24 is no multiple of 16 from 16 to 2\^40"),
    (GOOD._replace(strides=replaced(GOOD.strides, 0, 0)), "stride 0 is no multiple of 16"),
    (GOOD._replace(strides=replaced(GOOD.strides, 3, 1 << 40)), "stride 1099511627776 is no multiple of 16"),
    (GOOD._replace(box=replaced(GOOD.box, 1, 257)), "a box's side of 257 is not from 1 to 256"),
    (GOOD._replace(box=replaced(GOOD.box, 4, 0)), "a box's side of 0 is not from 1 to 256"),
    (GOOD._replace(box=replaced(GOOD.box, 0, 128)), "256 bytes along a box's innermost side"),
    (GOOD._replace(box=replaced(GOOD.box, 0, 60)), "120 bytes along a box's innermost side"),
])
def test_a_layout_that_the_driver_does_not_take_is_refused_with_the_rule(layout, reason):
    with pytest.raises(DriverError, match=f"cuTensorMapEncodeTiled failed: invalid argument: {reason}"):
        encode(layout=layout)


@pytest.mark.parametrize("address", [0, ADDRESS + 8])
def test_an_address_that_is_no_multiple_of_16_is_refused(address):
    with pytest.raises(DriverError, match=f"address {address:#x} is no multiple of 16"):
        encode(address)


def arguments(**changed):
    """Those of cuTensorMapEncodeTiled, each a good one unless it is changed."""
    u32 = ctypes.c_uint32 * 5
    good = dict(encoded=_aligned_map(), dtype=ctypes.c_int(9), rank=ctypes.c_uint32(5),
                address=ctypes.c_void_p(ADDRESS), sizes=(ctypes.c_uint64 * 5)(*GOOD.sizes),
                strides=(ctypes.c_uint64 * 4)(*GOOD.strides), box=u32(*GOOD.box), steps=u32(*[1] * 5),
                interleave=ctypes.c_int(0), swizzle=ctypes.c_int(3), promotion=ctypes.c_int(3),
                fill=ctypes.c_int(0))
    return good | changed


def at_64():
    room = ctypes.create_string_buffer(512)
    return (ctypes.c_char * 128).from_buffer(room, -ctypes.addressof(room) % 128 + 64)


@pytest.mark.parametrize(("changed", "reason"), [
    ({}, ""), (dict(encoded=at_64()), "which is no multiple of 128"), (dict(dtype=ctypes.c_int(7)), "data type 7"),
    (dict(strides=(ctypes.c_uint64 * 5)(*[16] * 5)), "rank 5 with 5 sizes, 5 strides"),
    (dict(swizzle=ctypes.c_int(2)), "128 bytes along a box's innermost side"),
    (dict(steps=(ctypes.c_uint32 * 5)(1, 1, 9, 1, 1)), "element stride 9"),
    (dict(interleave=ctypes.c_int(1)), "interleave 1"), (dict(promotion=ctypes.c_int(4)), "promotion 4")])
def test_the_rules_that_a_layout_cannot_break_are_there_too(changed, reason):
    refusal = tensor_map_rules.refusal(**arguments(**changed))
    assert reason in refusal and bool(refusal) == bool(reason)


@pytest.mark.parametrize(("grid", "shared", "refused"), [
    ((1, 1, 1), 232448, False), ((1 << 31, 1, 1), 0, True), ((1, 65536, 1), 0, True), ((1, 1, 65536), 0, True),
    ((0, 1, 1), 0, True), ((1, 1, 1), 232449, True)])
def test_a_launch_that_the_driver_does_not_take_is_refused(grid, shared, refused):
    values = [ctypes.c_uint(n) for n in grid], [ctypes.c_uint(n) for n in (384, 1, 1)], ctypes.c_uint(shared)
    assert bool(tensor_map_rules.launch_refusal(*values)) == refused


def test_more_threads_than_a_cta_has_are_refused():
    one = ctypes.c_uint(1)
    assert tensor_map_rules.launch_refusal([one] * 3, [ctypes.c_uint(512), ctypes.c_uint(3), one], one) == (
        "512, 3, 1 threads")


def test_a_refused_launch_says_the_rule():
    with pytest.raises(DriverError, match="cuLaunchKernel failed: invalid argument: a grid of 1, 65536, 1"):
        Driver(EmulatedCuda()).launch(None, (1, 65536, 1), constant("THREADS", 64), 0, 0, [])


def views(batch, heads, dim):
    """Tensors [B, S, H, D] as models hand them over."""
    x = torch.zeros(batch, 192, heads, dim, dtype=torch.bfloat16)
    yield from (x, x.transpose(1, 2).contiguous().transpose(1, 2), x[:, :, :1].expand(-1, -1, heads, -1), x[..., ::2])
    yield from torch.zeros(batch, 192, 3, heads, dim, dtype=torch.bfloat16).unbind(2)
    yield torch.zeros(batch, 192, heads, dim + 8, dtype=torch.bfloat16)[..., 8:]
    yield torch.zeros(batch, 192, heads, dim + 1, dtype=torch.bfloat16)[..., 1:]


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (2, 3)])
def test_whatever_the_pack_calls_readable_the_driver_takes(dim, batch, heads):
    grid, taken = TileGrid(3, 5, 5, 6, 3, 5, 4), 0
    for x in views(batch, heads, dim):
        for described in (packed_layout(x), box_layout(x, grid, box_of(grid.tile))):
            if fits(x, described) and x.shape[3] == dim:
                encode(x.data_ptr(), layout=described)
                taken += 1
    assert taken >= 2 * 6 - 2 * (heads > 1)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_a_copy_brings_the_bytes_that_its_barrier_awaits(tile, dim):
    x = torch.zeros(1, 64, 1, dim, dtype=torch.float16)
    grid = TileGrid(0, 1, 1, 1, *tile)

    def bytes_of(described):
        return 2 * torch.tensor(described.box).prod().item()

    panels, rows = constant("PANELS", dim), boxes_of(grid).rows
    assert bytes_of(packed_layout(x)) == constant("SLOT_BYTES", dim)
    assert panels * bytes_of(box_layout(x, grid, box_of(tile))) == rows * panels * constant("ROW_BYTES", dim)
    assert constant("SLOT_BYTES", dim) == constant("BLOCK", dim) * dim * 2
