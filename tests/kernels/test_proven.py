"""A kernel source without a GPU result is left alone by `auto`, says so, and runs when chosen by name."""
from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pack.kernels import KERNELS, Call, NoKernel, choose_kernel, explain_kernels, proven, tile_ops

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
COMPILED = [spec for spec in KERNELS if spec.source is not None]


def call_for(spec, **changes):
    capability = (spec.capabilities or (spec.min_capability,))[0]
    return Call("cuda", capability, torch.bfloat16, 128)


def test_every_kernel_that_is_compiled_for_a_gpu_names_its_source():
    assert {spec.name for spec in COMPILED} == {spec.name for spec in KERNELS} - {"reference"}
    assert all(spec.source.is_file() for spec in COMPILED)


@pytest.mark.parametrize("entry", proven.PROVEN, ids=lambda entry: f"{entry.kernel} {entry.result}")
def test_every_mark_is_backed_by_a_committed_result_of_that_very_source(entry):
    result = json.loads((RESULTS / entry.result).read_text())
    kernel = result["kernels"][entry.kernel]
    assert kernel["source_hash"] == entry.source_hash and kernel["passed"] is True
    assert tuple(result["hardware"]["capability"]) == entry.capability and "dry_run" not in result


def test_a_mark_for_a_source_that_is_no_longer_here_is_removed():
    tables = (*COMPILED, *tile_ops.MEANS_KERNELS, *tile_ops.SELECT_KERNELS)
    current = {(spec.name, proven.source_hash(spec.source)) for spec in tables if spec.source is not None}
    assert [entry for entry in proven.PROVEN if (entry.kernel, entry.source_hash) not in current] == []


@pytest.fixture
def nothing_proven(monkeypatch):
    monkeypatch.setattr(proven, "PROVEN", ())


@pytest.mark.usefixtures("nothing_proven")
@pytest.mark.parametrize("spec", COMPILED, ids=lambda spec: spec.name)
def test_an_unproven_kernel_runs_only_by_name_and_says_how(spec, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    call = call_for(spec)
    assert choose_kernel(call, spec.name) is spec
    assert explain_kernels(call)[spec.name] is None
    reason = explain_kernels(call, auto=True)[spec.name]
    assert reason.startswith(f"unproven: its source {proven.source_hash(spec.source)[:12]} has no GPU result yet")
    assert f'Choose backend "{spec.name}" by name' in reason and "tested against the reference" in reason


@pytest.mark.usefixtures("nothing_proven")
def test_auto_on_a_gpu_without_any_result_runs_nothing_and_lists_every_reason():
    with pytest.raises(NoKernel) as error:
        choose_kernel(Call("cuda", (9, 0), torch.bfloat16, 128))
    for spec in COMPILED:
        assert f"{spec.name}: unproven" in str(error.value) or f"{spec.name}: " in str(error.value)
    assert "reference: slower than dense attention on cuda" in str(error.value)


@pytest.mark.parametrize("spec", COMPILED, ids=lambda spec: spec.name)
def test_a_result_for_this_source_lifts_the_mark_and_one_for_another_does_not(spec, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    right = proven.GpuResult(spec.name, proven.source_hash(spec.source), (9, 0), "result.json")
    for entry, lifted in ((right, True), (right._replace(source_hash="0" * 64), False),
                          (right._replace(kernel="another"), False)):
        monkeypatch.setattr(proven, "PROVEN", (entry,))
        assert (spec.refusal(call_for(spec), auto=True) is None) == lifted


def test_line_endings_do_not_change_a_sources_hash(tmp_path):
    for name, ending in (("unix", b"\n"), ("windows", b"\r\n")):
        (tmp_path / name).write_bytes(ending.join([b"one", b"two", b""]))
    assert proven.source_hash(tmp_path / "unix") == proven.source_hash(tmp_path / "windows")
    (tmp_path / "other").write_bytes(b"one\ntwo \n")
    assert proven.source_hash(tmp_path / "unix") != proven.source_hash(tmp_path / "other")


def test_the_cuda_kernel_wants_exactly_the_gpu_it_is_built_for():
    call = Call("cuda", (10, 0), torch.bfloat16, 128)
    assert explain_kernels(call)["cuda_sm90"] == "GPU is sm_100, needs sm_90"
    assert KERNELS[0].name == "cuda_sm90"
