"""The pack in a real, running ComfyUI server: what the page finds, and what a prompt gets."""
import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from workflow_prompt import Tiny, bypassed, shrink, to_prompt

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
PACK = "video-sparse-attention"
SMALL, H3 = Tiny(steps=5), Tiny(width=192, height=160, frames=22, steps=5, vae=(24, 4, 16))
HUNYUAN15 = Tiny(steps=5, vae=(32, 4, 16))
LTX2 = Tiny(width=192, height=160, frames=33, steps=5, text=128, vae=(128, 8, 32))
TINY = {
    "wan_t2v": ("tiny_wan_t2v", SMALL), "wan_i2v": ("tiny_wan_i2v", SMALL),
    "wan_sta_strategy": ("tiny_wan_t2v", Tiny(width=192, height=160)),
    "wan_vsa_calibrate": ("tiny_wan_t2v", Tiny(width=192, height=160)),
    "wan22_t2v": ("tiny_wan_t2v", SMALL), "wan22_i2v": ("tiny_wan_i2v", SMALL),
    "turbowan22": ("tiny_wan22_i2v_sla", SMALL),
    "fastwan": ("tiny_wan_vsa", SMALL), "turbowan": ("tiny_wan_sla", SMALL),
    "hunyuan_video15": ("tiny_hunyuan_video15", HUNYUAN15),
    "ltx2_t2v_long": ("tiny_ltxav", replace(LTX2, frames=41)),      # else the same prompt as without "long"
    "ltx2": ("tiny_ltxav", LTX2),
    "minimax_h3": ("tiny_minimax_h3", H3),
}
"""How a workflow's name starts: the tiny checkpoint that stands for its model, and what that takes."""
FINDERS = {"wan_sta_strategy_search": "wan_sta_strategy_load", "wan_vsa_calibrate": "wan_vsa_calibrated"}
"""Graphs that make a strategy, and those that use it."""
SPARSE = ("VideoSparseAttentionPatch", "SlidingTileAttentionPatch", "SparseLinearAttentionPatch",
          "VideoMixtureOfBlockAttentionPatch")


@pytest.fixture(scope="module")
def server(comfyui, tiny, tmp_path_factory):
    from comfy_server import Server
    for name, _ in TINY.values():
        with suppress(pytest.skip.Exception):      # a graph of a model that this ComfyUI lacks is skipped by itself
            folder = tiny(name).parent
    with Server(comfyui, models=folder, timeout=600, log=tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def object_info(server):
    return server.get("/object_info")[1]


@pytest.fixture
def api_graph():
    graph = json.loads((ROOT / "tests" / "small_graph.json").read_text())
    graph["2"]["inputs"]["backend"] = "reference"        # auto would leave so small a clip to dense attention
    return graph


def test_every_node_is_listed_with_a_category_a_tooltip_per_input_and_a_help_page(server, object_info):
    from pack.nodes import NODES
    for node in NODES:
        schema = node.define_schema()
        info = object_info[schema.node_id]
        assert info["python_module"] == f"custom_nodes.{PACK}" and info["description"]
        inputs = [spec for part in ("required", "optional") for spec in info["input"].get(part, {}).values()]
        assert len(inputs) == len(schema.inputs) and all(spec[1].get("tooltip") for spec in inputs), schema.node_id
        status, page = server.get(f"/extensions/{PACK}/docs/{schema.node_id}.md")
        assert status == 200 and page.startswith(f"# {schema.display_name}")


def test_help_pages_name_every_input(object_info):
    for node_id in ("VideoSparseAttentionPatch", "SlidingTileAttentionPatch", "STAStrategySearch", "SaveSTAStrategy"):
        page = (ROOT / "web" / "docs" / f"{node_id}.md").read_text()
        inputs = object_info[node_id]["input"]
        for name in {**inputs["required"], **inputs.get("optional", {})}:
            assert name in ("model", "strategy") or f"`{name}`" in page, name


def test_every_workflow_is_in_the_template_browser_with_a_thumbnail(server):
    status, templates = server.get("/workflow_templates")
    assert status == 200 and sorted(templates[PACK]) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        assert server.get(f"/api/workflow_templates/{PACK}/{path.stem}.json")[0] == 200
        status, kind, body = server.fetch(f"/api/workflow_templates/{PACK}/{path.stem}.jpg")
        assert status == 200 and body[:2] == b"\xff\xd8"


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow(request, object_info):
    """A shipped graph; skipped where this ComfyUI lacks a node of it."""
    graph = json.loads(request.param.read_text(encoding="utf-8"))
    lacking = {node["type"] for node in graph["nodes"]} - set(object_info) - {"MarkdownNote"}
    if lacking:
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(lacking))}")
    return request.param.stem, graph


def small(name, graph, object_info):
    """A shipped graph as a prompt for its tiny checkpoint."""
    checkpoint, tiny = next(made for start, made in TINY.items() if name.startswith(start))
    return shrink(to_prompt(graph, object_info), f"{checkpoint}.safetensors", tiny)


def test_every_workflow_runs_on_a_tiny_checkpoint_attends_sparsely_and_saves_its_clip(server, object_info, workflow):
    name, graph = workflow
    if name in FINDERS.values():
        finder = next(finder for finder, user in FINDERS.items() if user == name)
        search = json.loads((ROOT / "workflows" / f"{finder}.json").read_text(encoding="utf-8"))
        server.run(small(finder, search, object_info))
    outputs = server.run(small(name, graph, object_info))["outputs"]
    if name in FINDERS:
        assert any("wan2.1_1.3b_480p_" in text for node in outputs.values() for text in node["text"])
        return
    reports = [node for node in outputs.values() if "sparse_attention" in node]
    method = next((method for method in ("STA", "SLA", "VMoBA") if method.lower() in name.split("_")), "VSA")
    assert len(reports) == sum(node["type"] in SPARSE for node in graph["nodes"])
    for report in reports:
        assert report["sparse_attention"] and report["images"]
        assert all(run["sparse_calls"] > 0 and run["method"] == method for run in report["sparse_attention"])
    assert [node for node in outputs.values() if str(node.get("images", [{}])[0].get("filename")).endswith(".mp4")]


def test_every_workflow_decodes_and_saves_without_its_report_and_leaves_the_kernel_to_auto(object_info, workflow):
    name, graph = workflow
    prompt = to_prompt(graph, object_info)
    reports = {node for node, value in prompt.items() if value["class_type"] == "SparseAttentionReport"}
    used = [link[0] for value in prompt.values() for link in value["inputs"].values() if isinstance(link, list)]
    assert (reports or name in FINDERS) and not reports & set(used), "it stands beside the sampler"
    assert all(prompt[node]["inputs"]["images"] for node in reports)
    assert {value["inputs"]["backend"] for value in prompt.values() if "backend" in value["inputs"]} == {"auto"}


def test_a_bypassed_sparse_node_leaves_every_sampler_its_model_and_every_decoder_its_latent(object_info, workflow):
    _, graph = workflow
    prompt = to_prompt(bypassed(graph, *SPARSE), object_info)
    assert not [node for node in prompt.values() if node["class_type"] in SPARSE]
    for node in prompt.values():
        missing = set(object_info[node["class_type"]]["input"].get("required", {})) - set(node["inputs"])
        assert not missing, (node["class_type"], missing)


@pytest.mark.parametrize("name", ["wan_t2v_vsa", "wan22_i2v_14b_vsa"])
def test_with_the_sparse_node_bypassed_the_clip_is_sampled_dense_decoded_and_saved(server, object_info, name):
    graph = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    outputs = server.run(small(name, bypassed(graph, *SPARSE), object_info))["outputs"]
    assert any(str(node.get("images", [{}])[0].get("filename")).endswith(".mp4") for node in outputs.values())
    assert not any(node.get("sparse_attention") for node in outputs.values())


def test_the_api_graph_reports_text_numbers_and_a_picture(server, api_graph):
    outputs = server.run(api_graph)["outputs"]["7"]
    run = outputs["sparse_attention"][0]
    assert run["grid"] == [9, 15, 20] and run["tile"] == [3, 5, 4] and (run["kept"], run["tiles"]) == (9, 45)
    assert run["backend"] == "reference" and run["sparse_calls"] == 8 and run["dense_calls"] == {}
    assert "9 of 45 tiles" in outputs["text"][0]
    assert server.view(outputs["images"][0])[:4] == b"\x89PNG"


def test_auto_measures_and_where_sparse_loses_the_rest_runs_dense_with_both_times(server, api_graph):
    api_graph["2"]["inputs"].update(backend="auto", sparsity=0.1)      # keeps nearly all pairs: it can only lose
    api_graph["5"]["inputs"].update(width=192, height=160, length=17)
    api_graph["6"]["inputs"]["steps"] = 6
    outputs = server.run(api_graph)["outputs"]["7"]
    run, text = outputs["sparse_attention"][0], outputs["text"][0]
    assert run["dense_calls"]["sparse would be slower here"] + run["sparse_calls"] == 12
    assert re.search(r"sparse would be slower here: [\d.]+ ms, dense [\d.]+ ms \([\w -]+ attention\)", text)
    assert "auto: reference, " in text and "x dense per call (" in text


@pytest.mark.parametrize(("widget", "value", "message"), [
    ("sparsity", 1.5, "bigger than max"),
    ("tile_size", "5x5x5", "holds 125 tokens: wanted a multiple of 64"),
    ("start_percent", 7.0, "bigger than max"),
    ("backend", "warp", "Value not in list"),
])
def test_bad_widgets_are_refused_when_the_prompt_is_queued(server, api_graph, widget, value, message):
    api_graph["2"]["inputs"][widget] = value
    status, answer = server.get("/prompt", {"prompt": api_graph})
    assert status == 400
    (error,) = answer["node_errors"]["2"]["errors"]
    assert error["extra_info"]["input_name"] == widget and message in json.dumps(error), "one value, one red input"


@pytest.mark.parametrize(("node", "widget", "value", "message"), [
    ("SlidingTileAttentionPatch", "tile_size", "5x5x5", "holds 125 tokens: wanted a multiple of 64"),
    ("STAStrategySearch", "tile_size", "5x5x5", "holds 125 tokens: wanted a multiple of 64"),
    ("LoadSTAStrategy", "strategy_name", "gone.json", "is not in models/sta_strategies nor in output/sta_strategies"),
    ("VSAGatesAttach", "gates", "(choose the file with the gates)", "no file is chosen: choose the one that holds"),
    ("VSAGatesAttach", "gates", "gone.safetensors", "is in none of ComfyUI's folders diffusion_models and diffusers"),
])
def test_one_bad_value_reddens_one_input_of_every_node(server, api_graph, object_info, node, widget, value, message):
    """With every other widget in the prompt, as the page puts it there."""
    prompt = {name: api_graph[name] for name in ("1", "3", "4", "5")}
    links, inputs, asked = {"MODEL": ["1", 0], "CONDITIONING": ["3", 0], "LATENT": ["5", 0]}, {}, object_info[node]
    for name, (kind, *options) in {**asked["input"]["required"], **asked["input"].get("optional", {})}.items():
        if kind in links:
            inputs[name] = links[kind]
        elif kind != "STA_STRATEGY":
            inputs[name] = options[0].get("default", (options[0].get("options") or [None])[0])
    prompt["it"] = {"class_type": node, "inputs": {**inputs, widget: value}}
    savers = {"MODEL": ("ModelSave", "model"), "STA_STRATEGY": ("SaveSTAStrategy", "strategy")}
    saver, socket = savers[asked["output"][0]]
    prompt["out"] = {"class_type": saver, "inputs": {socket: ["it", 0], "filename_prefix": "x"}}
    status, answer = server.get("/prompt", {"prompt": prompt})
    assert status == 400
    (error,) = answer["node_errors"]["it"]["errors"]
    assert error["extra_info"]["input_name"] == widget and message in json.dumps(error)


@pytest.mark.parametrize(("widgets", "message"), [
    ({"start_percent": 0.8, "end_percent": 0.3}, "start_percent 0.8 is after end_percent 0.3"),
    ({"dense_blocks": "one"}, "dense_blocks: cannot read 'one'"),
])
def test_what_the_page_cannot_check_at_one_widget_is_one_error_of_the_node(server, api_graph, widgets, message):
    from comfy_server import PromptError
    api_graph["2"]["inputs"].update(widgets)
    with pytest.raises(PromptError, match=f"VideoSparseAttentionPatch.*{message}"):
        server.run(api_graph)


def test_a_legal_tile_that_the_list_does_not_name_is_accepted(server, api_graph):
    api_graph["2"]["inputs"]["tile_size"] = "4x4x12"
    assert server.run(api_graph)["outputs"]["7"]["sparse_attention"][0]["tile"] == [4, 4, 12]


def test_a_kernel_that_cannot_run_is_an_error_that_names_the_node_and_the_reason(server, api_graph):
    from comfy_server import PromptError
    api_graph["2"]["inputs"]["backend"] = "triton"
    with pytest.raises(PromptError, match=r"VideoSparseAttentionPatch\): RuntimeError: triton: your CPU cannot run it"):
        server.run(api_graph)


def test_bypassing_the_sparse_node_compares_dense_with_the_last_sparse_run(server, api_graph):
    """What the example graphs advise: the page leaves a bypassed node out of the prompt."""
    api_graph["6"]["inputs"]["seed"] = 77
    assert server.run(api_graph)["outputs"]["7"]["sparse_attention"][0]["sparse_calls"] == 8
    for node in ("6", "7"):
        api_graph[node]["inputs"]["model"] = ["1", 0]
    outputs = server.run(api_graph)["outputs"]
    assert outputs["8"]["latents"], "the run goes on behind the report"
    first, times = outputs["7"]["text"][0].splitlines()
    assert first == "DENSE run: there is no sparse attention node on this model, or it is bypassed."
    assert re.fullmatch(r"the sampler took [\d.]+ s; the last sparse run took [\d.]+ s\.", times)
    assert server.view(outputs["7"]["images"][0])[:4] == b"\x89PNG"


def test_a_sampling_from_the_cache_says_so_and_one_that_never_was_shows_no_other_run(server, api_graph):
    server.run(api_graph)
    again = server.run(api_graph)["outputs"]["7"]["text"][0]
    assert "the sampling ran in an earlier prompt: its result came from the cache" in again
    api_graph["7"]["inputs"]["latent"] = ["5", 0]
    outputs = server.run(api_graph)["outputs"]["7"]
    assert outputs["text"][0].startswith("Nothing was sampled with this model") and not outputs["sparse_attention"]


def test_a_split_over_two_devices_gives_the_latent_of_one_and_the_report_says_what_each_had(server, api_graph):
    import safetensors.torch
    from comfy.model_patcher import ModelPatcher

    def latent(outputs):
        return safetensors.torch.load(server.view(outputs["8"]["latents"][0]))["latent_tensor"]

    if not hasattr(ModelPatcher, "deepclone_multigpu"):
        pytest.skip("this ComfyUI cannot load a model on a second card")
    api_graph["5"]["inputs"].update(width=192, height=160, length=17)
    alone = latent(server.run(api_graph)["outputs"])
    api_graph["split"] = {"class_type": "MultiGPUSequenceSplit", "inputs": {
        "model": ["2", 0], "devices": "cpu, cpu:0", "exchange": "auto", "check": True}}
    api_graph["6"]["inputs"]["model"] = api_graph["7"]["inputs"]["model"] = ["split", 0]
    outputs = server.run(api_graph)["outputs"]
    assert (latent(outputs) - alone).norm() <= 1e-5 * alone.norm()
    assert "split over 2 cards: cpu 300 tokens and 1 head, cpu:0 300 tokens and 1 head" in outputs["7"]["text"][0]
    assert outputs["7"]["sparse_attention"][0]["sparse_calls"] == 8


def test_the_report_takes_the_decoded_clip(server, api_graph):
    size = {"width": 320, "height": 240, "batch_size": 33}
    api_graph["9"] = {"class_type": "EmptyImage", "inputs": {**size, "color": 255}}
    api_graph["7"]["inputs"]["images"] = ["9", 0]
    assert server.view(server.run(api_graph)["outputs"]["7"]["images"][0])[:4] == b"\x89PNG"


def test_the_graph_runs_again_after_a_failed_one_and_gives_the_same_latent(server, api_graph):
    from comfy_server import PromptError

    def latent():
        return server.view(server.run(api_graph)["outputs"]["8"]["latents"][0])
    first = latent()
    api_graph["6"]["inputs"]["seed"] = 2
    api_graph["2"]["inputs"]["backend"] = "triton"
    with pytest.raises(PromptError):
        server.run(api_graph)
    api_graph["6"]["inputs"]["seed"] = 1
    api_graph["2"]["inputs"]["backend"] = "reference"
    assert latent()[-4096:] == first[-4096:]


def test_a_strategy_is_searched_saved_listed_loaded_and_run_in_the_server(server, api_graph):
    graph = {node: api_graph[node] for node in ("1", "3", "4", "5")}
    graph["5"]["inputs"].update(width=192, height=160, length=33)
    sampling = {"positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0], "seed": 1, "cfg": 1.0,
                "sampler_name": "euler", "scheduler": "simple"}
    graph["search"] = {"class_type": "STAStrategySearch", "inputs": {
        "model": ["1", 0], **sampling, "steps": 2, "measured_steps": 1, "goal": "density of the whole",
        "max_error": 0.1, "max_density": 0.5, "candidates": "auto", "tile_size": "4x4x4", "backend": "auto"}}
    graph["save"] = {"class_type": "SaveSTAStrategy", "inputs": {
        "strategy": ["search", 0], "filename_prefix": "searched", "grid_tiles": ""}}
    outputs = server.run(graph)["outputs"]
    assert "density" in outputs["search"]["text"][0] and outputs["search"]["images"]
    name = outputs["save"]["text"][0].split()[1].rstrip(":")
    listed = server.get("/object_info/LoadSTAStrategy")[1]["LoadSTAStrategy"]["input"]["required"]["strategy_name"]
    assert name in json.dumps(listed)
    graph = {node: graph[node] for node in ("1", "3", "4", "5")}
    graph["load"] = {"class_type": "LoadSTAStrategy", "inputs": {"strategy_name": name, "grid_tiles": ""}}
    graph["sta"] = {"class_type": "SlidingTileAttentionPatch", "inputs": {
        "model": ["1", 0], "strategy": ["load", 0], "window": "1x1x1", "tile_size": "4x4x4", "backend": "auto",
        "start_percent": 0.0, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 0, "strict": True,
        "verbose": False}}
    graph["sample"] = {"class_type": "KSampler", "inputs": {
        "model": ["sta", 0], **sampling, "steps": 2, "denoise": 1.0}}
    graph["report"] = {"class_type": "SparseAttentionReport", "inputs": {
        "latent": ["sample", 0], "model": ["sta", 0]}}
    run = server.run(graph)["outputs"]["report"]["sparse_attention"][0]
    assert run["method"] == "STA" and run["sparse_calls"] > 0 and run["density"] <= 0.5


@pytest.mark.parametrize("least", [False, True], ids=["as it was stored", "with required inputs only"])
def test_prompts_that_an_earlier_version_stored_run(server, object_info, least):
    """In the order of this list: the second saves the strategy that the third loads."""
    names = ("vsa_gates", "sta_search", "sta_strategy", "compare_clips", "sla", "vmoba")
    stored = [ROOT / "tests" / "prompts" / f"0_1_0_{name}.json" for name in names]
    assert set(stored) == set((ROOT / "tests" / "prompts").glob("*.json"))
    for path in stored:
        prompt = json.loads(path.read_text())
        for node in prompt.values():
            if least and object_info[node["class_type"]]["python_module"].endswith(PACK):
                required = object_info[node["class_type"]]["input"]["required"]
                node["inputs"] = {name: value for name, value in node["inputs"].items()
                                  if name in required or isinstance(value, list)}
        for output in server.run(prompt)["outputs"].values():
            for run in output.get("sparse_attention", ()):
                assert run["dense_calls"] if least else run["sparse_calls"], path.name


def test_a_gated_model_is_saved_with_its_gates_and_listed(server):
    from pack.checkpoints.describe import describe
    from pack.checkpoints.plan import plan_of
    from pack.checkpoints.source import open_checkpoint
    server.run({
        "1": {"class_type": "SparseDiffusionModelLoader", "inputs": {"model_name": "tiny_wan_vsa.safetensors"}},
        "2": {"class_type": "VideoSparseAttentionPatch", "inputs": {
            "model": ["1", 0], "sparsity": 0.8, "tile_size": "auto", "backend": "auto", "start_percent": 0.0}},
        "3": {"class_type": "ModelSave", "inputs": {"model": ["2", 0], "filename_prefix": "diffusion_models/gated"}}})
    saved = server.base / "output" / "diffusion_models" / "gated_00001_.safetensors"
    assert "VSA gates in 2 of 2 layers" in describe(plan_of(open_checkpoint(saved)))
    listed = server.get("/object_info/SparseDiffusionModelLoader")[1]["SparseDiffusionModelLoader"]["input"]
    assert saved.name in json.dumps(listed["required"]["model_name"])


def test_the_manifest_is_complete_for_registry_and_manager():
    import tomllib
    manifest = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project, comfy = manifest["project"], manifest["tool"]["comfy"]
    assert project["name"] == PACK and project["version"].count(".") == 2
    assert project["license"] == {"file": "LICENSE"} and (ROOT / "LICENSE").exists()
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"].startswith(">=")
    requirements = (ROOT / "requirements.txt").read_text().splitlines()
    wanted = [line for line in requirements if line and not line.startswith("#")]
    assert not [line for line in wanted if line.startswith(("torch", "triton"))]
    assert [line.replace(" ", "").replace("'", '"') for line in wanted] == [
        line.replace(" ", "").replace("'", '"') for line in project["dependencies"]]
