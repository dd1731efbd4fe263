"""Take the README's pictures of the page: what stands on the nodes after a real run, on this machine's CPU.

    python dev/readme_pictures.py        needs Chromium (CHROMIUM) and playwright, as `make page`

A tiny model with random weights samples a clip that is long enough for sparse attention to pay, so that the figures are
those of a run and of no GPU. Writes docs/node_after_a_run.png and docs/report.png.
"""
import json
import os
import sys
import time
from pathlib import Path

import make_tiny
from comfy_boot import PACK, boot, find
from comfy_server import Server, stop_on_signals

GRAPH = PACK / "tests" / "small_graph.json"
PICTURES = {"VideoSparseAttentionPatch": "node_after_a_run.png", "SparseAttentionReport": "report.png"}
SIZES = {"VideoSparseAttentionPatch": (460, 330), "SparseAttentionReport": (460, 900)}
READY = """() => window.app?.graph && window.app?.canvas
    && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100"""
PLACE = """([type, width, height]) => {
    const node = window.app.graph.nodes.find(node => node.type === type);
    node.size = [width, height];
    node.pos = [0, 0];
    for (const other of window.app.graph.nodes) if (other !== node) other.pos = [other.pos[0] + 5000, 5000];
    window.app.canvas.ds.scale = 1;
    window.app.canvas.ds.offset = [420, 160];
    window.app.graph.setDirtyCanvas(true, true);
}"""


def graph():
    """The small graph at a size where sparse attention pays on a CPU too, everything at its default."""
    prompt = json.loads(GRAPH.read_text())
    prompt["5"]["inputs"].update(width=640, height=384, length=49)
    prompt["6"]["inputs"].update(steps=10, seed=time.time_ns() % 10**9)
    prompt["2"]["inputs"].update(min_tokens=0, start_percent=0.2, preset="auto", far_field="auto")
    return prompt


def main():
    from playwright.sync_api import sync_playwright
    stop_on_signals()
    comfyui = find()
    boot(comfyui)
    models = make_tiny.make("tiny_wan_t2v", make_tiny.folder_for(comfyui)).parent
    with Server(comfyui, models=models, timeout=900) as server, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=os.environ.get("CHROMIUM", "/usr/bin/chromium"), args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"])
        page = browser.new_page(viewport={"width": 1400, "height": 1200}, device_scale_factor=2)
        page.route(lambda url: url.startswith("http") and not url.startswith(server.url), lambda route: route.abort())
        page.goto(server.url, timeout=120_000)
        page.wait_for_function(READY, timeout=120_000)
        page.evaluate("() => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', true)")
        page.evaluate("graph => window.app.loadApiJson(graph, 'prompt.json')", graph())
        page.wait_for_timeout(1500)
        page.evaluate("() => { window.app.queuePrompt(0) }")
        page.wait_for_timeout(1500)
        while any(server.get("/queue")[1].values()):
            time.sleep(0.5)
        page.wait_for_timeout(2500)
        for kind, name in PICTURES.items():
            page.evaluate(PLACE, [kind, *SIZES[kind]])
            page.wait_for_timeout(1500)
            box = page.locator(f"[data-node-id='{node_id(page, kind)}']").first
            box.screenshot(path=PACK / "docs" / name)
            print(f"docs/{name}")


def node_id(page, kind):
    return page.evaluate("type => window.app.graph.nodes.find(node => node.type === type).id", kind)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
