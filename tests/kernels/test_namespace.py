"""Two copies of the pack in one process: both go on working, and the log says so."""
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CODE = f"""
import importlib, importlib.util, logging, sys
import torch
logging.basicConfig(stream=sys.stdout, format="%(message)s")

def load(name):
    spec = importlib.util.spec_from_file_location(name, {str(ROOT / "__init__.py")!r},
                                                  submodule_search_locations=[{str(ROOT)!r}])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(name + ".kernels")

def attend(kernels):
    q = torch.randn(1, 64, 1, 64, generator=torch.Generator().manual_seed(0))
    lists = torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.ones(1, 1, 1, dtype=torch.int32)
    rows = torch.arange(64, dtype=torch.int32)
    kernels.tile_means((q,), rows, 1)
    return kernels.block_sparse_attention(q, q, q, *lists, torch.tensor([64], dtype=torch.int32), token_rows=rows)

first = load("first")
wanted = attend(first)
second, third = load("second"), load("third")
for _ in range(3):
    assert all(torch.equal(attend(copy), wanted) for copy in (first, second, third))
print("all right")
"""


def test_a_second_copy_of_the_pack_leaves_the_first_its_operators_and_says_that_there_are_two():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=300)
    said = [line for line in done.stdout.splitlines() if "Video Sparse Attention is loaded" in line]
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "all right", done.stdout + done.stderr
    assert [line.split(" times ")[0][-1] for line in said] == ["2", "3"]
    assert all(str(ROOT) in line and "remove the others" in line for line in said)
