"""Where a forward pass stands: in the whole denoising, of which a part is sampled, and in a compiled graph or not."""
from __future__ import annotations

import math
from collections.abc import Callable

import comfy.model_sampling
import torch
from torch import Tensor

BISECTIONS = 40


def place_in_schedule(sigma: float, sample_sigmas: Tensor | None,
                      percent_to_sigma: Callable[[float], float]) -> tuple[int, int]:
    """(index, number of steps) of a sigma in the whole schedule, of which a sampling may run a part only.

    Start and end steps, denoise below 1 and two samplers in a row sample a part: how much of the denoising it covers
    tells how many steps the whole has. Between two entries the nearer one counts.
    """
    if sample_sigmas is None or len(sample_sigmas) < 2:
        return 0, 1
    sigmas = sample_sigmas.tolist()
    steps = [abs(value - sigma) for value in sigmas[:-1]]
    first, last = (_percent_of(value, percent_to_sigma) for value in (sigmas[0], sigmas[-1]))
    total = len(steps)
    if last > first:
        total = max(total, round(len(steps) / (last - first)))
    before = min(round(first * total), total - len(steps))
    return before + steps.index(min(steps)), total


def _percent_of(sigma: float, percent_to_sigma: Callable[[float], float]) -> float:
    """The part of the denoising that is done at this sigma: the inverse of a model's `percent_to_sigma`."""
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if float(percent_to_sigma(middle)) > sigma:
            low = middle
        else:
            high = middle
    return low


def noise_of_schedule(sample_sigmas: Tensor | None, total: int, model_sampling) -> tuple[float, ...]:
    """How much of the latent is noise at every step of the whole schedule, from 0 to 1.

    Of a schedule that is sampled in part only, the steps are taken as even in time.
    """
    if sample_sigmas is not None and len(sample_sigmas) == total + 1:
        return tuple(noise_share(model_sampling, sigma) for sigma in sample_sigmas.tolist()[:-1])
    return tuple(noise_share(model_sampling, float(model_sampling.percent_to_sigma(step / total)))
                 for step in range(total))


def noise_share(model_sampling, sigma: float) -> float:
    """How much of a latent at a sigma is noise, from 0 to 1: the sigma itself for flow models; elsewhere, where a
    latent is the clip plus sigma times noise, noise's part of the size."""
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        return min(1.0, sigma)
    return sigma / math.hypot(1.0, sigma)


def is_compiled(net: torch.nn.Module, options: dict) -> bool:
    """Whether torch.compile runs this model or a part of it, set on the model or as core's wrapper of a pass."""
    from torch._dynamo.eval_frame import OptimizedModule
    wrappers = options.get("wrappers", {}).get("apply_model", {})
    return (any("compile" in str(key) for key, found in wrappers.items() if found)
            or any(isinstance(module, OptimizedModule) for module in net.modules()))
