"""The CUDA kernel compiled once per session, however many tests look at the result."""
from __future__ import annotations

from functools import cache

from pack.kernels.cuda_sm90.loader import BUNDLED_BY, SOURCE, options, source
from pack.kernels.cuda_sm90.nvrtc import Nvrtc

VARIANTS = [(dim, dtype) for dim in (64, 128) for dtype in ("bfloat16", "float16")]


@cache
def with_nvrtc(majors: tuple[int, ...] | None, head_dim: int, dtype: str) -> tuple[bytes, str]:
    """(cubin, log) from the NVRTC of one of these CUDA versions; None: the one that the pack takes here."""
    nvrtc = Nvrtc(majors=majors)
    if majors is None and nvrtc.version() == Nvrtc(majors=BUNDLED_BY).version():
        return with_nvrtc(BUNDLED_BY, head_dim, dtype)
    return nvrtc.compile(source(), SOURCE.name, options(head_dim, dtype))
