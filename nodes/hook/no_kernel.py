"""Why nothing can run sparse here, and what the user can do about it in ComfyUI, in one sentence each."""
from __future__ import annotations

from dataclasses import replace

import torch

from ... import kernels
from ...kernels import AUTO, Call, NoKernel
from .settings import Settings

BYPASS = "bypass this node (Ctrl+B)"


def no_kernel_text(error: NoKernel, call: Call, backend: str) -> str:
    """What keeps the kernels from such calls, and what to do. backend: what the node's widget says."""
    reasons = _telling(error.reasons, call)
    return f"{kernels.listed(reasons)}. {_cure(call, backend, reasons)}"


def failure_text(kernel: str, error: Exception, settings: Settings, has_strict: bool = True) -> str:
    """What to say of a kernel that was proven and raised all the same. has_strict: whether the node has that widget."""
    return (f"the kernel {kernel} failed in the middle of the sampling: {words_of(error)}. "
            f"{dense_instead(settings, has_strict)}")


def dense_instead(settings: Settings, has_strict: bool = True) -> str:
    """Which widgets to change so that such calls run dense in place of an error."""
    changes = [text for text, wanted in (
        (f"set backend to {AUTO}", settings.backend != AUTO), ("switch strict off", settings.strict and has_strict))
        if wanted]
    if not changes:
        return "ComfyUI's log says more"
    text = f"{' and '.join(changes)} to run such attention calls dense, or {BYPASS}"
    return text[0].upper() + text[1:]


def words_of(error: Exception) -> str:
    """The first line of what an exception says; its name only where it says nothing."""
    return next((line for line in str(error).strip().splitlines() if line), type(error).__name__).rstrip(".")


def _telling(reasons: dict[str, str], call: Call) -> dict[str, str]:
    """The reasons without those that do not help: of a kernel that could run and would only lose to dense attention,
    and of one for a few cards where there is a kernel for more."""
    slow = {spec.name for spec in kernels.KERNELS
            if spec.refusal(call) is None and reasons.get(spec.name) == spec.refusal(call, auto=True)}
    narrow = {spec.name for spec in kernels.KERNELS
              if spec.capabilities and call.capability is not None and call.capability not in spec.capabilities}
    for dull in (slow, narrow):
        reasons = {name: reason for name, reason in reasons.items() if name not in dull} or reasons
    return reasons


def _cure(call: Call, backend: str, reasons: dict[str, str]) -> str:
    if backend != AUTO and None in _others(call, backend):
        return f"Set backend to {AUTO}, or {BYPASS}"
    half = replace(call, dtype=torch.bfloat16)
    if any(reasons.get(spec.name) == spec.refusal(call) is not None and spec.refusal(half, auto=True) is None
           for spec in kernels.KERNELS):
        return ("Start ComfyUI with --bf16-unet, or put the node ModelComputeDtype with bf16 before this one; or "
                f"{BYPASS}")
    if any(spec.missing() in reasons.values() for spec in kernels.KERNELS):
        return f"Then restart ComfyUI; until then {BYPASS}"
    return f"{BYPASS[0].upper()}{BYPASS[1:]}"


def _others(call: Call, backend: str = AUTO) -> list[str | None]:
    """What keeps `auto` from the kernels other than the one that is named, None where nothing does."""
    return [reason for name, reason in kernels.explain_kernels(call, auto=True).items() if name != backend]
