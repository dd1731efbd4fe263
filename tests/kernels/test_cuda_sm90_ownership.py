"""Who may read, write and release a slot: text that breaks a rule is stopped at the rule, in any order of events."""
from __future__ import annotations

import pytest

import emulated_sm90
from pack.kernels.cuda_sm90 import loader
from test_cuda_sm90_emulation import operands

pytestmark = pytest.mark.skipif(emulated_sm90.unavailable() is not None, reason=str(emulated_sm90.unavailable()))

RELEASE = ("        Mask mask = {(unsigned)shared_read(note(oldest)), (unsigned)shared_read(note(oldest) + 4)};\n",
           "        sync_warp();\n", "        if (lane == 0) barrier_arrive(empty(oldest));\n")
PUT = ("            shared_write(ring.note(ring.slot) + 4, note.high);\n            if (place < 0) {\n",
       "                barrier_arrive_expect(barrier, SLOT_BYTES);\n")
COPY = "                copy_box(slot, maps.packed, barrier, 0, (-1 - place) * BLOCK, 0, head, batch);\n"
ONE_LANE = "        if (lane == 0) {\n            unsigned slot"
NOT_HELD = "a slot is read that this thread does not hold"
RULES = {
    "a slot is read that is not full yet": ("        wait(full(taken), phase);\n", "", NOT_HELD),
    "a note is read after its slot is released": (
        "".join(RELEASE), RELEASE[1] + RELEASE[2] + RELEASE[0], NOT_HELD),
    "lane 0 releases before its warp has read": (
        RELEASE[1] + RELEASE[2], RELEASE[2], NOT_HELD),
    "a slot is released twice": (
        RELEASE[2], RELEASE[2] * 2, "a slot is released that a lane of the warp does not hold"),
    "a slot is released while its product runs": (
        "        wgmma_wait<1>();\n        pin(s);\n", "",
        "a slot is released that a product in flight reads"),
    "a ring forgets that it has turned": ("            phase ^= 1;\n", "", "a wait for another phase than the next"),
    "a phase ends before all have read": (
        "one_for_both ? CONSUMERS * WARPS_PER_CONSUMER", "one_for_both ? WARPS_PER_CONSUMER",
        "a phase has passed without this thread|two phases have passed within one wait"),
    "the producer does not wait": (
        "        wait(ring.empty(ring.slot), ring.phase ^ 1);\n", "",
        "a slot is written before its readers have released it"),
    "two lanes load": (ONE_LANE, ONE_LANE.replace("== 0", "< 2"), "a second writer in one phase of a slot"),
    "a slot is announced before its note is written": (
        "".join(PUT), PUT[0].splitlines(True)[1] + PUT[1] + PUT[0].splitlines(True)[0],
        "a slot is announced before its note is written"),
    "a copy comes before its bytes are announced": (
        PUT[1] + COPY, COPY + PUT[1], "a copy whose bytes nobody awaits"),
    "fewer bytes are announced": ("expect(barrier, SLOT_BYTES)", "expect(barrier, SLOT_BYTES / 2)",
                                  "more bytes came than a barrier expects"),
    "a block is copied twice": (
        COPY, COPY * 2, "two copies of one phase write the same bytes"),
    "a block is copied into the next slot": (
        COPY, COPY.replace("slot,", "slot + SLOT_BYTES,"), "a copy into another slot than its barrier's"),
    "the start of the barriers is not made visible": (
        "        barrier_init_fence();\n", "", "a barrier is used before its start is visible"),
    "scores are read while their product runs": (
        "        wgmma_wait<1>();\n", "", "registers are used that a product in flight writes"),
    "weights are packed while a product reads them": (
        "        wgmma_wait<0>();\n        ring.release(lane);\n        ring.release(lane);\n        next_weights",
        "        next_weights", "registers are used that a product in flight writes"),
    "a batch of products has no fence": (
        "        pin(o);\n        wgmma_fence();\n        multiply_values<0>(o, p, ring.held(2));",
        "        multiply_values<0>(o, p, ring.held(2));", "a product without a fence before it"),
    "nobody waits for the others' clearing": (
        "    sync_threads(1 + consumer, WARPGROUP);\n", "", "values are multiplied before their padding is cleared"),
    "clearing is not made visible": (
        "    fence_async_proxy();\n    sync_threads", "    sync_threads",
        "values are multiplied before their padding is cleared"),
    "a slot is never filled": (COPY, "", "deadlock: nothing has moved"),
}
SIZES = (64, 9) + (64,) * 17
EVERY = tuple(range(len(SIZES)))
PROBLEMS = (EVERY, EVERY[:-1]), (EVERY, EVERY)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_the_emulator_stops_at_once_when(rule):
    found, replacement, message = rule
    assert loader.source().count(found) == 1
    broken = loader.source().replace(found, replacement)
    shared = "one_for_both" in found
    for seed in range(3):
        with pytest.raises(RuntimeError, match=message):
            emulated_sm90.run(*operands(PROBLEMS[shared], 64, SIZES), 0.125, True, seed=seed, source=broken)


@pytest.mark.parametrize("lists", PROBLEMS, ids=["own lists", "one list for both"])
def test_the_text_as_it_is_breaks_no_rule(lists):
    emulated_sm90.run(*operands(lists, 64, SIZES), 0.125, True, seed=5)
