"""The same work spread over the steps by noise."""
import pytest

from pack.vsa_core.grading import LEAST, POWER, graded_shares

NOISE = [1.0, 0.95, 0.9, 0.83, 0.75, 0.64, 0.5, 0.3]


@pytest.mark.parametrize("work", [0.06, 0.2, 0.36, 0.8, 1.0])
def test_the_work_is_as_much_as_was_asked_for_and_falls_with_the_noise(work):
    shares = graded_shares(NOISE, work)
    assert sum(shares) / len(shares) == pytest.approx(work, rel=1e-9)
    assert shares == sorted(shares, reverse=True) and LEAST <= min(shares) and max(shares) <= 1.0


def test_between_the_bounds_shares_go_with_a_power_of_the_noise():
    shares = graded_shares(NOISE, 0.2)
    free = [(share, noise) for share, noise in zip(shares, NOISE, strict=True) if LEAST < share < 1.0]
    assert len(free) >= 5
    for share, noise in free:
        assert share / free[0][0] == pytest.approx((noise / free[0][1]) ** POWER)


def test_no_step_keeps_less_than_the_least_even_without_noise():
    assert graded_shares([1.0, 0.0], 0.01) == pytest.approx([LEAST, LEAST])
    assert graded_shares([0.0, 0.0], 0.5) == pytest.approx([LEAST, LEAST])


@pytest.mark.parametrize(("noise", "work", "message"), [
    (NOISE, 0.0, "work 0.0: wanted above 0"), (NOISE, 1.5, "work 1.5: wanted above 0 and at most 1"),
    ([], 0.5, "a schedule of no steps")])
def test_impossible_work_is_refused(noise, work, message):
    with pytest.raises(ValueError, match=message):
        graded_shares(noise, work)
