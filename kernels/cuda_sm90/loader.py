"""From CUDA text to a function on a device: bundled cubin, else disk cache, else NVRTC; every skip has its reason."""
from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from ..spec import KernelUnusable
from .cache import Cache, CacheMiss
from .driver import Driver, DriverError
from .nvrtc import Nvrtc, NvrtcError

ARCHITECTURE = "sm_90a"
KERNEL = "block_sparse_forward"
SOURCE = Path(__file__).with_name("block_sparse.cu")
BUNDLED = Path(__file__).with_name("bundled")
"""Cubins that the pack brings along, in files like those of the cache (`make cubins`). May be absent."""
BUNDLED_BY = (12,)
"""CUDA versions whose NVRTC builds them: a newer driver takes what an older CUDA compiled, not the other way round."""


@cache
def source() -> str:
    return SOURCE.read_text(encoding="utf-8")


def options(head_dim: int, dtype: str) -> list[str]:
    """NVRTC's options for one variant. dtype: "bfloat16" or "float16"."""
    return [f"--gpu-architecture={ARCHITECTURE}", "-std=c++17", f"-DHEAD_DIM={head_dim}",
            f"-DHALF={int(dtype == 'float16')}"]


def key(head_dim: int, dtype: str) -> str:
    """The name of a variant's cubin: it changes with the source and with the options, the architecture among them."""
    digest = hashlib.sha256("\0".join([source(), *options(head_dim, dtype)]).encode()).hexdigest()
    return f"{KERNEL}-{ARCHITECTURE}-{head_dim}-{dtype}-{digest[:24]}.cubin"


@cache
def constant(name: str, head_dim: int) -> int:
    """A constant of the source, computed from its own text."""
    names = {"HEAD_DIM": head_dim}
    for found, text in re.findall(r"^    ([A-Z]\w+) = ([^,]+),", source(), re.MULTILINE):
        names[found] = _value(text, names)
    return names[name]


def _value(expression: str, names: dict[str, int]) -> int:
    """Sums, products, quotients and shifts of integers and known names; enough for the source's constants."""
    for symbol, combine in ((" + ", int.__add__), (" << ", int.__lshift__), (" * ", int.__mul__)):
        if symbol in expression:
            left, right = expression.rsplit(symbol, 1)
            return combine(_value(left, names), _value(right, names))
    if " / " in expression:
        left, right = expression.rsplit(" / ", 1)
        return _value(left, names) // _value(right, names)
    word = expression.strip().rstrip("u")
    return int(word) if word.isdigit() else names[word]


class Loader:
    """Loads each variant once per device and remembers what failed. Safe to use from several threads."""

    def __init__(self, driver: Callable[[], Driver] = Driver, nvrtc: Callable[[], Nvrtc] = Nvrtc,
                 disk: Cache | None = None, bundled: Cache | None = None):
        self._open_driver, self._open_nvrtc = driver, nvrtc
        self._disk, self._bundled = disk or Cache(), bundled or Cache(BUNDLED, "none of this source")
        self._driver: Driver | None = None
        self._functions: dict[tuple, object] = {}
        self._failures: dict[tuple, str] = {}
        self._steps: dict[tuple, list[str]] = {}
        self._lock = threading.Lock()

    def driver(self) -> Driver:
        """Raises KernelUnusable without one."""
        if self._driver is None:
            try:
                self._driver = self._open_driver()
            except DriverError as error:
                raise KernelUnusable(str(error)) from None
        return self._driver

    def function(self, device: int, head_dim: int, dtype: str):
        """The kernel on a device, which has a current context afterwards.

        Raises KernelUnusable with the reason of every step.
        """
        try:
            self.driver().make_current(device)
        except DriverError as error:
            raise KernelUnusable(f"no context on cuda:{device}: {error}") from None
        variant = device, head_dim, dtype
        with self._lock:
            if variant in self._failures:
                raise KernelUnusable(self._failures[variant])
            if variant not in self._functions:
                self._steps[variant] = steps = []
                try:
                    self._functions[variant] = self._load(head_dim, dtype, steps)
                except KernelUnusable as error:
                    self._failures[variant] = str(error)
                    raise
            return self._functions[variant]

    def steps(self) -> str:
        """What was tried so far, and why a step was skipped; empty before the first use."""
        return " · ".join(f"head_dim {variant[1]} {variant[2]} on cuda:{variant[0]}: {'; '.join(steps)}"
                          for variant, steps in self._steps.items())

    def _load(self, head_dim: int, dtype: str, steps: list[str]):
        driver = self.driver()
        name = key(head_dim, dtype)
        for origin, cubin in self._cubins(name, head_dim, dtype, steps):
            try:
                function = driver.load(cubin, KERNEL, constant("SHARED_BYTES", head_dim))
            except DriverError as error:
                steps.append(f"{origin}: {error}")
                continue
            steps.append(f"{origin}: loaded")
            if origin == "NVRTC" and (problem := self._disk.write(name, cubin)):
                steps.append(problem)
            return function
        raise KernelUnusable(f"cannot be loaded: {'; '.join(steps)}")

    def _cubins(self, name: str, head_dim: int, dtype: str, steps: list[str]) -> Iterator[tuple[str, bytes]]:
        for origin, shelf in (("bundled cubin", self._bundled), ("disk cache", self._disk)):
            try:
                cubin = shelf.read(name)
            except CacheMiss as miss:
                steps.append(f"{origin}: {miss}")
            else:
                yield origin, cubin
        try:
            yield "NVRTC", self._open_nvrtc().compile(source(), SOURCE.name, options(head_dim, dtype))[0]
        except NvrtcError as error:
            steps.append(f"NVRTC: {error}")


LOADER = Loader()
