"""What would be wrong on a user's card is noticed there: faults in the CUDA kernel's text and in its launch code."""
from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import types
from pathlib import Path

import pytest
import torch

import emulated_sm90
from fake_kernels import CPU
from pack import kernels
from pack.kernels import Call, proof
from pack.kernels.cuda_sm90 import loader
from pack.kernels.problems import ATTENTION_PROBLEMS
from pack.kernels.proof import run_proof
from test_cuda_sm90_ownership import RULES

pytestmark = pytest.mark.skipif(emulated_sm90.unavailable() is not None, reason=str(emulated_sm90.unavailable()))

TEXT = "block_sparse.cu"
FAULTS = {
    "the last key of a cut block is dropped": (
        TEXT, "{size >= 32 ? ~0u : (1u << size) - 1,", "{size >= 32 ? ~0u : (1u << size) / 2 - 1,", 0),
    "a key too many of a cut block is seen": (TEXT, "(1u << (size - 32)) - 1}", "(2u << (size - 32)) - 1}", 0),
    "nothing is masked": (TEXT, "if (there == ~0u) continue;", "continue;", 0),
    "the two halves of a mask change places": (TEXT, "half ? mask.high : mask.low;", "half ? mask.low : mask.high;", 0),
    "an empty list divides by zero": (TEXT, "sum == 0.0f ? 0.0f : 1.0f / sum", "1.0f / sum", 0),
    "what was summed is not rescaled": (TEXT, "o[i] *= decay[i / 2 % 2];", "o[i] *= 1.0f;", 2),
    "the sum of weights is not rescaled": (TEXT, "        total[r] *= decay[r];\n", "", 2),
    "scores may exceed the peak without bound": (TEXT, "LARGEST_RISE = 8,", "LARGEST_RISE = 1 << 20,", 2),
    "the LSE keeps binary logarithms": (TEXT, " * 0.6931471805599453f", "", 0),
    "entries behind the 32nd come from the first 32": (TEXT, "ahead(i + 32);", "ahead(0);", 1),
    "an odd list loses its single block": (TEXT, "    if (count % 2) {\n", "    if (count % 2 && count > 1) {\n", 1),
    "the second block takes the first one's list": (
        TEXT, "same &= list[i * stride_ik] == list[stride_iq + i * stride_ik];", "same &= true;", 7),
    "height and width of the edge change places": (
        TEXT, "h >= inside[1] || w >= inside[2]", "h >= inside[2] || w >= inside[1]", 4),
    "the gate of another head": (TEXT, "row * coarse.gate_row + head * coarse.gate_head", "row * coarse.gate_row", 4),
    "the mean of another tile": (TEXT, "tile * coarse.mean_tile + lane", "block * coarse.mean_tile + lane", 6),
    "the start of another tile": (TEXT, "tile * start.lse_tile", "block * start.lse_tile", 11),
    "the start of the first batch": (TEXT, "start.means + batch * start.mean_batch", "start.means", 10),
    "the start of the first head": (TEXT, "head * start.lse_head", "0 * head", 10),
    "a start counts four times": (TEXT, "total[r] = 0.25f;", "total[r] = 1.0f;", 10),
    "a start is one of binary logarithms": (TEXT, "seen * 1.4426950408889634f / scale", "seen / scale", 10),
    "nothing seen is read": (TEXT, "if (seen == none()) return;", "", 10),
    "every batch starts like the first one": (
        "launch.py", "_start(one(far), one(far_lse), blocks_per_tile)", "_start(far, far_lse, blocks_per_tile)", 11),
    "tokens behind the grid see listed blocks only": (
        TEXT, "bool dense_0 = first >= lists, dense_1 = first + 1 >= lists;",
        "bool dense_0 = first > lists, dense_1 = first + 1 > lists;", 4),
    "another batch's lists": (TEXT, "indices + batch * stride_ib", "indices", 3),
    "the last of an odd number of query blocks is not launched": (
        "launch.py", "-(-query_blocks // 2)", "query_blocks // 2", 3),
    "the grid is read from the start of the sequence": (
        "launch.py", "x.data_ptr() + grid.prefix * x.stride(1) * x.element_size()", "x.data_ptr()", 4),
    "the scale is one of natural logarithms": ("launch.py", "scale * math.log2(math.e)", "scale", 0),
    "every batch takes the first one's lists": (
        "launch.py", "one(indices), one(counts), block_sizes, packed_rows",
        "indices, counts, block_sizes, packed_rows", 7),
    "packed tokens begin one block too late": (
        "launch.py", "token_rows[boxes.blocks * BLOCK:]", "token_rows[boxes.blocks * BLOCK:].roll(1)", 4),
    "blocks of a tile count as tiles": (
        "launch.py", "*coarse.stride()[1:3], coarse.shape[2],\n                  blocks_per_tile)",
        "*coarse.stride()[1:3], coarse.shape[2],\n                  1)", 6),
    "a row of the grid is one token too long": (
        "tensor_map.py", "grid.h * grid.w * row,", "(grid.h * grid.w + 1) * row,", 4),
    "heads are taken for contiguous": (
        "tensor_map.py", "steps = (row, grid.w * row, grid.h * grid.w * row, _bytes(x, 2))",
        "steps = (row, grid.w * row, grid.h * grid.w * row, x.shape[3] * x.element_size())", 7),
    "batches are taken for contiguous": (
        "tensor_map.py", "_bytes(x, 2), _bytes(x, 0))\n    return Layout((PANEL_COLUMNS, slots",
        "_bytes(x, 2), x[0].numel() * size)\n    return Layout((PANEL_COLUMNS, slots", 3),
    "the edge's masks are those of whole boxes": ("boxes.py", "[[part, length % part or part]", "[[part, part]", 4),
    "boxes of a tile are counted the other way round": (
        "boxes.py", "grid.tile, cuts, box)),", "grid.tile, cuts[::-1], box)),", 6),
}
"""What the edit makes of the kernel: (file, found, put in its place, the first problem that notices it)."""
LATER = {"a slot is released while its product runs", "a ring forgets that it has turned",
         "a phase ends before all have read", "scores are read while their product runs"}
"""Rules of the pipeline that only a list of several pairs can break."""


def broken(file: str, found: str, replacement: str, monkeypatch):
    """`run` of the CUDA kernel in the emulator, with one edit."""
    launch, source = importlib.import_module("pack.kernels.cuda_sm90.launch"), loader.source()
    if file == TEXT:
        assert source.count(found) == 1
        source = source.replace(found, replacement)
    else:
        text = Path(loader.__file__).with_name(file).read_text()
        assert text.count(found) == 1, file
        edited = types.ModuleType(f"pack.kernels.cuda_sm90.{file.removesuffix('.py')}")
        exec(compile(text.replace(found, replacement), file, "exec"), edited.__dict__)
        if file == "launch.py":
            launch = edited
        else:
            for name, value in inspect.getmembers(edited):
                if getattr(value, "__module__", None) == edited.__name__ and hasattr(launch, name):
                    monkeypatch.setattr(launch, name, value)
    return lambda *operands, **named: launch.run(
        *operands, **named, loader=emulated_sm90.EmulatedLoader(source=source))


def reason_of(run, call, problem, monkeypatch):
    monkeypatch.setattr(proof, "RUNS", 1)
    monkeypatch.setitem(proof.SETS, "attention", (problem,))
    spec = dataclasses.replace(kernels.KERNELS[0], load=lambda: run, device_types=("cpu",))
    return run_proof(spec, call, CPU).reason


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_proof_notices_when(fault, monkeypatch):
    *edit, index = fault
    reason = reason_of(broken(*edit, monkeypatch), Call.on(CPU, torch.float16, 64), ATTENTION_PROBLEMS[index],
                       monkeypatch)
    assert reason.startswith(tuple(f"{ATTENTION_PROBLEMS[index].shows}: {what}" for what in ("relative L2", "LSE off")))


@pytest.mark.parametrize("rule", RULES)
def test_a_proof_breaks_a_rule_of_the_pipeline_where(rule, monkeypatch):
    found, replacement, _ = RULES[rule]
    reason = reason_of(broken(TEXT, found, replacement, monkeypatch), Call.on(CPU, torch.bfloat16, 64),
                       ATTENTION_PROBLEMS[rule in LATER], monkeypatch)
    assert any(re.search(message, reason) for _, _, message in RULES.values())     # which one, the order of events says


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_a_fault_every_such_problem_is_solved(dtype, monkeypatch):
    for index in {0, 1, *(fault[-1] for fault in FAULTS.values())}:
        run = broken(TEXT, "LARGEST_RISE = 8,", "LARGEST_RISE = 8,", monkeypatch)
        assert reason_of(run, Call.on(CPU, dtype, 64), ATTENTION_PROBLEMS[index], monkeypatch) == ""
