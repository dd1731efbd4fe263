"""The GPU benchmark goes through all its steps on a CPU: arguments, shapes, peers that are absent, files."""
from __future__ import annotations

import json
import math
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu(load, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    return load("gpu")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_dry_run_writes_what_was_measured_and_why_the_rest_was_not(gpu, tmp_path, capsys):
    target = gpu.main(["--dry-run", "--out", str(tmp_path), "--repeats", "1", "--shapes", "H12 32760",
                       "--sparsities", "0.5"])
    report = json.loads(target.read_text())
    assert report["dry_run"] is True and report["hardware"]["gpu"] is None and report["versions"]["torch"]
    rows = {(row["lists"], row["name"]): row for row in report["rows"]}
    assert {name for _, name in rows} == {"cuda_sm90", "triton", "triton_int8", "reference", "reference_int8",
                                          *(peer.name for peer in gpu.PEERS)}
    assert {lists for lists, _ in rows} == set(gpu.LISTS)
    for lists in gpu.LISTS:
        assert rows[lists, "reference"]["relative_l2"] <= gpu.TOLERANCE and rows[lists, "reference"]["tflops"] > 0
        assert rows[lists, "FlexAttention, same lists"]["ms"] > 0     # uncompiled it looks at the mask function only
        assert rows[lists, "cuda_sm90"]["reason"] == "your CPU cannot run it (needs an NVIDIA card)"
        assert "ms" in rows[lists, "fastvideo-kernel, Triton"] or rows[lists, "fastvideo-kernel, Triton"]["reason"]
    for kernel in report["kernels"].values():
        assert len(kernel["files"]) == 64 and kernel["passed"] is False
    whole = report["whole_op"][0]
    assert whole["kernel"] == "reference" and whole["ms_lowest"] <= whole["ms"] <= whole["ms_highest"]
    assert whole["tile"] == [5, 4, 3] and whole["speedup"] is None, "cuDNN is not here"
    text = target.with_suffix(".md").read_text()
    assert "dry run: numbers mean nothing" in text and "| your CPU cannot run it (needs an NVIDIA card) | | | |" in text
    assert text in capsys.readouterr().out


def test_what_the_time_does_not_suffice_for_is_said(gpu, tmp_path):
    report = json.loads(gpu.main(["--dry-run", "--out", str(tmp_path), "--seconds", "0"]).read_text())
    assert {row["reason"] for row in report["rows"] + report["whole_op"]} == {"not measured: no time left"}
    assert {row["shape"] for row in report["rows"]} == {shape.name for shape in gpu.SHAPES}


def test_without_a_gpu_only_a_dry_run_is_made(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device: use --dry-run"):
        gpu.main([])


def test_the_arguments_are_checked(gpu):
    args = gpu.parse([])
    assert args.sparsities == [0.8, 0.9] and args.seconds < 540 and args.lists == list(gpu.LISTS)
    for wrong in (["--shapes", "H1 1"], ["--lists", "sorted"], ["--sparsities", "most"]):
        with pytest.raises(SystemExit):
            gpu.parse(wrong)


@pytest.mark.parametrize(("package", "function", "peer"), [
    ("sageattention", "sageattn", "SageAttention"),
    ("comfy_kitchen", "int8_attention", "comfy-kitchen int8_attention")])
def test_other_packages_dense_attention_gets_the_tokens_alone_heads_first(gpu, monkeypatch, package, function, peer):
    def attention(q, k, v, **options):
        assert q.shape == k.shape == v.shape == (1, gpu.TINY.heads, math.prod(gpu.TINY.grid), gpu.TINY.dim)
        assert options in ({}, {"tensor_layout": "HND", "is_causal": False})
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    stand_in = SimpleNamespace(**{function: attention}, __spec__=ModuleSpec(package, None))
    monkeypatch.setitem(sys.modules, package, stand_in)
    problem = gpu.make_problem(gpu.TINY, 0.5, "video", "cpu")
    rows = {name: gpu.measure(problem, dense, comparable, prepare, 1)
            for name, dense, comparable, prepare in gpu.contestants(problem) if name == peer}
    assert rows[peer]["relative_l2"] <= gpu.TOLERANCE and rows[peer]["tflops"] > 0


def test_the_shapes_are_those_of_real_clips(gpu):
    expected = [(32760, 624), (32760, 624), (75600, 1440), (118800, 2160), (75600, 1440)]
    for shape, (tokens, tiles) in zip(gpu.SHAPES, expected, strict=True):
        sizes = gpu.make_problem.__globals__["tile_sizes"](shape.grid)
        assert (math.prod(shape.grid), sum(sizes), len(sizes)) == (tokens, tokens, tiles)


def test_an_absent_peer_says_so_and_a_failing_one_too(gpu):
    peer = gpu.PEERS[3]._replace(package="surely_not_here")
    assert gpu.absent(peer) == "surely_not_here is not installed"
    problem = gpu.make_problem(gpu.TINY, 0.5, "video", "cpu")

    def fails(problem):
        raise RuntimeError("not on this card\nand more")
    assert gpu.measure(problem, False, True, fails, 1) == {"reason": "not on this card"}


def test_useful_work_counts_valid_tokens_only(gpu):
    problem = gpu.make_problem(gpu.TINY, 0.0, "random", "cpu")
    assert problem.useful_flop() == 4 * 64 * math.prod(gpu.TINY.grid) ** 2
    assert (problem.indices == torch.arange(len(problem.sizes))).all()


def test_a_wrong_result_is_no_proof(gpu):
    from pack.kernels import KERNELS
    name = next(spec.name for spec in KERNELS if spec.files)
    row = {"name": name, "ms": 1.0, "relative_l2": 2e-3}
    assert gpu.verdicts([row])[name]["passed"] is True
    assert gpu.verdicts([row, row | {"relative_l2": 0.1}])[name]["passed"] is False
    assert gpu.verdicts([row, row | {"relative_l2": math.inf}])[name]["passed"] is False
