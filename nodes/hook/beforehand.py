"""What is looked at when a node executes, so that a sampling does not find it out in its middle."""
from __future__ import annotations

import logging

import comfy.model_management
import torch

from ... import kernels
from ..families import VideoFamily
from .no_kernel import no_kernel_text
from .settings import Settings
from .status import show_under_node

log = logging.getLogger(__name__)

PROOF_BYTES = 512 << 20
"""Room on the GPU for the problems of a proof."""


def prove_kernels(model, family: VideoFamily, settings: Settings, node_id: str | None) -> str | None:
    """The kernels that `model` (ModelPatcher) will ask for are proven on its card -> why none can run it, or None.

    Raises RuntimeError, with what to do, where the settings insist and none can or there is no room for a proof.
    """
    base = model.model
    # A node that sets the precision to compute in patches the model only when it is loaded.
    dtype = model.object_patches.get("manual_cast_dtype") or getattr(base, "get_dtype_inference", base.get_dtype)()
    call = kernels.Call.on(model.load_device, dtype, family.heads(base.diffusion_model)[1])
    if call.device_type == "cuda":
        comfy.model_management.free_memory(PROOF_BYTES, model.load_device)
    try:
        kernels.prove_kernels(call, settings.backend, lambda text: show_under_node(text, node_id), settings.precision)
    except kernels.NoKernel as error:
        text = no_kernel_text(error, call, settings.backend)
        if settings.insists:
            raise RuntimeError(text) from None
        log.warning("everything will run dense: %s", text)
        return text
    except torch.OutOfMemoryError as error:
        if settings.insists:
            raise RuntimeError("there is no room on the GPU to prove the kernel before its first use: close what "
                               "uses the GPU's memory and run again") from error
        log.warning("no room on the GPU to prove a kernel now: tried again in the sampling")
    return None


def blocks_that_are_not_there(model, family: VideoFamily, settings: Settings) -> list[str]:
    """A sentence where dense_blocks names blocks that the model does not have, else nothing."""
    layers = family.layer(model.model.diffusion_model, {}, None)[1]
    beyond = settings.dense_blocks.beyond(layers) if layers else []
    if not beyond:
        return []
    text = f"dense_blocks {', '.join(beyond)}: this model has blocks 0 to {layers - 1}, so that does nothing"
    log.warning("%s", text)
    return [text]
