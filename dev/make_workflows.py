"""Write the example workflows (UI format) from the short descriptions in workflow_graphs.py.

    python dev/make_workflows.py

A workflow lists its nodes with their widget values by name; this script looks the order of inputs and widgets up
in the pack's and ComfyUI's own node definitions, so a shipped workflow cannot drift from them. Needs a ComfyUI
checkout (dev/comfy_boot.py).
"""
import asyncio
import json
from pathlib import Path

import comfy_boot
from workflow_graphs import GRAPHS

ROOT = Path(__file__).resolve().parent.parent


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
    plain = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", "COMFY_DYNAMICCOMBO_V3"}
    return isinstance(kind, list) or set(kind.split(",")) <= plain


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
    for name, graph in GRAPHS.items():
        path = ROOT / "workflows" / f"{name}.json"
        path.write_text(json.dumps(build(graph), indent=1) + "\n")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
