"""The Triton kernel compiles for every card of its table, in processes that are not the interpreter's."""
from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SHARED_KB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_120": 99}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    report = tmp_path_factory.mktemp("aot") / "table.json"
    done = subprocess.run([sys.executable, ROOT / "dev" / "aot.py", "--jobs", "2", "--json", report],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text())


def test_every_card_dtype_and_head_dim_is_compiled_with_and_without_lse(table):
    seen = {(row["arch"], row["D"], row["dtype"], row["lse"]) for row in table}
    assert seen == {(arch, dim, dtype, lse) for arch in SHARED_KB for dim in (64, 128)
                    for dtype in ("bf16", "fp16") for lse in (False, True)}


def test_nothing_spills(table):
    assert [row for row in table if row["spill B"]] == []


def test_shared_memory_fits_every_card(table):
    assert [row for row in table if row["shared KB"] > SHARED_KB[row["arch"]]] == []


def test_every_multiprocessor_holds_two_programs(table):
    assert [row for row in table if row["CTAs"] < 2] == []


def test_products_run_on_tensor_cores(table):
    for row in table:
        assert row["HGMMA" if row["arch"] == "sm_90" else "HMMA"] > 0, row


def test_nothing_that_follows_the_sequence_length_is_compiled_in():
    source = (
        "import aot; aot.load_pack()\n"
        "from pack.kernels.triton.block_sparse import block_sparse_forward as kernel, INTERPRET\n"
        "assert not INTERPRET\n"
        "print({p.name: (p.is_constexpr, p.do_not_specialize) for p in kernel.params})\n")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True,
                          cwd=ROOT / "dev")
    parameters = ast.literal_eval(done.stdout)
    assert {name for name, (constant, _) in parameters.items() if constant} == {"D", "BLOCK", "RETURN_LSE", "INTERPRET"}
    for name in parameters:
        if name.startswith(("stride_i", "stride_c")):
            assert parameters[name][1], f"{name} is specialised: a list of another length would compile again"


def test_a_sequence_length_list_length_or_batch_never_seen_compiles_nothing():
    source = """
import aot
aot.load_pack()
import torch, triton
from triton.backends.compiler import GPUTarget
from pack.kernels.triton import block_sparse

class NoCard:
    def get_current_target(self): return GPUTarget("cuda", 89, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

triton.runtime.driver.set_active(NoCard())
kernel, built = block_sparse.block_sparse_forward, []
launch = kernel.run
kernel.run = lambda *args, warmup, **options: built.append(launch(*args, warmup=True, **options))
for batch, rows, width in ((1, 2, 2), (1, 3, 3), (1, 10, 7), (2, 33, 16), (1, 1, 1)):
    q = torch.zeros(batch, rows * 64, 3, 128, dtype=torch.bfloat16)
    indices = torch.zeros(batch, 3, rows, width, dtype=torch.int32)
    counts, sizes = torch.zeros(batch, 3, rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    block_sparse.run(q, q, q, indices, counts, sizes, 0.1, False)
    stored_otherwise = q.transpose(1, 2).contiguous().transpose(1, 2)
    block_sparse.run(stored_otherwise, q, q, indices[:, :1].expand_as(indices), counts, sizes, 0.1, False)
print(len(built), len(set(map(id, built))))
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=ROOT / "dev")
    assert done.stdout.split() == ["10", "1"], done.stdout + done.stderr
