"""The demo: its graph surgery and its verdict, and the whole of it against a real ComfyUI server."""
import json
import os
import subprocess
import sys

import pytest
from PIL import Image

import comfy_server
import demo

GRAPH = json.loads(demo.GRAPH.read_text())


def test_the_dense_variant_has_neither_node_and_no_dangling_link():
    name, graph = next(demo.variants(GRAPH, []))
    assert name == "dense"
    assert not {demo.PATCH, demo.REPORT} & {value["class_type"] for value in graph.values()}
    links = [link for value in graph.values() for link in value["inputs"].values() if isinstance(link, list)]
    assert links and all(source in graph for source, _ in links)
    assert graph[demo.node(graph, demo.SAMPLER)]["inputs"]["model"] == [demo.node(graph, "ModelSamplingSD3"), 0]


def test_a_sparse_variant_differs_from_the_shipped_graph_in_its_sparsity_and_its_kernel_only():
    _, (_, graph) = demo.variants(GRAPH, [0.25])
    patch = demo.node(GRAPH, demo.PATCH)
    assert graph[patch]["inputs"] == {**GRAPH[patch]["inputs"], "sparsity": 0.25, "backend": demo.KERNEL}
    assert {**graph, patch: None} == {**GRAPH, patch: None}


SPARSE = {"sparse_calls": 8, "dense_calls": {}}
DENSE = {"sparse_calls": 0, "dense_calls": {"too few tokens": 8}}


@pytest.mark.parametrize("results, complaint", [
    ({"sparsity 0": (1e-6, DENSE), "sparsity 0.5": (0.1, SPARSE)}, None),
    ({"sparsity 0": (2e-4, SPARSE)}, "within 0.0001"),
    ({"sparsity 0": (float("nan"), SPARSE)}, "within 0.0001"),
    ({"sparsity 0.5": (0.0, DENSE)}, "too few tokens"),
    ({"sparsity 0.5": (0.0, SPARSE)}, "differs from the dense"),
    ({"sparsity 0.5": (float("nan"), SPARSE)}, "differs from the dense"),
])
def test_the_verdict_names_what_is_wrong(results, complaint):
    wrong = demo.verdict(results)
    assert wrong == [] if complaint is None else len(wrong) == 1 and complaint in wrong[0]


def test_the_demo_runs_the_shipped_graph_in_a_real_server(comfyui):
    done = subprocess.run([sys.executable, demo.__file__, "--comfyui", str(comfyui), "--sparsity", "0.9",
                           "--steps", "2"],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    row = next(line for line in done.stdout.splitlines() if line.startswith("sparsity 0.9  "))
    assert "8x16x16" in row and "4 / 4" in row and " dB" in row and "What the numbers say: " in done.stdout
    with Image.open(demo.OUT / "demo_clips.webp") as film:
        assert film.n_frames == 8 and film.width > 2 * 192
    assert (demo.OUT / "demo_tiles.png").read_bytes().startswith(b"\x89PNG")


def test_a_pack_that_does_not_load_is_named_and_the_server_is_stopped(comfyui, tmp_path):
    (tmp_path / "__init__.py").write_text('raise RuntimeError("no such wheel")\n')
    server = comfy_server.Server(comfyui, packs={"broken-pack": tmp_path})
    with pytest.raises(comfy_server.ServerError, match="did not load.*broken-pack.*no such wheel"):
        server.__enter__()
    assert server.process.poll() is not None and not server.base.exists()
