"""How much the kernel does, as numbers: what the result cannot show, because doing more gives the same."""
from __future__ import annotations

import math

import pytest
import torch

import emulated_sm90
from pack.kernels.cuda_sm90 import loader
from pack.kernels.cuda_sm90.loader import constant
from test_cuda_sm90_emulation import LISTS, SIZES, error_of, operands

pytestmark = pytest.mark.skipif(emulated_sm90.unavailable() is not None, reason=str(emulated_sm90.unavailable()))

OWN = LISTS["own lists, so long that the rings turn"]


def counted(tensors, cuda=None, **named):
    """The machine's counters after a run whose result is the oracle's."""
    cuda = cuda or emulated_sm90.EmulatedCuda()
    assert error_of(tensors, cuda=cuda, **named) <= 4e-3
    return cuda.counted


def edited(*edits):
    text = loader.source()
    for edit in edits:
        assert text.count(edit[0]) == 1
        text = text.replace(*edit)
    return text


def steps_of(listed):
    """The blocks that one softmax sees at a time: the first alone when their number is odd, then pairs."""
    first = len(listed) % 2
    return [listed[:1]] * first + [listed[i:i + 2] for i in range(first, len(listed), 2)]


def rescales(q, k, listed, sizes, scale):
    """Warps of one query block that must rescale, summed over the steps: one of their 16 rows has risen too far."""
    peak, made = torch.full((64,), -torch.inf), 0
    for step in steps_of(listed):
        keys = [block * 64 + slot for block in step for slot in range(sizes[block])]
        top = torch.maximum(peak, (q.float() @ k[keys].float().T).amax(1)) if keys else peak
        risen = (top - peak) * scale * math.log2(math.e) > constant("LARGEST_RISE", 64)
        peak = torch.where(risen, top, peak)
        made += risen.view(4, 16).any(1).sum().item()
    return made


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
def test_copies_products_masks_and_clears_are_as_many_as_the_lists_ask_for(lists, dim):
    got = counted(operands(lists, dim))
    shared = len(lists) == 2 and lists[0] == lists[1]
    rings = lists[:1] if shared else [listed for listed in lists if listed]
    hidden = [64 - SIZES[block] for listed in lists for block in listed]
    steps = sum(len(steps_of(listed)) for listed in lists)
    warps, threads = 4, 128
    assert got["copies"] == sum(2 * len(listed) for listed in rings) + sum(1 for listed in lists if listed)
    assert got["bytes"] == got["copies"] * constant("SLOT_BYTES", dim)
    assert got["products"] == warps * (dim // 16 + 4) * sum(map(len, lists))
    assert got["clears"] == sum(hidden) * 128 // 16 * constant("PANELS", dim)
    assert got["votes"] == warps * steps
    asked = constant("CONSUMERS", dim) * threads * 2 + threads * 2 * steps       # the first peaks, and whether one is
    assert got["absent"] == asked + 64 * sum(hidden)


@pytest.mark.parametrize("lists", LISTS.values(), ids=LISTS)
def test_a_warp_rescales_only_when_a_row_rises_far_above_its_peak(lists):
    q, k, v, *rest = operands(lists)
    q *= 6
    got = counted((q, k, v, *rest))["rescales"]
    wanted = [rescales(q[0, i * 64:i * 64 + 64, 0], k[0, :, 0], listed, SIZES, 0.125) for i, listed in enumerate(lists)]
    assert got == sum(wanted)


@pytest.mark.parametrize(("levels", "wanted"), [
    ([3, 3, 3, 3, 3, 3], 4), ([1, 2, 3, 4, 5, 6], 4), ([-20, -20, 0, 0, 0, 0], 8), ([-40, -20, -20, -20, 0, 0], 8),
    ([0, 0, 0, 0, -90, -90], 4)], ids=["equal", "slowly rising", "one jump", "a jump within the first pair", "falling"])
def test_the_first_step_rescales_and_later_ones_only_after_a_jump(levels, wanted):
    """Every score of a block is its level in the base-2 exponent; the four warps of the only consumer count."""
    q, k, v, *rest = operands([tuple(range(6))], sizes=(64,) * 6)
    q.zero_(), k.zero_()
    q[..., 0] = 1
    k[..., 0] = torch.tensor(levels).repeat_interleave(64)[None, :, None] / (0.125 * math.log2(math.e))
    assert counted((q, k, v, *rest))["rescales"] == wanted


def test_queries_that_are_nan_make_no_warp_rescale():
    """Behind a box of 60 queries lies what was in shared memory before."""
    q, k, v, *rest = operands([tuple(range(6))], sizes=(64,) * 6)
    q[:], q[:, 60:] = 0, torch.nan
    cuda = emulated_sm90.EmulatedCuda()
    out, _ = emulated_sm90.run(q, k, v, *rest, 0.125, True, cuda=cuda)
    assert cuda.counted["rescales"] == 4 and cuda.counted["votes"] == 12
    assert not out[:, :60].isnan().any() and out[:, 60:].isnan().all()


def test_a_decay_that_is_only_nearly_1_shows_in_the_count():
    """As a difference of rounded products has it, whose result is right all the same."""
    exact = "top == peak[r] ? 1.0f : exp2_of((peak[r] - top) * scale)"
    nearly = edited((exact, "exp2_of(multiply_add(peak[r], scale, -shift[r]))"))
    tensors = operands(OWN)
    assert counted(tensors)["rescales"] == 4 * len(OWN) < counted(tensors, source=nearly)["rescales"]


FEW_TRIES = ("tries < WAIT_TRIES", "tries < 2")
HUNG = ("expect(barrier, SLOT_BYTES)", "expect(barrier, 2 * SLOT_BYTES)")


@pytest.mark.parametrize(("source", "clock_step"), [(edited(FEW_TRIES), 0), (edited(), 1000)],
                         ids=["tries pass fast", "time passes between two tries"])
def test_a_wait_is_not_given_up_for_its_tries_or_its_time_alone(source, clock_step):
    usual = counted(operands(OWN))["tries"]
    cuda = emulated_sm90.EmulatedCuda(heeds_hints=False, clock_step=clock_step)
    assert counted(operands(OWN), cuda, source=source)["tries"] > 2 * usual


@pytest.mark.parametrize(("source", "clock_step", "end"), [
    (edited(HUNG, FEW_TRIES), 1, "a wait reached its bound"), (edited(HUNG, FEW_TRIES), 0, "deadlock"),
    (edited(HUNG), 1000, "deadlock")], ids=["tries and time", "tries alone", "time alone"])
def test_a_wait_that_never_ends_is_given_up_after_its_tries_and_its_time(source, clock_step, end):
    cuda = emulated_sm90.EmulatedCuda(heeds_hints=False, clock_step=clock_step)
    with pytest.raises(RuntimeError, match=end):
        emulated_sm90.run(*operands(OWN), 0.125, True, cuda=cuda, source=source)
