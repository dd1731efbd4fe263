"""ComfyUI's page in a real browser: what a user sees under the nodes, in both of the page's ways to draw them.

Skipped without Chromium (CHROMIUM, default /usr/bin/chromium) and playwright; `make page` installs the latter.
"""
import json
import os
import time
from pathlib import Path

import pytest

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
GRAPH = Path(__file__).resolve().parent / "small_graph.json"
PATCH, REPORT = "VideoSparseAttentionPatch", "SparseAttentionReport"
CANVAS, VUE = "canvas", "vue"
RAN = "VSA is ON", "VSA is SLOWER"
"""How the verdict on a sparse run begins; which of them, the clock of this machine decides."""
READY = """() => window.app?.graph && window.app?.canvas
    && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100"""
TEXT_OF = """name => (window.app.graph.nodes.find(node => node.type === name).widgets ?? [])
    .find(widget => widget.name === "$$node-text-preview")?.value ?? "" """
SHOWN = """text => {
    // The part of the text, the first that the page holds, that nothing around it cuts off.
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    for (let node; (node = walker.nextNode());) {
        const at = node.data.indexOf(text);
        if (at < 0) continue;
        const range = document.createRange();
        range.setStart(node, at);
        range.setEnd(node, at + text.length);
        const all = range.getBoundingClientRect();
        let bottom = all.bottom;
        for (let box = node.parentElement; box; box = box.parentElement)
            if (getComputedStyle(box).overflowY !== "visible")
                bottom = Math.min(bottom, box.getBoundingClientRect().bottom);
        return all.height ? (bottom - all.top) / all.height : 0;
    }
    return -1;
}"""

pytestmark = [pytest.mark.host, pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"no Chromium at {CHROMIUM}")]


@pytest.fixture(scope="module")
def server(comfyui, tiny, tmp_path_factory):
    from comfy_server import Server
    with Server(comfyui, models=tiny("tiny_wan_t2v").parent, timeout=900,
                log=tmp_path_factory.mktemp("page") / "log") as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Page:
    """The page with the pack's graph open; `display` is one of CANVAS and VUE."""

    def __init__(self, browser, server, display):
        self.server, self.display = server, display
        self.page = browser.new_page(viewport={"width": 1600, "height": 1000})
        self.page.route(lambda url: url.startswith("http") and not url.startswith(server.url),
                        lambda route: route.abort())
        self.page.goto(server.url, timeout=120_000)
        self.open()

    def open(self, **values):
        """Wait for the page, then open the graph with these values of the sparse node."""
        self.page.wait_for_function(READY, timeout=120_000)
        self.page.evaluate("on => window.app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)",
                           self.display == VUE)
        graph = json.loads(GRAPH.read_text())
        sampler, patch = (next(node for node in graph.values() if node["class_type"] == name)
                          for name in ("KSampler", PATCH))
        sampler["inputs"]["seed"] = time.time_ns() % 10**9
        patch["inputs"] |= {"backend": "reference", "min_tokens": 0, **values}
        self.page.evaluate("graph => window.app.loadApiJson(graph, 'prompt.json')", graph)
        self.page.wait_for_timeout(1000)

    def run(self):
        """Queue the graph and wait until the server has nothing left to do."""
        self.page.evaluate("() => { window.app.queuePrompt(0) }")
        self.page.wait_for_timeout(1000)
        while any(self.server.get("/queue")[1].values()):
            time.sleep(0.5)
        self.page.wait_for_timeout(1500)

    def text(self, node):
        return self.page.evaluate(TEXT_OF, node)

    def share_shown(self, text):
        """Share of the height of a text that is to be seen; -1 where the page does not hold it."""
        return self.page.evaluate(SHOWN, text)


@pytest.fixture
def open_page(browser, server):
    pages = []

    def make(display=CANVAS):
        pages.append(Page(browser, server, display))
        return pages[-1]
    yield make
    for page in pages:
        page.page.close()


@pytest.mark.parametrize("display", (CANVAS, VUE))
def test_the_verdict_can_be_read_under_the_node_at_its_default_size(open_page, display):
    page = open_page(display)
    page.run()
    text = page.text(PATCH)
    assert text.startswith(RAN)
    first = text.split(". ")[0]
    assert page.share_shown(first.split(" (")[0]) > 0.95, text
    if display == VUE:
        assert all(page.share_shown(line.lstrip("- ")) > 0.95 for line in text.splitlines()), text


def test_a_bypassed_node_makes_a_dense_run_that_is_set_beside_the_sparse_one(open_page):
    page = open_page()
    page.run()
    page.page.evaluate("name => { window.app.graph.nodes.find(node => node.type === name).mode = 4 }", PATCH)
    page.run()
    text = page.text(REPORT)
    assert text.startswith("DENSE run") and "the last sparse run took" in text


def test_after_a_reload_the_report_of_a_cached_run_comes_back_and_says_so(open_page):
    page = open_page()
    page.page.evaluate("""() => { for (const node of window.app.graph.nodes) for (const widget of node.widgets ?? [])
        if (widget.name === "control_after_generate") widget.value = "fixed" }""")
    page.run()
    graph = page.page.evaluate("() => window.app.graph.serialize()")
    page.page.reload()
    page.page.wait_for_function(READY, timeout=120_000)
    page.page.evaluate("graph => window.app.loadGraphData(graph)", graph)
    page.page.wait_for_timeout(1000)
    page.run()
    text = page.text(REPORT)
    assert text.startswith(RAN) and "came from the cache" in text


def test_a_sampling_that_is_cancelled_leaves_a_graph_that_runs(open_page):
    page = open_page()
    page.page.evaluate("() => { window.app.queuePrompt(0) }")
    page.page.wait_for_timeout(2500)
    page.page.evaluate("() => window.app.api.interrupt(null)")
    while any(page.server.get("/queue")[1].values()):
        time.sleep(0.5)
    page.run()
    assert page.text(PATCH).startswith(RAN)


def test_one_bad_value_reddens_one_input_and_is_told_in_a_sentence(open_page):
    page = open_page()
    page.open(tile_size="3x3x3")
    answer = page.page.evaluate("""async () => {
        const prompt = await window.app.graphToPrompt();
        const response = await window.app.api.fetchApi("/prompt", {
            method: "POST", body: JSON.stringify({prompt: prompt.output, client_id: "page"})});
        return response.json();
    }""")
    (errors,) = (node["errors"] for node in answer["node_errors"].values())
    assert [error["extra_info"]["input_name"] for error in errors] == ["tile_size"]
    assert "3x3x3" in errors[0]["details"]


def test_two_values_that_exclude_each_other_are_one_error_without_a_class_path(open_page):
    page = open_page()
    page.open(start_percent=0.8, end_percent=0.3)
    page.run()
    page.page.get_by_text("View details").click()
    page.page.wait_for_timeout(1000)
    seen = page.page.evaluate("() => document.body.innerText")
    assert "start_percent 0.8 is after end_percent 0.3" in seen
    assert "video-sparse-attention." not in seen


def test_every_example_graph_is_a_card_of_the_template_browser(open_page):
    page = open_page()
    names = {path.stem for path in (GRAPH.parent.parent / "workflows").glob("*.json")}
    found = page.page.evaluate("async () => (await (await window.app.api.fetchApi('/workflow_templates')).json())")
    assert set(found["video-sparse-attention"]) == names
    page.page.evaluate("() => window.app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.page.wait_for_timeout(3000)
    shown = page.page.evaluate("() => document.body.innerText")
    assert "video-sparse-attention" in shown.lower()
