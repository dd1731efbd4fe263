"""What every node's inputs promise: a tooltip each, and that a prompt or graph saved by an earlier version runs."""
import inspect
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STORED = sorted((ROOT / "tests" / "prompts").glob("*.json"))
GRAPHS = sorted((ROOT / "workflows").glob("*.json"))
WIDGETS_OF_0_1_0 = {
    "VideoSparseAttentionPatch": "sparsity tile_size backend start_percent end_percent dense_blocks min_tokens strict "
                                 "verbose",
    "SlidingTileAttentionPatch": "window tile_size backend start_percent end_percent dense_blocks min_tokens strict "
                                 "verbose",
    "SparseAttentionReport": "",
    "SparseDiffusionModelLoader": "model_name weight_dtype",
    "VSAGatesAttach": "gates strength",
    "LoadSTAStrategy": "strategy_name grid_tiles",
    "SaveSTAStrategy": "filename_prefix grid_tiles",
    "STAStrategySearch": "seed steps cfg sampler_name scheduler measured_steps goal max_error max_density candidates "
                         "tile_size backend",
    "CompareClips": "",
    "SparseLinearAttentionPatch": "ratio query_run backend start_percent end_percent dense_blocks min_tokens strict "
                                  "verbose feature_map",
    "VideoMixtureOfBlockAttentionPatch": "form select threshold backend start_percent end_percent dense_blocks "
                                         "min_tokens strict verbose temporal_chunk temporal_topk spatial_chunk "
                                         "spatial_topk st_chunk st_topk compete turns first_layer config",
}
"""The widgets of each node in the order in which saved graphs hold their values."""


@pytest.fixture(scope="module")
def nodes(comfyui):
    from pack.nodes import NODES
    return {node.define_schema().node_id: node for node in NODES}


def widgets_as_shown(node):
    """The page shows required widgets, then optional ones, and keeps their values by place."""
    from comfy_api.latest import io
    inputs = [entry for entry in node.define_schema().inputs if isinstance(entry, io.WidgetInput)]
    return [entry for wanted in (False, True) for entry in inputs if bool(entry.optional) is wanted]


def defaults_of(node):
    """The value that each input of `execute` has when a prompt leaves it out."""
    parameters = inspect.signature(node.execute).parameters.values()
    found = {parameter.name: parameter.default for parameter in parameters}
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        from pack.nodes.hook.settings import read_settings
        shared = inspect.signature(read_settings).parameters.values()
        found.update({parameter.name: parameter.default for parameter in shared})
    return found


def test_every_input_of_every_node_has_a_tooltip(nodes):
    bare = [f"{name}.{entry.id}" for name, node in nodes.items() for entry in node.define_schema().inputs
            if not (entry.tooltip or "").strip()]
    assert not bare


def test_every_input_of_every_node_is_on_its_help_page(nodes):
    for name, node in nodes.items():
        page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
        missing = [entry.id for entry in node.define_schema().inputs
                   if entry.id != "model" and f"`{entry.id}`" not in page]
        assert not missing, (name, missing)


def test_every_advanced_input_is_optional(nodes):
    assert not [f"{name}.{entry.id}" for name, node in nodes.items() for entry in node.define_schema().inputs
                if entry.advanced and not entry.optional]


AS_BEFORE = {"far_field": "off", "preset": "custom", "spread": "even"}
"""Widgets that a new node has in use: left out, as in a prompt from before they existed, they change no result."""


def test_an_optional_widget_left_out_means_its_default_or_what_was_before_it(nodes):
    seen = 0
    for name, node in nodes.items():
        as_before = AS_BEFORE if name in WIDGETS_OF_0_1_0 else {}
        for entry in widgets_as_shown(node):
            if entry.optional:
                assert defaults_of(node)[entry.id] == as_before.get(entry.id, entry.default), f"{name}.{entry.id}"
                seen += 1
    assert seen >= 16


def test_widgets_stand_where_saved_graphs_have_their_values(nodes):
    assert set(WIDGETS_OF_0_1_0) <= set(nodes)
    for name, wanted in WIDGETS_OF_0_1_0.items():
        shown = [entry.id for entry in widgets_as_shown(nodes[name])]
        assert shown[:len(wanted.split())] == wanted.split()


def test_what_was_appended_since_is_optional(nodes):
    for name, old in WIDGETS_OF_0_1_0.items():
        assert not [entry.id for entry in widgets_as_shown(nodes[name])
                    if entry.id not in old.split() and not entry.optional]


def test_the_examples_have_a_value_per_widget_in_the_order_of_the_page(nodes):
    seen = 0
    for path in GRAPHS:
        for found in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            if found["type"] in nodes:
                shown = [entry.id for entry in widgets_as_shown(nodes[found["type"]])]
                saved = [entry["name"] for entry in found["inputs"] if "widget" in entry]
                controls = sum(1 for entry in widgets_as_shown(nodes[found["type"]])[:len(saved)]
                               if getattr(entry, "control_after_generate", None))
                assert saved == shown[:len(saved)], path.name
                assert len(found["widgets_values"]) == len(saved) + controls, path.name
                seen += 1
    assert seen >= 14


def test_a_required_widget_behind_an_optional_one_would_be_noticed(nodes):
    """It would take the place, and in saved graphs the value, of the optional one."""
    from comfy_api.latest import io

    class Turned(nodes["VSAGatesAttach"]):
        @classmethod
        def define_schema(cls):
            schema = super().define_schema()
            schema.inputs.append(io.Int.Input("later", default=0))
            return schema
    assert [entry.id for entry in widgets_as_shown(Turned)] == ["gates", "later", "strength"]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_prompt_gives_every_required_input_and_none_that_is_gone(nodes, path):
    for entry in json.loads(path.read_text(encoding="utf-8")).values():
        if entry["class_type"] in nodes:
            inputs = nodes[entry["class_type"]].define_schema().inputs
            assert set(entry["inputs"]) <= {one.id for one in inputs}, entry["class_type"]
            assert {one.id for one in inputs if not one.optional} <= set(entry["inputs"]), entry["class_type"]


def test_the_stored_prompts_use_every_node_of_that_version(nodes):
    used = {entry["class_type"] for path in STORED for entry in json.loads(path.read_text("utf-8")).values()}
    assert set(WIDGETS_OF_0_1_0) <= used


def test_saved_strategies_are_counted_up_whatever_the_host_counts(comfyui, tmp_path, monkeypatch):
    """ComfyUI before 0.21 sees 00001 in name_00001_.json and not in name_00001.json."""
    import folder_paths

    from pack.nodes.strategies.strategy_files import SaveSTAStrategy
    from pack.vsa_core.strategy import Strategy
    ours, models = tmp_path / "sta_strategies", tmp_path / "models"
    (models / "sub").mkdir(parents=True)
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "sta_strategies", ([str(models), str(ours)], {".json"}))
    strategy = Strategy.of_windows([[[(1, 1, 1), (2, 2, 2)]]], (2, 2, 2))

    def saved(prefix):
        return Path(SaveSTAStrategy.execute(strategy, prefix)[0]).name
    assert [saved("kept") for _ in range(3)] == ["kept_00001_.json", "kept_00002_.json", "kept_00003_.json"]
    (models / "sub" / "other_00001_.json").write_text("would be loaded in place of ours")
    assert saved("sub/other") == "other_00002_.json"
    (ours / "kept_00004.json").write_text("from an earlier version")
    monkeypatch.setattr(folder_paths, "get_save_image_path", lambda prefix, root, *_: (root, prefix, 1, "", prefix))
    assert saved("kept") == "kept_00005_.json"
    assert (ours / "kept_00004.json").read_text() == "from an earlier version"
