"""The widget attention_mass in a real ComfyUI's sampling."""
import pytest
import torch

FACT = "attention_mass"


def relative_l2(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def numbers(run):
    return [entry[FACT] for entry in run.summary() if FACT in entry]


def test_a_target_reads_what_it_needs_and_the_node_says_how_much(wan, vsa, run_of, draw):
    from pack.nodes.hook.status import node_text
    patched = vsa(wan, 0.0, attention_mass=0.9)
    out, run = draw(patched, (7, 14, 18)), run_of(patched)
    assert 0 < relative_l2(out, draw(wan, (7, 14, 18))) < 0.05
    [known] = numbers(run)
    assert known["calls"] == run.sparse_calls == 4 and not known["bounded"]
    assert 0.9 <= known["kept"] < 1 and known["least"] < known["read"] < known["most"] < 1
    assert run.density == pytest.approx(known["read"], abs=0.2)
    assert f"attention_mass 90%: kept {known['kept']:.1%}, an estimate from tile means, reads" in node_text(run)


@pytest.mark.parametrize("sparsity", [0.5, 0.8])
def test_sparsity_bounds_what_is_read_on_average_and_the_node_says_so(wan, vsa, run_of, draw, sparsity):
    from pack.nodes.hook.status import node_text
    patched = vsa(wan, sparsity, attention_mass=0.999)
    draw(patched, (7, 14, 18))
    [known] = numbers(run_of(patched))
    assert known["bounded"] == 4 and known["kept"] < 0.999 and 0.8 * (1 - sparsity) < known["read"] <= 1 - sparsity
    said = f"in 4 of 4 attention calls 99.9% of the attention needs more tiles than the {1 - sparsity:.0%}"
    assert said in node_text(run_of(patched))


def test_0_is_off_to_the_bit(wan, vsa, run_of, draw):
    patched = vsa(wan, 0.8, attention_mass=0.0)
    assert torch.equal(draw(patched), draw(vsa(wan, 0.8)))
    assert not numbers(run_of(patched))


def test_a_target_with_sparsity_0_is_not_taken_for_dense(wan, vsa, run_of, draw):
    patched = vsa(wan, 0.0, attention_mass=0.9, backend="auto")
    draw(patched, (7, 14, 18))
    assert numbers(run_of(patched))[0]["calls"] > 0


def test_a_sampling_leaves_nothing_for_the_next_one(wan, vsa, run_of, draw):
    patched = vsa(wan, 0.5, attention_mass=0.9)
    first = draw(patched)
    assert not run_of(patched).plans
    draw(patched, (7, 14, 18))
    assert torch.equal(draw(patched), first)
    assert torch.equal(draw(vsa(wan, 0.5, attention_mass=0.9)), first)


def test_a_clip_in_a_batch_gets_what_it_gets_alone(wan, vsa, draw):
    """What the target of one clip needs is nothing to the other one."""
    patched = vsa(wan, 0.5, attention_mass=0.95)
    assert torch.equal(draw(patched, batch=1), draw(patched, batch=2)[:1]) or relative_l2(
        draw(patched, batch=1), draw(patched, batch=2)[:1]) <= 1e-5


def test_gates_go_with_a_target_and_the_node_says_that_the_model_was_trained_otherwise(gated, vsa, run_of, draw):
    from pack.nodes.hook.status import node_text
    patched = vsa(gated, 0.5, attention_mass=0.9)
    assert torch.isfinite(draw(patched)).all()
    run = run_of(patched)
    assert run.gated.total() == run.sparse_calls > 0
    assert "was trained to read the same number of tiles everywhere. Set attention_mass to 0" in node_text(run)


@pytest.mark.parametrize("mass", [-0.1, 1.0, 1.5, float("nan")])
def test_a_target_that_cannot_be_is_refused_in_a_sentence(wan, vsa, mass):
    with pytest.raises(ValueError, match=r"^attention_mass \S+: wanted 0 \(off\) to 0.999$"):
        vsa(wan, 0.5, attention_mass=mass)


def test_with_a_far_field_what_the_lists_leave_out_counts(wan, vsa, run_of, draw):
    dense = draw(wan, (7, 14, 18))
    off, on = (relative_l2(draw(vsa(wan, 0.8, attention_mass=0.99, far_field=choice), (7, 14, 18)), dense)
               for choice in ("off", "on"))
    assert 0 < on < 0.9 * off
