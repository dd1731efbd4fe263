"""Write the example workflows (UI format) from the short graph descriptions below.

    python dev/make_workflows.py

A workflow lists its nodes with their widget values by name; this script looks the order of inputs and widgets up
in the pack's and ComfyUI's own node definitions, so a shipped workflow cannot drift from them. Needs a ComfyUI
checkout (dev/comfy_boot.py).
"""
import asyncio
import json
from pathlib import Path

import comfy_boot

ROOT = Path(__file__).resolve().parent.parent

NEGATIVE = ("bright tones, overexposed, static, blurred details, subtitles, worst quality, low quality, "
            "deformed, still picture")

# id: (node type, title or None, (x, y), (width, height), inputs); an input that is a list is a link [id, output].
WAN_T2V_VSA = {
    1: ("UNETLoader", None, (40, 60), (340, 90),
        {"unet_name": "wan2.1_t2v_1.3B_fp16.safetensors", "weight_dtype": "default"}),
    2: ("CLIPLoader", None, (40, 200), (340, 110),
        {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan", "device": "default"}),
    3: ("VAELoader", None, (40, 360), (340, 60), {"vae_name": "wan_2.1_vae.safetensors"}),
    4: ("ModelSamplingSD3", None, (430, 60), (300, 60), {"model": [1, 0], "shift": 8.0}),
    5: ("VideoSparseAttentionPatch", None, (430, 170), (320, 440),
        {"model": [4, 0], "sparsity": 0.8, "tile_size": "auto", "backend": "auto", "start_percent": 0.2,
         "end_percent": 1.0, "dense_blocks": "", "min_tokens": 12288, "strict": False, "verbose": False}),
    6: ("CLIPTextEncode", "Prompt", (800, 60), (360, 150),
        {"clip": [2, 0],
         "text": "a red fox trots through fresh snow at sunrise, steam from its breath, tracking shot"}),
    7: ("CLIPTextEncode", "Negative prompt", (800, 260), (360, 130), {"clip": [2, 0], "text": NEGATIVE}),
    8: ("EmptyHunyuanLatentVideo", None, (800, 440), (360, 130),
        {"width": 832, "height": 480, "length": 81, "batch_size": 1}),
    9: ("KSampler", None, (1190, 60), (300, 260),
        {"model": [5, 0], "positive": [6, 0], "negative": [7, 0], "latent_image": [8, 0], "seed": 1, "steps": 30,
         "cfg": 6.0, "sampler_name": "uni_pc", "scheduler": "simple", "denoise": 1.0}),
    10: ("SparseAttentionReport", None, (1190, 380), (460, 420), {"latent": [9, 0], "model": [5, 0]}),
    11: ("VAEDecode", None, (1540, 60), (220, 50), {"samples": [10, 0], "vae": [3, 0]}),
    12: ("CreateVideo", None, (1540, 170), (220, 80), {"images": [11, 0], "fps": 16.0}),
    13: ("SaveVideo", None, (1800, 60), (340, 320), {"video": [12, 0], "filename_prefix": "video/wan_vsa"}),
    14: ("MarkdownNote", "What this does", (40, 660), (710, 230),
         {"text": "**Video Sparse Attention** lets every 3-D tile of the clip attend only to the tiles that matter "
                  "to it.\n\n- `sparsity` 0.8 keeps a fifth of them. Higher is faster and further from dense.\n"
                  "- `start_percent` 0.2 keeps the first fifth of the steps dense, where the composition forms.\n"
                  "- After a run the node says what ran sparse, what ran dense and why, and how long both took.\n"
                  "- **Sparse Attention Report** shows which tiles the middle of the clip looks at.\n\n"
                  "Bypass the node (Ctrl+B) to compare with dense attention at the same seed."}),
}
WORKFLOWS = {"wan_t2v_vsa": WAN_T2V_VSA}


def definition(node_type):
    """(input names with their types, output names with types) of a node, in the host's order."""
    import nodes
    cls = nodes.NODE_CLASS_MAPPINGS[node_type]
    declared = cls.INPUT_TYPES()
    inputs = [(name, spec) for part in ("required", "optional") for name, spec in declared.get(part, {}).items()]
    outputs = list(zip(getattr(cls, "RETURN_NAMES", None) or cls.RETURN_TYPES, cls.RETURN_TYPES, strict=False))
    return inputs, outputs


def is_widget(spec):
    kind = spec[0]
    return isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3")


def default_of(spec):
    options = spec[1] if len(spec) > 1 else {}
    if "default" in options:
        return options["default"]
    if isinstance(spec[0], str) and spec[0] in ("INT", "FLOAT", "BOOLEAN", "STRING"):
        return {"INT": 0, "FLOAT": 0.0, "BOOLEAN": False, "STRING": ""}[spec[0]]
    choices = spec[0] if isinstance(spec[0], list) else options.get("options", [])
    first = choices[0] if choices else ""
    return first["key"] if isinstance(first, dict) else first


def build(graph):
    """A UI-format workflow for a graph description."""
    links, nodes = [], []
    outgoing = {}
    for node_id, (node_type, title, pos, size, values) in graph.items():
        if node_type == "MarkdownNote":
            nodes.append({"id": node_id, "type": node_type, "title": title, "pos": list(pos), "size": list(size),
                          "flags": {}, "order": 0, "mode": 0, "inputs": [], "outputs": [], "properties": {},
                          "widgets_values": [values["text"]], "color": "#432", "bgcolor": "#000"})
            continue
        declared, outputs = definition(node_type)
        unknown = set(values) - {name for name, _ in declared}
        if unknown:
            raise SystemExit(f"{node_type} has no input {', '.join(sorted(unknown))}")
        inputs, widgets = [], []
        for name, spec in declared:
            if isinstance(values.get(name), list):
                source, slot = values[name]
                links.append([len(links) + 1, source, slot, node_id, len(inputs), spec[0]])
                outgoing.setdefault((source, slot), []).append(len(links))
                inputs.append({"name": name, "type": spec[0], "link": len(links)})
            elif is_widget(spec):
                inputs.append({"name": name, "type": spec[0] if isinstance(spec[0], str) else "COMBO",
                               "widget": {"name": name}, "link": None})
                widgets.append(values.get(name, default_of(spec)))
                if (spec[1] if len(spec) > 1 else {}).get("control_after_generate"):
                    widgets.append("fixed")
        nodes.append({
            "id": node_id, "type": node_type, "pos": list(pos), "size": list(size), "flags": {}, "order": len(nodes),
            "mode": 0, "inputs": inputs,
            "outputs": [{"name": name, "type": kind, "links": None} for name, kind in outputs],
            "properties": {"Node name for S&R": node_type}, "widgets_values": widgets,
            **({"title": title} if title else {})})
    for node in nodes:
        for slot, output in enumerate(node["outputs"]):
            output["links"] = outgoing.get((node["id"], slot), [])
    return {"id": "", "revision": 0, "last_node_id": max(graph), "last_link_id": len(links), "nodes": nodes,
            "links": links, "groups": [], "config": {}, "extra": {"ds": {"scale": 0.75, "offset": [20, 20]}},
            "version": 0.4}


def main():
    comfy_boot.boot(comfy_boot.locate())
    import nodes
    asyncio.run(nodes.init_builtin_extra_nodes())
    asyncio.run(nodes.load_custom_node(str(ROOT)))
    for name, graph in WORKFLOWS.items():
        path = ROOT / "workflows" / f"{name}.json"
        path.write_text(json.dumps(build(graph), indent=1) + "\n")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
