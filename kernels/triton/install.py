"""Which Triton belongs to which torch, and the sentence that tells a user how to get it. Imports neither."""
from __future__ import annotations

import importlib.metadata
import re
import sys
from functools import cache

OLDEST = (3, 2)
"""The oldest Triton that runs these kernels."""

TRITON_OF_TORCH = {
    (2, 4): (3, 0), (2, 5): (3, 1), (2, 6): (3, 2), (2, 7): (3, 3), (2, 8): (3, 4), (2, 9): (3, 5), (2, 10): (3, 6),
    (2, 11): (3, 6), (2, 12): (3, 7), (2, 13): (3, 7), (2, 14): (3, 8), (2, 15): (3, 9),
}
"""What the metadata of torch's CUDA builds for Linux asks for. Another minor version may not work with that torch."""


def advice(torch_version: str, platform: str = sys.platform, python: str = sys.executable) -> str:
    """What to do where Triton is missing: a command for this very torch, system and interpreter, or why none helps."""
    package = "triton-windows" if platform == "win32" else "triton"
    major, minor = (int(number) for number in re.match(r"(\d+)\.(\d+)", torch_version).groups())
    wanted = TRITON_OF_TORCH.get((major, minor))
    found = f"triton is not installed, and torch {major}.{minor} "
    if platform not in ("linux", "win32"):
        return f"triton is not installed: there is none for this system ({platform})"
    if wanted is None and (major, minor) < min(TRITON_OF_TORCH):
        return f"{found}is too old for one that runs this kernel: install torch 2.6 or newer"
    if wanted is None:
        return f'{found}is newer than this pack. Try the newest: "{python}" -m pip install --upgrade {package}'
    if wanted < OLDEST:
        return f"{found}needs {wanted[0]}.{wanted[1]}, too old for this kernel: install torch 2.6 or newer"
    needed = f"{package}>={wanted[0]}.{wanted[1]},<{wanted[0]}.{wanted[1] + 1}"
    return f'{found}needs {wanted[0]}.{wanted[1]}. Install it with: "{python}" -m pip install "{needed}"'


@cache
def too_old() -> str | None:
    """Why the Triton that is installed cannot run these kernels, or None. One that has no metadata may."""
    for package in ("triton", "triton-windows"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        if tuple(int(number) for number in re.match(r"(\d+)\.(\d+)", version).groups()) < OLDEST:
            return f"{package} {version} is too old, needs {OLDEST[0]}.{OLDEST[1]}: install torch 2.6 or newer"
        return None
    return None
