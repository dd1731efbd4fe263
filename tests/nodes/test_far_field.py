"""The widget `far_field` of VSA and STA in a real ComfyUI's sampling."""
import pytest
import torch

THW = (9, 16, 24)
SPARSE = {"vsa": {"sparsity": 0.9}, "sta": {"window": "1x1x1", "tile_size": "4x4x4"}}
FULL = {"vsa": {"sparsity": 0.0}, "sta": {"window": "99x99x99"}}


@pytest.fixture(params=["vsa", "sta"])
def node(request):
    patch = request.getfixturevalue(request.param)
    return lambda model, settings=SPARSE, **widgets: patch(
        model, backend="reference", min_tokens=0, start_percent=0.0, **settings[request.param], **widgets)


def relative_l2(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def test_a_prompt_from_before_samples_as_before_and_auto_turns_it_on(wan, node, draw, run_of):
    before, off, auto = node(wan), node(wan, far_field="off"), node(wan, far_field="auto")
    latents = [draw(model, THW) for model in (before, off, auto)]
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])
    assert [run_of(model).summary()[0]["far_field"] for model in (before, off, auto)] == [False, False, True]


def test_it_brings_the_result_closer_to_dense(wan, node, draw):
    dense = draw(wan, THW)
    off, on = (relative_l2(draw(node(wan, far_field=choice), THW), dense) for choice in ("off", "on"))
    assert on < 0.9 * off


def test_it_has_nothing_to_do_where_everything_is_looked_at(wan, node, draw):
    assert torch.equal(draw(node(wan, FULL, far_field="on"), THW), draw(node(wan, FULL, far_field="off"), THW))


def test_the_report_says_what_becomes_of_the_rest(wan, node, draw, run_of):
    from pack.nodes.hook.status import status_text
    said = []
    for choice in ("off", "on"):
        model = node(wan, far_field=choice)
        draw(model, THW)
        said.append(status_text(run_of(model)))
    assert "the others count as one averaged token each" not in said[0]
    assert "the others count as one averaged token each" in said[1]


def test_a_choice_that_is_none_is_refused_with_what_there_is(wan, node):
    with pytest.raises(ValueError, match="far_field 'maybe': wanted auto, on, off"):
        node(wan, far_field="maybe")


def test_auto_leaves_a_model_with_trained_gates_as_it_was_trained(gated, vsa, draw, run_of, monkeypatch):
    from pack.nodes.methods import video_sparse_attention
    shown = []
    monkeypatch.setattr(video_sparse_attention, "show_under_node", lambda text, node: shown.append(text))
    settings = dict(backend="reference", min_tokens=0, start_percent=0.0)
    models = [vsa(gated, 0.5, far_field=choice, **settings) for choice in ("off", "auto", "on")]
    latents = [draw(model, THW) for model in models]
    assert torch.equal(latents[0], latents[1]) and not torch.equal(latents[0], latents[2])
    assert "far_field is on, but this model was trained without it" in shown[-1]
    assert not any("far_field" in text for text in shown[:-1])
