"""The node Sparse Attention for Raylight: what it sends, and what its worker processes then do.

Raylight needs GPUs to start. Here two plain processes take its actors' place: they get the same function.
"""
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.host
ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import importlib.util, sys, types
root, store, rank, checkpoint = sys.argv[1:]
sys.path[:0] = [root + "/dev", root + "/tests"]
import comfy_boot
comfy_boot.boot()
import torch, torch.distributed as dist
import sampling
dist.init_process_group("gloo", init_method="file://" + store, rank=int(rank), world_size=2)
globals_of = sys.modules["yunchang.globals"] = types.ModuleType("yunchang.globals")
globals_of.PROCESS_GROUP = types.SimpleNamespace(ULYSSES_PG=dist.group.WORLD, RING_PG=None)
spec = importlib.util.spec_from_file_location("sent", root + "/nodes/split/in_worker.py")
sent = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sent)
widgets = {"preset": "custom", "min_tokens": 0, "start_percent": 0.0, "backend": "reference"}
model = sampling.load(checkpoint)
draw = lambda model: sampling.sample(model, "wan", latent_thw=(5, 9, 12))
dense = draw(model)
for settings in ({"method": "dense"}, {"method": "VSA", "sparsity": 0.6, "far_field": "on", **widgets},
                 {"method": "STA", "window": "1x1x1", **widgets}):
    several = sent.in_worker(root, settings)(model)
    nodes = sys.modules[sent.NAME + ".nodes"].NODES
    node = {"VSA": nodes[0], "STA": nodes[4]}.get(settings["method"])
    alone = node.execute(model, **{k: v for k, v in settings.items() if k != "method"})[0] if node else model
    out, wanted = draw(several), draw(alone)
    split = several.get_wrappers("outer_sample", "video_sparse_attention.sequence_split")[0].__self__
    assert (out - wanted).norm() <= 1e-5 * wanted.norm(), settings
    assert split.evidence.passes == 2 and not split.evidence.whole and split.evidence.heads == (2, 1), settings
    assert (node is None) == torch.equal(wanted, dense)
assert torch.equal(draw(model), dense)
print("right")
"""


def test_two_processes_give_what_one_gives_dense_and_sparse(comfyui, tiny, tmp_path):
    path = str(tiny("tiny_wan_t2v_wide"))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COMFYUI_PATH": str(comfyui)}
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(ROOT), str(tmp_path / "store"), str(rank), path],
                                env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
               for rank in range(2)]
    for worker in workers:
        out, _ = worker.communicate(timeout=300)
        assert worker.returncode == 0 and out.endswith("right\n"), out[-3000:]


class Actor:
    """A worker as Ray shows it, whose calls come back as their results."""

    def __init__(self, model):
        self.model, self.model_function_runner = model, types.SimpleNamespace(remote=self._run)

    def _run(self, function):
        self.model = function(self.model)


@pytest.fixture
def run(comfyui, monkeypatch):
    """run(workers, ...) -> the node's output; what is sent is read, not run: the pack is in this process already."""
    from pack.nodes.split import raylight
    sent = []
    monkeypatch.setitem(sys.modules, "ray", types.SimpleNamespace(get=lambda futures: futures))
    monkeypatch.setattr(raylight, "in_worker", lambda folder, settings: (
        sent.append((folder, settings)) or (lambda model: (model, settings))))

    def execute(workers, **widgets):
        return raylight.SparseAttentionForRaylight.execute({"workers": workers}, **widgets)[0], sent
    return execute


def test_every_worker_gets_the_folder_and_the_settings_and_the_actors_go_on(run):
    workers = [Actor(0), Actor(1)]
    actors, sent = run(workers, method="STA", window="3x3x3", min_tokens=0)
    assert actors["workers"] is workers and [worker.model[0] for worker in workers] == [0, 1]
    (folder, settings), = sent
    assert Path(folder) == ROOT and settings == {
        "method": "STA", "window": "3x3x3", "preset": "auto", "far_field": "auto", "spread": "auto", "min_tokens": 0}
    assert run(workers, method="dense")[1][-1][1] == {"method": "dense"}
    with pytest.raises(ValueError, match="method 'ring': wanted VSA, STA, dense"):
        run(workers, method="ring")


def test_a_worker_that_does_not_take_it_is_told_with_the_versions(run):
    def fail(function):
        raise RuntimeError("ray::RayWorker\n  File somewhere\nValueError: this Raylight was started without Ulysses")

    worker = Actor(0)
    worker.model_function_runner.remote = fail
    with pytest.raises(RuntimeError, match="did not take the sparse attention: ValueError: this Raylight was started "
                                           r"without Ulysses \(no ray, "):
        run([worker])


def test_without_raylight_the_node_says_what_is_missing(comfyui, monkeypatch):
    from pack.nodes.split.raylight import SparseAttentionForRaylight
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RuntimeError, match="did not take the sparse attention: .*ray.*no xfuser, no yunchang"):
        SparseAttentionForRaylight.execute({"workers": []})


class Group:
    def __init__(self, size):
        self.count = size

    def size(self):
        return self.count

    def rank(self):
        return 0


def test_a_raylight_without_ulysses_or_with_a_ring_and_models_that_cannot_be_split_are_refused(load_tiny, monkeypatch):
    from pack.nodes.split.raylight import installed
    groups = types.SimpleNamespace(ULYSSES_PG=None, RING_PG=None)
    monkeypatch.setitem(sys.modules, "yunchang.globals", types.SimpleNamespace(PROCESS_GROUP=groups))
    wan, settings = load_tiny("tiny_wan_t2v"), {"method": "dense"}
    with pytest.raises(ValueError, match="started without Ulysses: set ulysses_degree"):
        installed(wan, settings)
    groups.ULYSSES_PG, groups.RING_PG = Group(2), Group(2)
    with pytest.raises(ValueError, match="a ring of 2: .* Set ring_degree to 1"):
        installed(wan, settings)
    with pytest.raises(ValueError, match="has 2 heads, 3 workers are too many"):
        installed(wan, settings, Group(3))
    with pytest.raises(ValueError, match="cannot be split over several cards: WanModel_S2V is not tried"):
        installed(load_tiny("tiny_wan_s2v"), settings, Group(2))


def test_raylights_own_split_comes_off_and_nothing_else(load_tiny):
    from comfy.patcher_extension import CallbacksMP

    from pack.nodes.split.raylight import installed

    def usp_dit_forward(self, *args):
        raise AssertionError

    def others(self, *args):
        raise AssertionError

    class USPInjectRegistry:
        @classmethod
        def inject(cls, *args):
            raise AssertionError

    usp_dit_forward.__module__ = USPInjectRegistry.inject.__func__.__module__ = "raylight.distributed_modules.usp"
    usp_dit_forward.__qualname__, USPInjectRegistry.inject.__func__.__qualname__ = (
        "usp_dit_forward", "USPInjectRegistry.inject")
    model = load_tiny("tiny_wan_t2v").clone()
    net = model.model.diffusion_model
    model.add_callback(CallbacksMP.ON_LOAD, USPInjectRegistry.inject)
    model.add_callback(CallbacksMP.ON_LOAD, others)
    net.forward_orig = types.MethodType(usp_dit_forward, net)
    net.blocks[0].self_attn.mine = types.MethodType(others, net)
    try:
        clone = installed(model, {"method": "dense"}, Group(2))
        assert clone.get_all_callbacks(CallbacksMP.ON_LOAD) == [others]
        assert "forward_orig" not in vars(net) and "mine" in vars(net.blocks[0].self_attn)
        assert len(model.get_all_callbacks(CallbacksMP.ON_LOAD)) == 2
    finally:
        vars(net).pop("forward_orig", None)
        del net.blocks[0].self_attn.mine


def test_the_function_says_which_folder_a_workers_machine_lacks(tmp_path):
    from pack.nodes.split.in_worker import in_worker
    function = in_worker(str(tmp_path / "gone"), {"method": "dense"})
    assert function.__module__ == "__main__" and not function.__code__.co_names.count("pack")
    with pytest.raises(FileNotFoundError, match="install the pack there too, in the same folder"):
        function(torch.nn.Identity())
