"""How the example graphs stand on the page: what a user sees before reading anything."""
import json
from itertools import combinations
from pathlib import Path

import pytest

from graphs.page import GREEN, NEGATIVE, POSITIVE, SLOT, TITLE, least_height

PATHS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))
OURS = {"VideoSparseAttentionPatch", "SlidingTileAttentionPatch", "SparseAttentionReport", "STAStrategySearch",
        "SparseAttentionCalibrate", "SparseAttentionForRaylight", "SaveSTAStrategy",
        "LoadSTAStrategy", "SparseLinearAttentionPatch", "VideoMixtureOfBlockAttentionPatch"}


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def graph(request):
    return json.loads(request.param.read_text(encoding="utf-8"))


def body(node):
    """(left, top, right, bottom) of a node with its title."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE, x + width, y + height


def bounds(group):
    x, y, width, height = group["bounding"]
    return x, y, x + width, y + height


def overlap(one, other):
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def inside(one, other):
    return other[0] <= one[0] and other[1] <= one[1] and one[2] <= other[2] and one[3] <= other[3]


def sockets(node):
    """The inputs that are drawn as sockets of their own, in order."""
    return [entry["name"] for entry in node["inputs"] if "widget" not in entry]


def ends(graph, link):
    """The points that a link connects."""
    nodes = {node["id"]: node for node in graph["nodes"]}
    _, source, slot, target, place, _ = link
    source, target = nodes[source], nodes[target]
    row = sockets(target).index(target["inputs"][place]["name"])
    return ((source["pos"][0] + source["size"][0], source["pos"][1] + SLOT * (slot + 0.7)),
            (target["pos"][0], target["pos"][1] + SLOT * (row + 0.7)))


def crosses(start, end, box):
    """Whether the segment has a part inside the box (Liang-Barsky)."""
    low, high = 0.0, 1.0
    for axis in (0, 1):
        step = end[axis] - start[axis]
        near, far = box[axis] - start[axis], box[axis + 2] - start[axis]
        if step == 0:
            if near >= 0 or far <= 0:
                return False
            continue
        near, far = sorted((near / step, far / step))
        low, high = max(low, near), min(high, far)
    return low < high


def test_no_two_nodes_and_no_two_groups_overlap(graph):
    for one, other in combinations(graph["nodes"], 2):
        assert not overlap(body(one), body(other)), (one["type"], other["type"])
    for one, other in combinations(graph["groups"], 2):
        assert not overlap(bounds(one), bounds(other)), (one["title"], other["title"])


def test_every_node_has_the_height_that_the_page_needs_to_show_all_its_widgets(graph):
    for node in graph["nodes"]:
        least = least_height(len(sockets(node)), len(node["outputs"]), len(node["widgets_values"]))
        assert node["type"] == "MarkdownNote" or node["size"][1] >= least, node["type"]


def test_every_node_lies_inside_exactly_one_group(graph):
    for node in graph["nodes"]:
        around = [group["title"] for group in graph["groups"] if inside(body(node), bounds(group))]
        touched = [group["title"] for group in graph["groups"] if overlap(body(node), bounds(group))]
        assert len(around) == 1 and around == touched, (node["type"], around, touched)


def test_no_link_runs_through_a_node_that_it_does_not_belong_to(graph):
    wrong = []
    for link in graph["links"]:
        start, end = ends(graph, link)
        wrong += [f"{link[5]} {link[1]} -> {link[3]} through {node['id']} {node['type']}" for node in graph["nodes"]
                  if node["id"] not in (link[1], link[3]) and crosses(start, end, body(node))]
    assert not wrong


def test_a_link_through_a_node_would_be_noticed():
    assert crosses((0, 0), (10, 10), (4, 2, 8, 6)) and not crosses((0, 0), (10, 0), (4, 2, 8, 6))
    assert crosses((5, 0), (5, 10), (4, 2, 8, 6)) and not crosses((0, 0), (3, 3), (4, 2, 8, 6))


def test_the_steps_are_numbered_from_left_to_right_and_one_green_group_holds_what_is_sparse(graph):
    steps = [group["title"] for group in graph["groups"] if group["title"].startswith("Step ")]
    assert [title.split(" - ")[0] for title in sorted(steps)] == [f"Step {n}" for n in range(1, len(steps) + 1)]
    (green,) = [group for group in graph["groups"] if group["color"] == GREEN]
    assert green["title"].startswith("Sparse attention")
    ours = [node for node in graph["nodes"] if node["type"] in OURS]
    alone = any(node["type"] == "SparseAttentionForRaylight" for node in ours)      # what it did stands in the log
    assert len(ours) >= 2 - alone and all(inside(body(node), bounds(green)) for node in ours)


def test_prompts_are_green_and_red(graph):
    colors = {node["title"]: (node["color"], node["bgcolor"]) for node in graph["nodes"] if "rompt" in (
        node.get("title") or "")}
    assert colors.pop("Prompt") == POSITIVE and set(colors.values()) <= {NEGATIVE}


def test_the_whole_graph_has_about_the_proportions_of_a_screen(graph):
    boxes = [bounds(group) for group in graph["groups"]]
    width = max(box[2] for box in boxes) - min(box[0] for box in boxes)
    height = max(box[3] for box in boxes) - min(box[1] for box in boxes)
    assert 1.2 <= width / height <= 2.4 and width <= 2900, (width, height)
