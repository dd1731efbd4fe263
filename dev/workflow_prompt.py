"""A UI-format workflow as an API-format prompt, made small enough to run on a CPU with a tiny checkpoint.

    to_prompt(workflow, object_info)              what ComfyUI's page would queue
    shrink(prompt, checkpoint, width, height, frames, steps)   the same graph on a tiny model
"""
from __future__ import annotations

WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTES = {"MarkdownNote", "Note"}
DROPPED = {"VAEDecode", "CreateVideo", "SaveVideo", "VAELoader", "CLIPLoader", "DualCLIPLoader", "VAEDecodeTiled",
           "LTXAVTextEncoderLoader", "LTXVAudioVAELoader", "LTXVSeparateAVLatent", "LTXVAudioVAEDecode"}
LOADERS = {"UNETLoader": "unet_name", "SparseDiffusionModelLoader": "model_name", "CheckpointLoaderSimple": None}
"""Loader: its widget for the file. None: a loader of whole checkpoints, for which a UNETLoader stands in."""


def to_prompt(workflow, object_info):
    """{node id: {class_type, inputs}}. Raises KeyError for a node type that the server does not have, or an input where
    it matters to a sampling."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        declared = {name: spec for part in object_info[node["type"]]["input"].values() for name, spec in part.items()
                    if isinstance(spec, list)}
        values, inputs = list(node["widgets_values"]), {}
        for entry in node["inputs"]:
            if entry["name"] not in declared and node["type"] in DROPPED:       # newer than this ComfyUI: its page
                values = values[bool(entry.get("widget")):]                     # leaves the widget out
                continue
            spec = declared[entry["name"]]
            if "widget" in entry:
                value = values.pop(0)
                if (spec[1] if len(spec) > 1 else {}).get("control_after_generate"):
                    values.pop(0)
                inputs[entry["name"]] = value
            if entry.get("link") is not None:
                inputs[entry["name"]] = links[entry["link"]]
        if values:
            raise KeyError(f"{node['type']} {node['id']}: {len(values)} widget values too many")
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def shrink(prompt, checkpoint, width=96, height=80, frames=17, steps=2, min_tokens=0, text_width=64):
    """The same graph with a tiny checkpoint, random conditioning, a small clip, few steps, and nothing decoded.

    text_width: width of the text embeddings that the checkpoint takes.
    """
    small = {}
    for node_id, node in prompt.items():
        kind = node["class_type"]
        if kind in DROPPED:
            continue
        inputs = {name: value for name, value in node["inputs"].items()
                  if not (kind == "SparseAttentionReport" and name == "images")}
        if kind in LOADERS:
            if LOADERS[kind] is None:
                kind, inputs = "UNETLoader", {"weight_dtype": "default"}
            inputs[LOADERS[kind]] = checkpoint
        if kind == "CLIPTextEncode":
            kind, inputs = "DemoConditioning", {"tokens": 7, "width": text_width, "seed": int(node_id)}
        if kind == "LTXVEmptyLatentAudio":
            kind, inputs = "DemoAudioLatent", {"frames": frames}
        if "width" in inputs and "length" in inputs:
            inputs.update(width=width, height=height, length=frames)
        if "steps" in inputs:
            inputs["steps"] = steps
        if "min_tokens" in inputs:
            inputs.update(min_tokens=min_tokens, backend="auto")
        small[node_id] = {"class_type": kind, "inputs": inputs}
    return small
