"""The pack beside the neighbours that are used most: before them and behind them, the result is the same."""
import pytest
import torch

from neighbours import NEIGHBOURS

neighbours = pytest.mark.parametrize("neighbour", NEIGHBOURS, ids=lambda neighbour: neighbour.name)


def relative_l2(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture
def drawn(draw):
    """drawn(model, neighbour) -> the sampled latent, of a size and length at which that neighbour does something."""
    return lambda model, neighbour: draw(model, neighbour.latent, steps=neighbour.steps)


@pytest.fixture(autouse=True)
def known_neighbour(neighbour, wan):
    if neighbour.name == "clones for several GPUs" and not hasattr(wan, "deepclone_multigpu"):
        pytest.skip("this ComfyUI has no work units for several GPUs")


def counts(run):
    return dict(run.layers), dict(run.dense), dict(run.other), run.steps, run.sparse_calls


@neighbours
def test_the_order_of_the_nodes_changes_nothing(wan, method, drawn, run_of, neighbour):
    sparse, before = method[1], drawn(wan, neighbour)
    first, last = neighbour.patch(sparse(wan, dense_blocks="1")), sparse(neighbour.patch(wan), dense_blocks="1")
    found = drawn(first, neighbour)
    assert torch.equal(found, drawn(last, neighbour))
    assert counts(run_of(first)) == counts(run_of(last)) and run_of(first).sparse_calls > 0
    assert any("a node behind this one" in note for note in run_of(first).said) is neighbour.named
    assert torch.equal(drawn(wan, neighbour), before)


@neighbours
def test_both_have_their_effect(wan, vsa, drawn, neighbour):
    both, sparse, alone = (drawn(model, neighbour) for model in (
        vsa(neighbour.patch(wan), 0.9, dense_blocks="1"), vsa(wan, 0.9, dense_blocks="1"), neighbour.patch(wan)))
    assert relative_l2(both, alone) > 1e-4 and torch.isfinite(both).all()
    assert (relative_l2(both, sparse) <= 1e-5) is neighbour.exact


@neighbours
def test_with_every_pair_kept_the_neighbour_gives_what_it_gives_alone(wan, vsa, drawn, neighbour):
    patched = vsa(neighbour.patch(wan), 0.0)
    if neighbour.name.startswith("core's"):     # what it takes over alone is what ours takes over now
        assert relative_l2(drawn(patched, neighbour), drawn(wan, neighbour)) <= 1e-5
    else:
        assert relative_l2(drawn(patched, neighbour), drawn(neighbour.patch(wan), neighbour)) <= 1e-5


@neighbours
def test_trained_gates_reach_their_layers_beside_the_neighbour(gated, vsa, drawn, run_of, neighbour):
    first, last = neighbour.patch(vsa(gated, 0.5)), vsa(neighbour.patch(gated), 0.5)
    assert torch.equal(drawn(first, neighbour), drawn(last, neighbour))
    for patched in (first, last):
        assert run_of(patched).gated.total() == run_of(patched).sparse_calls > 0
