"""What is calibrated on one clip, told for another by that one's own measurements."""
import pytest
import torch

from pack.quality.transfer import become, chosen
from pack.vsa_core.budget_search import BudgetTable, Trial
from pack.vsa_core.grid import TokenGrid

SHARES, HEADS = (0.25, 0.5), 2


def table(errors, lost):
    """Two steps of one layer, in which every share moves a head by so much and loses so much of its attention."""
    made = BudgetTable(SHARES, TokenGrid((4, 8, 8)), (4, 4, 4), 4, True, 2, 1, HEADS)
    for step in range(2):
        trial = Trial(torch.tensor(errors).double().square()[:, None].expand(2, HEADS), torch.ones(HEADS).double(),
                      1 - torch.tensor(lost).double()[:, None].expand(2, HEADS), [1.0, 2.0])
        made.add_trial(step, 0, trial, 4.0, 1.0)
    return made


@pytest.mark.parametrize(("goal", "bound", "place"), [
    ("work", 0.3, 0), ("work", 0.6, 1), ("error", 0.5, 0), ("error", 0.25, 1), ("error", 0.1, 2),
    ("attention", 0.6, 0), ("attention", 0.8, 1), ("attention", 0.95, 2)])
def test_the_cheapest_share_that_meets_the_goal_is_chosen_and_told_for_another_clip(goal, bound, place):
    here, there = table((0.4, 0.2), (0.3, 0.1)), table((0.5, 0.3), (0.4, 0.15))
    choice = chosen(here, goal, bound)
    assert (choice == place).all()
    work, error, lost, held = become(there, choice, goal, bound)
    assert work == pytest.approx((0.25, 0.5, 1.0)[place])
    assert (error, lost) == pytest.approx(((0.5, 0.3, 0.0)[place], (0.4, 0.15, 0.0)[place]))
    allowed = {"error": bound, "attention": 1 - bound}.get(goal)
    if allowed is None:
        assert held == ""
    else:
        assert held == f"{float((error if goal == 'error' else lost) <= 1.1 * allowed):.1%}"
    if (goal, bound) == ("error", 0.25):
        assert held == "0.0%", "the other clip's heads move further than is allowed by more than a tenth"
