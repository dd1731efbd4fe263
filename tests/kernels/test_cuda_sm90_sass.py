"""The bundled machine code keeps the rules of wgmma on every path, and a listing that breaks one is noticed."""
from __future__ import annotations

import ctypes
import re

import pytest

import cubin
import sass
from compiled_once import VARIANTS
from pack.kernels.cuda_sm90 import loader
from pack.kernels.cuda_sm90.boxes import Boxes, Coarse, Start
from pack.kernels.cuda_sm90.cache import Cache
from pack.kernels.cuda_sm90.driver import MAP_ALIGNMENT, MAP_BYTES
from pack.kernels.cuda_sm90.loader import constant

pytestmark = pytest.mark.skipif(cubin.tools() is None, reason="no triton that brings nvdisasm")

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
both_dims = pytest.mark.parametrize("dim", (64, 128))
DEPBAR, FENCE = r"WARPGROUP\.DEPBAR\.LE gsb0, 0x\w", r"WARPGROUP\.ARRIVE"
REGISTER_FILE, SHARED_OF_A_CTA, RESERVED, NAMED_BARRIERS = 65536, 227 * 1024, 1024, 16
"""Of an H100's multiprocessor; CUDA keeps 1 KB of shared memory for itself, which cuobjdump counts as used."""

PARAMETERS = 0x210
"""Where they begin in the constant bank; a parameter's place is counted from there, its alignment is not."""


def bundled(dim, dtype="bfloat16"):
    return Cache(loader.BUNDLED).read(loader.key(dim, dtype))


def text_of(dim, dtype="bfloat16"):
    return cubin.disassembled(bundled(dim, dtype))


def empty_offset(dim):
    return constant("EMPTY_OFFSET", dim)


@every_variant
def test_every_path_keeps_the_rules_of_products_releases_and_registers(variant):
    listing = sass.Listing(text_of(*variant))
    assert sass.faults(listing, empty_offset(variant[0]), cubin.resources(bundled(*variant)).registers) == []
    dim = variant[0]
    assert sum(x.product is not None for x in listing.code) == 2 * (1 + 2 * 2) * dim // 32 + 4 * (1 + 2 + 2)
    assert sum(sass.releases(x, empty_offset(dim)) for x in listing.code) == 9, "q, k, v, two keys, then two and two"
    roles = sass.roles(listing)
    assert (roles["producer"].granted, roles["consumer"].granted) == (
        constant("PRODUCER_REGISTERS", dim), constant("CONSUMER_REGISTERS", dim))


@every_variant
def test_the_code_fits_the_hardware(variant):
    dim, used = variant[0], cubin.resources(bundled(*variant))
    assert (used.stack_bytes, used.local_bytes) == (0, 0)
    threads = constant("THREADS", dim)
    assert used.registers % 8 == 0 and used.registers * threads <= REGISTER_FILE
    granted = constant("PRODUCER_REGISTERS", dim) + constant("CONSUMERS", dim) * constant("CONSUMER_REGISTERS", dim)
    assert granted * constant("WARPGROUP", dim) <= used.registers * threads, "setmaxnreg moves what the launch reserved"
    assert all(constant(f"{role}_REGISTERS", dim) % 8 == 0 for role in ("PRODUCER", "CONSUMER"))
    assert used.shared_bytes <= RESERVED and constant("SHARED_BYTES", dim) <= SHARED_OF_A_CTA
    assert 1 + constant("CONSUMERS", dim) <= NAMED_BARRIERS
    assert constant("SLOT_BYTES", dim) < 1 << 20, "an mbarrier counts so many bytes"
    assert ".nv.global.init" not in cubin.sections(bundled(*variant)), "constants are no memory to load"


@every_variant
def test_the_parameters_have_the_places_and_sizes_that_the_launcher_gives_them(variant):
    structures = [(ctypes.sizeof(x), ctypes.alignment(x)) for x in (Boxes, Coarse, Start)]
    wanted = [(MAP_BYTES, MAP_ALIGNMENT)] * 6 + structures
    wanted += [(8, 8)] * 6 + [(8, 8)] * 7 + [(4, 4)] * 5 + [(4, 4)]
    address, places = PARAMETERS, []
    for bytes_, alignment in wanted:
        address = -(-address // alignment) * alignment
        places.append((address - PARAMETERS, bytes_))
        address += bytes_
    assert cubin.parameters(bundled(*variant)) == places


@both_dims
def test_the_high_half_of_every_descriptor_is_the_documented_constant(dim):
    """Bits 32-45 hold 1024 / 16, bits 62-63 the 128-byte swizzle."""
    assert re.search(r"\b(UMOV|MOV|IMAD\.MOV\.U32) U?R\d+, (RZ, RZ, )?0x40000040\b", text_of(dim))


def without(text, found):
    """`text` without the lines' instruction at `found`, a match in it."""
    start, end = text.rindex("\n", 0, found.start()), text.index("\n", found.end())
    return text[:start] + text[end:]


def places(text, pattern):
    return list(re.finditer(pattern, text))


@both_dims
def test_a_wait_that_is_left_out_is_noticed(dim):
    text = text_of(dim)
    listings = [sass.Listing(without(text, found)) for found in places(text, DEPBAR)]
    assert [bool(sass.products_in_flight(listing)) for listing in listings] == [True] * 6
    released = [bool(sass.early_releases(listing, empty_offset(dim))) for listing in listings]
    assert released == [True] * 5 + [False], "the last values are not released"


@both_dims
def test_a_wait_that_leaves_a_group_in_flight_is_noticed(dim):
    text = text_of(dim)
    for found in places(text, DEPBAR)[:5]:
        kept = int(found[0][-1]) + 1
        listing = sass.Listing(text[:found.end() - 1] + str(kept) + text[found.end():])
        assert sass.products_in_flight(listing) and sass.early_releases(listing, empty_offset(dim))


@both_dims
def test_a_fence_that_is_left_out_is_noticed(dim):
    """But for the one of the values in the loop, which orders nothing: ptxas wants it behind a branch (C7520)."""
    text = text_of(dim)
    fences = places(text, FENCE)
    noticed = [bool(sass.unfenced_products(sass.Listing(without(text, found)))) for found in fences]
    assert noticed == [True, True, True, True, False, True]
    between = text[fences[3].end():fences[4].start()]
    assert len(places(between, "gsb0 ;")) == 1 and not places(between, DEPBAR), "it is the one within the loop"


@both_dims
def test_a_group_without_an_end_is_noticed(dim):
    text = text_of(dim)
    for found in places(text, ", gsb0 ;"):
        listing = sass.Listing(text[:found.start()] + " ;" + text[found.end():])
        assert sass.products_in_flight(listing)


@both_dims
def test_a_release_before_its_wait_is_noticed(dim):
    """The first release behind every wait, moved before it."""
    text, moved = text_of(dim), 0
    arrival = rf"@!P\d SYNCS\.ARRIVE\S+ RZ, \[R\d+\+URZ\+{empty_offset(dim):#x}\], RZ ;"
    for wait in places(text, DEPBAR):
        release = re.compile(arrival).search(text, wait.end())
        following = re.compile(DEPBAR).search(text, wait.end())
        if not release or following and following.start() < release.start():
            continue
        line = text[text.rindex("\n", 0, release.start()):release.end()]
        before = text.rindex("\n", 0, wait.start())
        early = text[:before] + line + without(text, release)[before:]
        assert sass.early_releases(sass.Listing(early), empty_offset(dim))
        moved += 1
    assert moved == 5


USES = ("FADD R9, R{d}, R9 ;", "@P0 MOV R{d}, R9 ;", "MOV R{a}, R9 ;", "STG.E.64 desc[UR4][R2.64], R{pair} ;",
        "CS2R R{pair}, SRZ ;", "LDSM.16.M88.4 R{a}, [R9] ;")


@both_dims
def test_a_use_of_registers_in_flight_is_noticed(dim):
    """Behind the last product of every group. `pair`: the register before the first of the accumulators."""
    text = text_of(dim)
    products = places(text, r"HGMMA\.64x\d+x16\S* R(\d+), R(\d+), .*gsb0 ;")
    for found, use in zip(products, USES, strict=True):
        d, a = int(found[1]), int(found[2])
        line = "\n        /*0000*/                   " + use.format(d=d + 5, a=a + 3, pair=d - 1)
        assert sass.products_in_flight(sass.Listing(text[:found.end()] + line + text[found.end():]))


@both_dims
def test_a_write_between_fence_and_product_is_noticed(dim):
    text = text_of(dim)
    for found in places(text, r"HGMMA\.64x\d+x16\S* R\d+, R(\d+), .*gsb0 ;"):
        start = text.rindex("\n", 0, found.start())
        line = f"\n        /*0000*/                   MOV R{int(found[1]) + 2}, R9 ;"
        assert sass.unfenced_products(sass.Listing(text[:start] + line + text[start:]))


@both_dims
@pytest.mark.parametrize(("behind", "register", "noticed"), [
    ("USETMAXREG.DEALLOC", 40, "producer: R40 is used of 40"),
    ("USETMAXREG.TRY_ALLOC", 232, "consumer: R232 is used of 232"),
    (f".text.{loader.KERNEL}:", 168, "R168 is used before setmaxnreg, of 168")])
def test_a_register_that_a_role_does_not_have_is_noticed(dim, behind, register, noticed):
    text = text_of(dim)
    end = text.index("\n", text.index(behind))
    line = f"\n        /*0000*/                   MOV R{register}, R9 ;"
    faults = list(sass.misused_registers(sass.Listing(text[:end] + line + text[end:]), 168))
    assert any(noticed in fault for fault in faults)
