"""Write the example workflows (UI format) from the descriptions in graphs/.

    python dev/make_workflows.py

A description names nodes with their widget values; this script looks the order of inputs and widgets up in the pack's
and ComfyUI's own node definitions, so a shipped workflow cannot drift from them. Needs a ComfyUI checkout
(dev/comfy_boot.py). Cards for the template browser: dev/make_thumbnails.py.
"""
import asyncio
import json
from pathlib import Path

import comfy_boot
from graphs import GRAPHS, raylight
from graphs.files import models_of
from graphs.page import Output, Page

ROOT = Path(__file__).resolve().parent.parent


def definition(node_type):
    """(input names with their types, output names with types) of a node, in the host's order."""
    if node_type in raylight.NODES:
        return raylight.NODES[node_type]
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


def note_entry(node):
    return {"id": node.id, "type": node.kind, "title": node.title, "pos": node.pos, "size": node.size, "flags": {},
            "order": node.id - 1, "mode": 0, "inputs": [], "outputs": [], "properties": {},
            "widgets_values": [node.inputs["text"]]}


def node_entry(node, links):
    """A node as the page saves it; its incoming links are appended to `links`."""
    declared, outputs = definition(node.kind)
    inputs, widgets = [], []
    for name, spec in declared:
        options = spec[1] if len(spec) > 1 else {}
        value = node.inputs.get(name)
        kind = spec[0] if isinstance(spec[0], str) else "COMBO"
        if isinstance(value, Output):
            links.append([len(links) + 1, value.node.id, value.slot, node.id, len(inputs), kind])
            inputs.append({"name": name, "type": kind, "link": len(links)})
        elif is_widget(spec):
            inputs.append({"name": name, "type": kind, "widget": {"name": name}, "link": None})
            widgets.append(node.inputs.get(name, default_of(spec)))
            if options.get("control_after_generate"):
                widgets.append("fixed")
            if options.get("image_upload"):
                widgets.append("image")
        else:
            inputs.append({"name": name, "type": kind, "shape": 7, "link": None})
    models = models_of(node)
    return {
        "id": node.id, "type": node.kind, "pos": node.pos, "size": node.size, "flags": {}, "order": node.id - 1,
        "mode": 0, "inputs": inputs,
        "outputs": [{"name": name, "type": kind, "links": []} for name, kind in outputs],
        "properties": {"Node name for S&R": node.kind, **({"models": models} if models else {}),
                       **({"cnr_id": raylight.PACK} if node.kind in raylight.NODES else {})},
        "widgets_values": widgets, **({"title": node.title} if node.title else {})}


def build(draw):
    """A UI-format workflow: what `draw` puts on a page."""
    page, links = Page(definition, is_widget), []
    draw(page)
    entries = []
    for node in page.nodes:
        entry = note_entry(node) if node.kind == "MarkdownNote" else node_entry(node, links)
        if node.colors:
            entry["color"], entry["bgcolor"] = node.colors
        entries.append(entry)
    by_id = {entry["id"]: entry for entry in entries}
    for number, source, slot, *_ in links:
        by_id[source]["outputs"][slot]["links"].append(number)
    groups = [{"id": place, "title": box.title, "color": box.color, "font_size": 24, "flags": {},
               "bounding": [box.left, box.top, box.right - box.left, box.bottom - box.top]}
              for place, box in enumerate(page.boxes, 1)]
    return {"id": "", "revision": 0, "last_node_id": len(entries), "last_link_id": len(links), "nodes": entries,
            "links": links, "groups": groups, "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [480, 60]}, "workflowRendererVersion": "LG"}, "version": 0.4}


def main():
    comfy_boot.boot(comfy_boot.locate())
    import nodes
    asyncio.run(nodes.init_builtin_extra_nodes())
    asyncio.run(nodes.load_custom_node(str(ROOT)))
    for name, draw in GRAPHS.items():
        path = ROOT / "workflows" / f"{name}.json"
        path.write_text(json.dumps(build(draw), indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
