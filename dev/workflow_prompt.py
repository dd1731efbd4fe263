"""A UI-format workflow as an API-format prompt, made small enough to run on a CPU with a tiny checkpoint.

    to_prompt(workflow, object_info)                   what ComfyUI's page would queue
    bypassed(workflow, "VideoSparseAttentionPatch")    the workflow after Ctrl+B on these nodes
    shrink(prompt, checkpoint, Tiny(...))              the same graph on a tiny model
"""
from __future__ import annotations

from dataclasses import dataclass

NOTES = {"MarkdownNote", "Note"}
BYPASS = 4
LOADERS = {"UNETLoader": "unet_name", "SparseDiffusionModelLoader": "model_name", "CheckpointLoaderSimple": None}
"""Loader: its widget for the file. None: a loader of whole checkpoints, for which a UNETLoader stands in."""
LATER = {"CreateVideo", "SaveVideo"}
"""Nodes whose inputs an older ComfyUI may lack without meaning for the sampling: its page leaves them out."""
GONE = {"CLIPLoader", "DualCLIPLoader", "LTXAVTextEncoderLoader", "CLIPVisionLoader", "CLIPVisionEncode",
        "LTXVAudioVAELoader", "LTXVAudioVAEDecode", "VAEDecodeAudio"}
"""What needs text encoders, vision or audio models. Links from these go, and the tests see if one was needed."""
PASSED = {"LoraLoaderModelOnly": "model"}
"""Nodes without a tiny file of their own: what reads them reads this input of theirs."""


@dataclass(frozen=True)
class Tiny:
    """What a tiny checkpoint takes. text: width of text embeddings. vae: channels, frames and pixels per token."""

    width: int = 96
    height: int = 80
    frames: int = 17
    steps: int = 2
    min_tokens: int = 0
    text: int = 64
    vae: tuple = (16, 4, 8)


def bypassed(workflow, *kinds):
    """The workflow with the nodes of these types bypassed, as Ctrl+B does."""
    return {**workflow, "nodes": [{**node, "mode": BYPASS} if node["type"] in kinds else node
                                  for node in workflow["nodes"]]}


def source_of(link, links, nodes):
    """[node id, slot] that a link leads to, through bypassed nodes; None where it ends in nothing."""
    while link is not None:
        _, origin, slot, *_ = links[link]
        node = nodes[origin]
        if node.get("mode") != BYPASS:
            return [str(origin), slot]
        kind = node["outputs"][slot]["type"]
        link = next((entry["link"] for entry in node["inputs"] if entry["type"] == kind), None)
    return None


def to_prompt(workflow, object_info):
    """{node id: {class_type, inputs}}. Raises KeyError for a node type that the server does not have, or an input where
    it matters to a sampling."""
    links = {link[0]: link for link in workflow["links"]}
    nodes = {node["id"]: node for node in workflow["nodes"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES or node.get("mode") == BYPASS:
            continue
        declared = {name: spec for part in object_info[node["type"]]["input"].values() for name, spec in part.items()
                    if isinstance(spec, list)}
        values, inputs = list(node["widgets_values"]), {}
        for entry in node["inputs"]:
            name = entry["name"]
            if name not in declared and node["type"] in LATER:
                values = values[bool(entry.get("widget")):]
                continue
            spec = declared[name]
            if "widget" in entry:
                inputs[name] = values.pop(0)
                options = spec[1] if len(spec) > 1 else {}
                for more in ("control_after_generate", "image_upload"):
                    if options.get(more):
                        values.pop(0)
            source = source_of(entry.get("link"), links, nodes)
            if source:
                inputs[name] = source
        if values:
            raise KeyError(f"{node['type']} {node['id']}: {len(values)} widget values too many")
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def shrink(prompt, checkpoint, tiny=Tiny()):  # noqa: B008 (frozen)
    """The same graph with a tiny checkpoint, random conditioning and VAE, a small clip and few steps."""
    small = {}
    for node_id, node in prompt.items():
        kind, inputs = node["class_type"], dict(node["inputs"])
        if kind in GONE or kind in PASSED:
            continue
        kind, inputs = stand_in(kind, inputs, node_id, checkpoint, tiny)
        if "width" in inputs and "length" in inputs:
            inputs.update(width=tiny.width, height=tiny.height, length=tiny.frames)
        fewer_steps(inputs, tiny.steps)
        if "min_tokens" in inputs:
            inputs.update(min_tokens=tiny.min_tokens, backend="auto")
        small[node_id] = {"class_type": kind, "inputs": inputs}
    relink(small, prompt, tiny)
    return small


def stand_in(kind, inputs, node_id, checkpoint, tiny):
    """(node type, inputs) of what takes a node's place."""
    text = {"tokens": 7, "width": tiny.text, "seed": int(node_id)}
    if kind in LOADERS:
        widget = LOADERS[kind] or "unet_name"
        return (kind, {**inputs, widget: checkpoint}) if LOADERS[kind] else (
            "UNETLoader", {widget: checkpoint, "weight_dtype": "default"})
    if kind == "VSAGatesAttach":
        return kind, {**inputs, "gates": checkpoint}
    if kind in ("CLIPTextEncode", "MiniMaxH3ImageToVideo"):
        return "DemoConditioning", text
    if kind == "LTXVEmptyLatentAudio":
        return "DemoAudioLatent", {"frames": tiny.frames}
    if kind == "LoadImage":
        return "EmptyImage", {"width": tiny.width, "height": tiny.height, "batch_size": 1, "color": 0x405060}
    if kind == "VAELoader":
        return "DemoVAE", dict(zip(("channels", "frames", "pixels"), tiny.vae, strict=True))
    return kind, inputs


def fewer_steps(inputs, steps):
    """A schedule of `steps` steps, divided between samplers where it was; a search measures one of them."""
    if not isinstance(inputs.get("steps"), int):
        return
    for name in ("start_at_step", "end_at_step"):
        if inputs.get(name, inputs["steps"] + 1) <= inputs["steps"]:
            inputs[name] = round(inputs[name] * steps / inputs["steps"])
    if "measured_steps" in inputs:
        inputs["measured_steps"] = 1
    inputs["steps"] = steps


def relink(small, prompt, tiny):
    """Links to nodes that went, or that other nodes stand in for, in place."""
    for node in list(small.values()):
        for name, value in list(node["inputs"].items()):
            while isinstance(value, list) and prompt[value[0]]["class_type"] in PASSED:
                passed = prompt[value[0]]
                value = node["inputs"][name] = passed["inputs"][PASSED[passed["class_type"]]]
            if not isinstance(value, list):
                continue
            kind = prompt[value[0]]["class_type"]
            if kind in GONE:
                del node["inputs"][name]
            elif kind == "CheckpointLoaderSimple" and value[1] == 2:
                node["inputs"][name] = ["vae", 0]
                small["vae"] = {"class_type": "DemoVAE",
                                "inputs": dict(zip(("channels", "frames", "pixels"), tiny.vae, strict=True))}
            elif kind == "MiniMaxH3ImageToVideo" and value[1] == 1:
                node["inputs"][name] = ["latent", 0]
                small["latent"] = {"class_type": "EmptyMiniMaxH3LatentAV", "inputs": {
                    "width": tiny.width, "height": tiny.height, "length": tiny.frames}}
