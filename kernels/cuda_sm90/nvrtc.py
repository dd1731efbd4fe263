"""CUDA text to cubin with torch's own NVRTC, in this process through ctypes: no nvcc, no headers, no subprocess."""
from __future__ import annotations

import ctypes
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import torch


class NvrtcError(RuntimeError):
    """There is no NVRTC, or it refused the source; the message says which and why."""


class Nvrtc:
    """libnvrtc of one of these CUDA versions, the first that opens. Raises NvrtcError when none does."""

    def __init__(self, library=None, majors: tuple[int, ...] | None = None):
        self._library = library if library is not None else _open(majors or _majors())

    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def compile(self, source: str, name: str, options: list[str]) -> tuple[bytes, str]:
        """(cubin, log). Raises NvrtcError with the first error of the log, or with what makes the code a slow one."""
        options = [*options, "--ptxas-options=-v"]
        program = ctypes.c_void_p()
        self._check("nvrtcCreateProgram", ctypes.byref(program), source.encode(), name.encode(), 0, None, None)
        try:
            values = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            code = self._library.nvrtcCompileProgram(program, len(options), values)
            log = self._bytes(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
            if code:
                errors = [line.strip() for line in log.splitlines() if "error" in line] or [f"error {code}"]
                raise NvrtcError(f"NVRTC {self.version()} refused the source: {errors[0]}")
            if reason := why_slow(log):
                raise NvrtcError(f"NVRTC {self.version()} made slow code of it: {reason}")
            return self._bytes(program, "CUBIN"), log
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, program, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        content = ctypes.create_string_buffer(max(size.value, 1))
        self._check(f"nvrtcGet{what}", program, content)
        return content.raw[:size.value]

    def _check(self, name: str, *arguments) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise NvrtcError(f"{name} failed with error {code}")


def why_slow(log: str) -> str | None:
    """What ptxas says of code that has lost its speed: spilled registers, serialised products. None for good code."""
    if serialised := re.search(r".*\bC75\d\d\b.*", log):
        return serialised[0].strip()
    spilled = max((int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)), default=0)
    return f"{spilled} bytes of registers are spilled" if spilled else None


def _majors() -> tuple[int, ...]:
    """Versions of CUDA, torch's own first."""
    own = int((torch.version.cuda or "12").split(".")[0])
    return own, *(major for major in (13, 12) if major != own)


def candidates(majors: tuple[int, ...]) -> Iterator[str]:
    """Where libnvrtc of these CUDA versions may be: paths that exist, then bare names."""
    roots = [Path(torch.__file__).parent / "lib"]
    for packages in dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib")):
        roots += [Path(packages, "nvidia", "cuda_nvrtc", part) for part in ("lib", "bin")]
        roots += [Path(packages, "nvidia", f"cu{major}", part)
                  for major in majors for part in ("lib", "bin", "bin/x86_64")]
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            roots += [Path(os.environ[variable], part) for part in ("lib64", "lib", "bin", "bin/x64")]
    names = [name for major in majors for name in _names(major)]
    for name in names:
        yield from (str(root / name) for root in roots if (root / name).is_file())
    yield from names


def _names(major: int) -> list[str]:
    if os.name == "nt":
        return [f"nvrtc64_{major}0_0.dll"]
    return [f"libnvrtc.so.{major}"]


def _open(majors):
    for path in candidates(majors):
        try:
            _open_builtins(Path(path))
            return ctypes.CDLL(path)
        except OSError:
            continue
    names = " or ".join(name for major in sorted(majors) for name in _names(major))
    raise NvrtcError(f"no {names} beside torch, in its nvidia packages or on the library path "
                     "(pip install nvidia-cuda-nvrtc-cu12)")


def _open_builtins(library: Path) -> None:
    """NVRTC opens its builtins by their bare name. CUDA 13's does not look beside itself, but finds what is open."""
    for beside in (*library.parent.glob("libnvrtc-builtins.so.*"), *library.parent.glob("nvrtc-builtins64_*.dll")):
        try:
            ctypes.CDLL(str(beside))
        except OSError:                                    # then NVRTC says what it misses when it compiles
            pass
