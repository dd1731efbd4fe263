"""What the example graphs say: files and where they come from, sizes that run sparse, notes that match."""
import json
import re
from pathlib import Path

import pytest

from graphs import GRAPHS
from graphs.files import URLS, tree
from graphs.page import Output, Page

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted((ROOT / "workflows").glob("*.json"))
FOLDERS = {"diffusion_models", "text_encoders", "vae", "clip_vision", "checkpoints", "loras"}
WITHOUT_ADDRESS = {"FastWan2.1-T2V-1.3B-Diffusers", "TurboWan2.1-T2V-1.3B-Diffusers", "FastWan2.1-T2V-1.3B.safetensors",
                   "TurboWan2.2-I2V-A14B-high-720P.safetensors", "TurboWan2.2-I2V-A14B-low-720P.safetensors",
                   "wan2.1_1.3b_480p_00001_.json", "wan2.1_1.3b_480p_vsa_00001_.json"}
"""Folders, a file that the user makes of it, and one that another graph makes."""
CELLS = {"EmptyHunyuanLatentVideo": (4, 16), "WanImageToVideo": (4, 16), "EmptyHunyuanVideo15Latent": (4, 16),
         "HunyuanVideo15ImageToVideo": (4, 16), "EmptyLTXVLatentVideo": (8, 32)}
"""Frames and pixels along a side that are one token."""


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def graph(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def widgets(node):
    """{widget: value}, what the page adds to seeds and images left out."""
    values, found = list(node["widgets_values"]), {}
    for entry in node["inputs"]:
        if "widget" in entry:
            found[entry["name"]] = values.pop(0)
            if values and values[0] in ("fixed", "image"):
                values.pop(0)
    return found


def named_files(graph):
    """(node, file) for every widget that names one."""
    return [(node, value) for node in graph["nodes"] if node["type"] != "MarkdownNote"
            for name, value in widgets(node).items()
            if re.search(r"\.(safetensors|json)$", str(value)) or name in ("model_name", "gates")]


def notes(graph):
    return "\n".join(node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "MarkdownNote")


def tokens(graph):
    """Tokens of the clip, counted from its size."""
    for node in graph["nodes"]:
        size = widgets(node)
        if node["type"] in CELLS:
            frames, pixels = CELLS[node["type"]]
            return ((size["length"] - 1) // frames + 1) * (size["height"] // pixels) * (size["width"] // pixels)
        if node["type"] == "MiniMaxH3ImageToVideo":
            return ((size["length"] - 5) // 17 * 5 + 2) * (size["height"] // 32) * (size["width"] // 32)
    raise AssertionError("no node has the clip's size")


def test_every_file_is_offered_for_download_or_the_note_says_how_to_get_it(graph):
    text = notes(graph)
    for node, name in named_files(graph):
        models = {model["name"]: model for model in node["properties"].get("models", ())}
        assert name in text, name
        if name in WITHOUT_ADDRESS:
            assert name not in models
            continue
        assert models[name]["url"].endswith(f"/{name}") and models[name]["directory"] in FOLDERS
        assert f"[{name}]({models[name]['url']})" in text


def test_no_node_offers_a_file_that_it_does_not_load(graph):
    loaded = {(node["id"], name) for node, name in named_files(graph)}
    offered = {(node["id"], model["name"]) for node in graph["nodes"] for model in node["properties"].get("models", ())}
    assert offered <= loaded


def test_every_address_is_a_file_of_a_publisher_that_comfyuis_own_templates_name():
    assert len(set(URLS.values())) == len(URLS)
    for name, url in URLS.items():
        assert re.fullmatch(r"https://huggingface\.co/(Comfy-Org|Lightricks)/[\w.-]+/resolve/main/[\w./-]+", url), url
        assert url.endswith(f"/{name}")


def test_the_folder_tree_of_the_note_has_every_file_once(graph):
    drawn = re.search(r"```\n(.*?)\n```", notes(graph), re.DOTALL).group(1)
    assert sorted(re.findall(r"── (?!📂)(.+)", drawn)) == sorted({name for _, name in named_files(graph)})


def test_a_tree_is_drawn_with_a_branch_per_file():
    assert tree([("a", "vae"), ("b", "loras"), ("c", "loras")]).splitlines()[2:] == [
        "    ├── 📂 vae/", "    │   └── a", "    └── 📂 loras/", "        ├── b", "        └── c"]


def test_every_clip_has_more_tokens_than_min_tokens_and_the_note_names_how_many(graph):
    for node in graph["nodes"]:
        if "min_tokens" in widgets(node):
            assert tokens(graph) > widgets(node)["min_tokens"] >= 12288
            assert f"{tokens(graph):,} tokens" in notes(graph)


def test_every_graph_explains_itself_and_says_nothing_of_speed_in_numbers(graph):
    text = notes(graph)
    assert "**" in text and len(text) > 400
    assert not re.search(r"\d\s*(x|times|%) (as fast|faster|quicker)|\bminutes\b", text)


def drawn(name, graph):
    """The page that the description draws, with definitions as the stored graph has them."""
    stored = {node["type"]: node for node in graph["nodes"]}

    def definition(kind):
        node = stored[kind]
        more = {"control_after_generate": "fixed" in node["widgets_values"], "image_upload": kind == "LoadImage"}
        seeds = [entry["name"] for entry in node["inputs"] if entry["name"] in ("seed", "noise_seed", "image")]
        return ([(entry["name"], (entry["type"], {"widget": "widget" in entry, **(
            more if entry["name"] in seeds else {})})) for entry in node["inputs"]],
                [(entry["name"], entry["type"]) for entry in node["outputs"]])
    page = Page(definition, lambda spec: spec[1]["widget"])
    GRAPHS[name](page)
    return page


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_stored_graph_is_what_its_description_draws(path):
    graph = json.loads(path.read_text(encoding="utf-8"))
    page = drawn(path.stem, graph)
    assert [(node.kind, node.title, list(node.pos), list(node.size)) for node in page.nodes] == [
        (node["type"], node.get("title"), node["pos"], node["size"]) for node in graph["nodes"]]
    links = {(link[3], graph["nodes"][link[3] - 1]["inputs"][link[4]]["name"]): tuple(link[1:3])
             for link in graph["links"]}
    for node, stored in zip(page.nodes, graph["nodes"], strict=True):
        linked = {name: value for name, value in node.inputs.items() if isinstance(value, Output)}
        assert {name: (value.node.id, value.slot) for name, value in linked.items()} == {
            name: source for (target, name), source in links.items() if target == node.id}
        if node.kind == "MarkdownNote":
            assert stored["widgets_values"] == [node.inputs["text"]]
        else:
            assert {**widgets(stored), **{k: v for k, v in node.inputs.items() if k not in linked}} == widgets(stored)
    assert [box.title for box in page.boxes] == [group["title"] for group in graph["groups"]]


@pytest.mark.parametrize(("name", "largest"), [("turbowan_t2v_sla_4step", 80), ("turbowan22_i2v_sla_4step", 200)])
def test_the_sigmas_of_turbowan_are_those_it_was_distilled_at_and_change_the_model_at_0_9(name, largest):
    from pack.checkpoints.trained import rcm_sigmas
    graph = json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))
    found = {node["type"]: widgets(node) for node in graph["nodes"] if node["type"] != "MarkdownNote"}
    sigmas = [float(sigma) for sigma in found["ManualSigmas"]["sigmas"].split(",")]
    assert all(abs(x - y) <= 1e-5 for x, y in zip(sigmas, rcm_sigmas(largest), strict=True))
    assert found["KSamplerSelect"]["sampler_name"] == "lcm" and "BasicGuider" in found
    if "SplitSigmas" in found:
        step = found["SplitSigmas"]["step"]
        assert sigmas[step - 1] > 0.9 > sigmas[step]


def test_every_description_is_stored():
    assert [path.stem for path in PATHS] == sorted(GRAPHS)


def test_an_input_that_a_node_does_not_have_is_refused_when_a_graph_is_drawn():
    page = Page(lambda kind: ([("seed", ("INT", {}))], []), lambda spec: True)
    with pytest.raises(ValueError, match="KSampler has no input sead"):
        page.add("KSampler", sead=1)
