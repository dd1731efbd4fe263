"""What a kernel's proof holds for: the card, its driver, and the software that compiles and launches."""
from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
from functools import cache
from typing import NamedTuple

import torch

COMPILER_SETTINGS = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_DEFAULT_FP_FUSION", "TRITON_INTERPRET",
                     "PTXAS_OPTIONS")
"""Variables that make Triton build other code of the same text."""


class Machine(NamedTuple):
    """Everything but the kernel itself that a proof depends on, in words."""

    gpu: str
    capability: str
    driver: str
    torch: str
    cuda: str
    triton: str
    settings: str


@cache
def machine_of(device: torch.device) -> Machine:
    """The machine as kernels on `device` see it."""
    settings = " ".join(f"{name}={os.environ[name]}" for name in COMPILER_SETTINGS if os.environ.get(name))
    software = (torch.__version__, str(torch.version.cuda), _version("triton", "triton-windows"), settings)
    if device.type != "cuda":
        return Machine(platform.processor() or platform.machine(), device.type, platform.system(), *software)
    card = torch.cuda.get_device_properties(device)
    return Machine(card.name, f"sm_{card.major}{card.minor}", driver_version(), *software)


def multiprocessors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def driver_version() -> str:
    """The display driver's version, such as 580.95.05; of CUDA's where the driver's library does not tell."""
    try:
        library = ctypes.WinDLL("nvml.dll") if os.name == "nt" else ctypes.CDLL("libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if library.nvmlInit_v2() == 0:
            try:
                if library.nvmlSystemGetDriverVersion(text, len(text)) == 0:
                    return text.value.decode(errors="replace")
            finally:
                library.nvmlShutdown()
    except (OSError, AttributeError):
        pass
    version = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def _version(*names: str) -> str:
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"
