"""The widget preset: what it sets, what it leaves, what it says, and that help and README have the same table."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SIZE = (5, 8, 12)
NAMED = ("safe", "balanced", "fast")


def said_by(model):
    from pack.nodes.hook.hook import SparseAttentionHook
    return SparseAttentionHook.of(model)[-1].settings.said


def settings_of(model):
    from pack.nodes.hook.hook import SparseAttentionHook
    hook = SparseAttentionHook.of(model)[-1]
    return hook.method, hook.settings


@pytest.fixture
def node(comfyui):
    """node(model, **widgets) -> what the VSA node returns, with the widgets of a new node on the page."""
    from pack.nodes.methods.video_sparse_attention import VideoSparseAttentionPatch
    return lambda model, sparsity=0.8, preset="auto", **widgets: VideoSparseAttentionPatch.execute(
        model, sparsity, preset=preset, **{"min_tokens": 0, "backend": "reference", **widgets})[0]


@pytest.fixture
def sta_node(comfyui):
    from pack.nodes.methods.sliding_tile_attention import DEFAULT_WINDOW, SlidingTileAttentionPatch
    return lambda model, window=DEFAULT_WINDOW, preset="auto", **widgets: SlidingTileAttentionPatch.execute(
        model, window, preset=preset, **{"min_tokens": 0, "backend": "reference", **widgets})[0]


def test_auto_leaves_the_widgets_of_a_model_that_was_not_trained_sparse(wan, node):
    method, settings = settings_of(node(wan, 0.6, start_percent=0.1))
    assert (method.sparsity, settings.schedule.start_percent, settings.said) == (0.6, 0.1, "")


@pytest.mark.parametrize("preset", NAMED)
def test_a_named_preset_sets_the_work_and_the_dense_start_and_says_so(wan, node, sta_node, preset):
    from pack.nodes.methods.presets import PRESETS
    wanted = PRESETS[preset]
    method, settings = settings_of(node(wan, preset=preset))
    assert (method.sparsity, settings.schedule.start_percent) == (wanted.sparsity, wanted.start_percent)
    assert settings.said == f"preset {preset}: sparsity {wanted.sparsity:g}, start_percent {wanted.start_percent:g}"
    from pack.vsa_core.window import parse_window
    method, settings = settings_of(sta_node(wan, preset=preset))
    assert (method.window, settings.schedule.start_percent) == (parse_window(wanted.window), wanted.start_percent)
    assert settings.said.startswith(f"preset {preset}: window {wanted.window}, ")


def test_a_widget_that_a_preset_does_not_use_is_named_with_the_cure(wan, node, sta_node):
    said = said_by(node(wan, 0.65, preset="fast", start_percent=0.4))
    assert said.endswith("; not used: sparsity 0.65, start_percent 0.4. Choose custom to use it")
    assert "not used: window 1x1x1. Choose custom" in said_by(sta_node(wan, "1x1x1", "safe"))


def test_custom_takes_every_widget_as_it_stands_and_is_what_an_older_prompt_means(wan, gated, node, comfyui):
    from pack.nodes.methods.video_sparse_attention import VideoSparseAttentionPatch
    for model in (wan, gated):
        method, settings = settings_of(node(model, 0.3, preset="custom", start_percent=0.5, dense_blocks="0"))
        assert (method.sparsity, settings.schedule.start_percent, settings.said) == (0.3, 0.5, "")
        assert settings.dense_blocks.ranges and not settings.few_steps
        older = VideoSparseAttentionPatch.execute(model, 0.3, "auto", start_percent=0.5)[0]
        method, settings = settings_of(older)
        assert (method.sparsity, settings.schedule.start_percent, settings.few_steps) == (0.3, 0.5, False)


@pytest.fixture
def trained(gated):
    """The model with gates, trained at sparsity 0.9."""
    from dataclasses import replace

    from pack.nodes.trained.gates import gates_of
    gates = gates_of(gated)
    before, gates.trained = gates.trained, replace(gates.trained, name="FastWan", sparsity=0.9)
    yield gated
    gates.trained = before


def test_auto_runs_a_trained_model_as_it_was_trained_and_says_so(trained, node, draw, run_of):
    patched = node(trained)
    method, settings = settings_of(patched)
    assert (method.sparsity, settings.schedule.start_percent) == (0.9, 0.0)
    draw(patched, SIZE, steps=4)
    from pack.nodes.hook.status import node_text
    text, run = node_text(run_of(patched)), run_of(patched)
    assert "- preset auto: sparsity 0.9, start_percent 0 (FastWan was trained so)" in text.splitlines()
    assert len(run.sparse_steps) == 4 and "partly dense" not in text


def test_auto_keeps_what_the_user_set_on_a_trained_model_and_the_advice_stands(trained, node, draw, run_of):
    patched = node(trained, 0.7)
    method, settings = settings_of(patched)
    assert (method.sparsity, settings.schedule.start_percent) == (0.7, 0.0)
    draw(patched, SIZE, steps=2)
    assert any("sparsity 0.7 differs from the 0.9" in text for text in run_of(patched).warnings)


@pytest.mark.parametrize("preset", NAMED)
def test_a_trained_model_keeps_to_its_training_whatever_the_preset(trained, node, preset):
    patched = node(trained, 0.7, preset, start_percent=0.3)
    method, settings = settings_of(patched)
    assert (method.sparsity, settings.schedule.start_percent) == (0.9, 0.0)
    assert settings.said.startswith(f"preset {preset}: sparsity 0.9, start_percent 0, ")
    assert "(FastWan was trained so); not used: " in settings.said


@pytest.mark.parametrize(("preset", "start", "steps", "dense"), [
    ("auto", 0.2, 8, {0}), ("auto", 0.2, 4, {0}), ("custom", 0.2, 8, {0, 1}), ("auto", 0.2, 10, {0, 1}),
    ("auto", 0.5, 8, {0, 1, 2, 3}),             # the user's own: auto leaves it
    ("safe", 0.2, 6, {0}), ("safe", 0.2, 10, {0, 1, 2}), ("auto", 0.0, 6, set()), ("auto", 0.2, 1, {0})])
def test_a_short_schedule_has_at_most_one_dense_step_at_its_start(wan, node, draw, run_of, preset, start, steps, dense):
    patched = node(wan, preset=preset, start_percent=start)
    patched = shifted(patched, 1.0)
    draw(patched, SIZE, steps=steps, cfg=1.0)
    run = run_of(patched)
    assert run.seen_steps - run.sparse_steps == dense
    assert ("only the first is dense" in " ".join(run.notes)) == (preset != "custom" and steps <= 8 and dense == {0}
                                                                  and steps > 4)


def shifted(model, shift):
    """With a sampling shift of 1, start_percent is the same share of the steps."""
    import nodes
    if "ModelSamplingSD3" not in nodes.NODE_CLASS_MAPPINGS:
        from comfy_extras.nodes_model_advanced import ModelSamplingSD3
        return ModelSamplingSD3().patch(model, shift)[0]
    return nodes.NODE_CLASS_MAPPINGS["ModelSamplingSD3"]().patch(model, shift)[0]


def test_a_preset_that_is_none_is_refused(wan, node):
    with pytest.raises(ValueError, match="preset 'best': wanted auto, safe, balanced, fast, custom"):
        node(wan, preset="best")


def test_a_strategy_keeps_its_windows(comfyui):
    from pack.nodes.methods.presets import PRESETS
    from pack.nodes.methods.sliding_tile_attention import DEFAULT_WINDOW, preset_of
    window, settings = preset_of("fast", DEFAULT_WINDOW, {}, planned=True)
    assert window == DEFAULT_WINDOW and settings["start_percent"] == PRESETS["fast"].start_percent


def test_readme_and_help_have_the_table_of_the_code(comfyui):
    from pack.nodes.methods.presets import PRESETS
    rows = {}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        found = re.match(r"\|[^|]*\| `(\w+)` \| ([\d.]+) \| ([\dx.]+) \| ([\d.]+) \|$", line)
        if found:
            rows[found[1]] = (float(found[2]), found[3], float(found[4]))
    assert rows == {name: tuple(preset) for name, preset in PRESETS.items()}
    for page, column in (("VideoSparseAttentionPatch", 0), ("SlidingTileAttentionPatch", 1)):
        text = (ROOT / "web" / "docs" / f"{page}.md").read_text(encoding="utf-8")
        for name, preset in PRESETS.items():
            value = preset[column] if column else f"{preset.sparsity:g}"
            assert f"| `{name}` | {value} | {preset.start_percent:g} |" in text
