"""The pack with the oldest torch that it supports, in an environment of its own (dev/setup_oldest.sh)."""
import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYTHON = Path(os.environ.get("OLDEST_VENV") or ROOT / ".cache" / "venv-torch2.4") / "bin" / "python"
TORCH = "2.4.1"


def in_oldest(*arguments, **environment):
    return subprocess.run([PYTHON, *arguments], cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment})


@pytest.fixture(autouse=True)
def oldest():
    if not PYTHON.exists():
        reason = f"no environment with torch {TORCH}: run dev/setup_oldest.sh {PYTHON.parent.parent}"
        if os.environ.get("REQUIRE_OLDEST") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


def test_the_pack_imports_and_every_op_has_its_signature():
    done = in_oldest("-c", """
import sys; sys.path[:0] = ["tests"]
import conftest, torch
from pack import kernels, vsa_core
assert torch.__version__.startswith(sys.argv[1]), torch.__version__
for name in ("block_sparse_attention", "tile_means", "select_tiles"):
    print(getattr(torch.ops.video_sparse_attention, name).default._schema)
print(*kernels.backend_list(kernels.Call.on(torch.device("cpu"), torch.float32, 64)), sep="\\n")
""", TORCH)
    assert done.returncode == 0, done.stderr
    *schemas, cuda, triton, reference = done.stdout.splitlines()
    assert len(schemas) == 3 and all(line.startswith("video_sparse_attention::") for line in schemas)
    assert cuda.startswith("cuda_sm90: your CPU cannot run it") and triton.startswith("triton: ")
    assert reference == "reference: can run"


def test_the_cpu_path_gives_the_oracles_results_there():
    """The tests of the mathematics, of the reference kernel and of proofs themselves, under that torch."""
    files = [f"tests/kernels/test_{name}.py" for name in ("kernel_contract", "kernel_choice")]
    files += [f"tests/vsa_core/test_{name}.py" for name in ("layer", "layout", "operands", "selector")]
    done = in_oldest("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not host", *files,
                     OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 150, done.stdout[-300:]
