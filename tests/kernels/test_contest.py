"""By the clock: sparse is kept where it wins, and nothing is decided before both sides are known."""
from __future__ import annotations

import torch

from pack.kernels import Contest, Span
from pack.kernels.contest import SAMPLES, WARM_UP, WORTH, add


class Timed:
    """A span that took so long, and that the device has passed or not."""

    def __init__(self, ms, passed=True):
        self.ms, self.passed = ms, passed

    def milliseconds(self):
        assert self.passed, "waited for the device"
        return self.ms


def contest(sparse, dense):
    found = Contest([Timed(ms) for ms in dense])
    for ms in sparse:
        add(found.sparse, Timed(ms))
    return found


def test_the_faster_side_wins_by_medians_that_leave_the_warm_up_out():
    assert contest((900, 2, 2, 50), (4, 4, 4, 4)).sparse_wins() is True
    assert contest((1, 6, 6, 6), (4, 4, 4, 4)).sparse_wins() is False
    assert contest((900, 2, 3, 4), (500, 4, 5, 6)).medians() == (3, 5)


def test_sparse_has_to_win_by_enough_to_be_worth_what_it_leaves_out():
    assert contest((9,) + (10 * WORTH,) * 3, (10,) * 4).sparse_wins() is True
    assert contest((9,) + (10 * WORTH + 0.1,) * 3, (10,) * 4).sparse_wins() is False


def test_nothing_is_decided_while_a_side_is_missing():
    for sparse, dense in (((), (4,) * 4), ((2,) * 4, ()), ((2,) * 3, (4,) * 4), ((2,) * 4, (4,) * 3)):
        assert contest(sparse, dense).sparse_wins() is None
    assert contest((2,), ()).wants_dense() and not contest((2,), (4,) * 4).wants_dense()


def test_the_device_is_never_waited_for():
    found = contest((2,) * 3, (4,) * 4)
    late = Timed(2, passed=False)
    add(found.sparse, late)
    assert found.sparse_wins() is None
    late.passed = True
    assert found.sparse_wins() is True


def test_what_is_decided_stays_and_keeps_no_span():
    found = contest((2,) * 4, (4,) * 4)
    assert found.sparse_wins() and not found.sparse and not found.dense
    add(found.sparse, Timed(100))
    assert found.sparse_wins() and not found.wants_dense()


def test_contests_share_the_dense_times_of_their_kind():
    dense = [Timed(4) for _ in range(4)]
    one, two = Contest(dense), Contest(dense)
    for ms, found in ((2, one), (8, two)):
        for _ in range(WARM_UP + SAMPLES):
            add(found.sparse, Timed(ms))
    assert one.sparse_wins() is True and two.sparse_wins() is False and len(dense) == 4


def test_giving_up_decides_nothing():
    found = contest((2,) * 4, ())
    found.given_up = True
    assert found.sparse_wins() is None and not found.wants_dense()


def test_a_span_on_a_cpu_can_be_read_when_it_has_ended_and_as_often_as_wanted():
    span = Span(torch.device("cpu"))
    assert not span.passed
    span.end()
    assert span.passed and span.milliseconds() == span.milliseconds() >= 0 and span.passed
