"""What a test runs in place of a proving process: the same, with a table of fake kernels."""
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
import conftest  # noqa: E402, F401  makes `pack` importable
import fake_kernels  # noqa: E402
from pack.kernels import prove  # noqa: E402

prove.KERNELS = fake_kernels.APART
prove.child(sys.argv[1])
