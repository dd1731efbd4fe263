"""The dense sampling that a search looks into: the sampler's inputs, and what was measured kept on disk."""
from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import folder_paths
import torch
from comfy_api.latest import io

import nodes as host_nodes

from ..families import family_of
from ..hook.hook import SparseAttentionHook
from ..hook.run import Run
from ..hook.settings import read_settings
from .measured import Measured, read_measured, write_measured
from .search_key import search_key
from .strategy_files import FOLDER
from .strategy_measurement import Search

log = logging.getLogger(__name__)


def sampling_inputs(measured_steps: int) -> list:
    """What both searches take first, in the order of `Sampling`.   measured_steps: the default."""
    return [
        io.Model.Input("model", tooltip="As in your sampler: the strategy is measured on this very model, with "
                                        "its LoRAs and sampling shift."),
        io.Conditioning.Input("positive", tooltip="As in your sampler: the prompt that the search samples."),
        io.Conditioning.Input("negative", tooltip="As in your sampler. Unused at cfg 1."),
        io.Latent.Input("latent_image", tooltip="The clip's size. The strategy fits other sizes too."),
        io.Int.Input("seed", default=0, min=0, max=0xffffffffffffffff,
                     control_after_generate=io.ControlAfterGenerate.fixed,
                     tooltip="The noise that the search samples from. Keep it fixed: an interrupted search "
                             "goes on only with the same seed, and a finished one is not done again."),
        io.Int.Input("steps", default=12, min=1, max=1000,
                     tooltip="Steps of the dense sampling that the search looks into."),
        io.Float.Input("cfg", default=5.0, min=0.0, max=100.0, step=0.1,
                       tooltip="As in your sampler: both passes are measured together."),
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler",
                       tooltip="As in your sampler."),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple",
                       tooltip="As in your sampler."),
        io.Int.Input("measured_steps", default=measured_steps, min=1, max=100,
                     tooltip="How many of the steps are measured, spread evenly. Each stands for its part of "
                             "any later schedule. More is finer and takes longer."),
    ]


@dataclass(frozen=True)
class Sampling:
    """What a sampler is given besides the model."""

    positive: Any
    negative: Any
    latent_image: Any
    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str

    def __call__(self, model) -> dict[str, Any]:
        """The LATENT that a whole denoising gives."""
        return host_nodes.common_ksampler(model, self.seed, self.steps, self.cfg, self.sampler_name, self.scheduler,
                                          self.positive, self.negative, self.latent_image, denoise=1.0)[0]


def measure(model, sampling: Sampling, measured_steps: int, key: tuple, backend: str,
            make: Callable[[int, int, str], Search]) -> tuple[Measured, str]:
    """What a search of these inputs measured, now or earlier, and where that is kept.

    key: what the measurements depend on besides.   make(layers, heads, path): the search; what it has measured when it
    is interrupted goes to that path.   Raises ValueError for more measured steps than steps and a model of an unknown
    number of layers.
    """
    if measured_steps > sampling.steps:
        raise ValueError(f"measured_steps {measured_steps} of {sampling.steps} steps: wanted at most as many as steps")
    family, net = family_of(model.model), model.model.diffusion_model
    layers, heads = family.layer(net, {}, 0)[1], family.heads(net)[0]
    if not layers:
        raise ValueError(f"the number of layers of this {family.name} model is not known: a search needs it")
    digest = search_key(model, *(getattr(sampling, name) for name in Sampling.__dataclass_fields__), measured_steps,
                        *key, backend)
    unfinished, path = (os.path.join(folder_paths.get_output_directory(), FOLDER, f"{name}_{digest}.safetensors")
                        for name in ("unfinished", "measured"))
    measured = read_measured(path)
    if measured is not None:
        log.info("[sparse attention] this search was finished before: nothing is sampled")
        return measured, path
    search = make(layers, heads, unfinished)
    settings = read_settings(backend=backend, start_percent=0.0, min_tokens=0, strict=True)
    patched = SparseAttentionHook.install(model, search, settings)
    latent = sampling(patched)["samples"]
    measured = Measured(table_of(search, SparseAttentionHook.of(patched)[-1].last_run),
                        latent=latent if type(latent) is torch.Tensor else None)
    write_measured(path, measured)
    if os.path.exists(unfinished):
        os.remove(unfinished)
    return measured, path


def table_of(search: Search, run: Run):
    """What a search has measured in a run. Raises ValueError where there was nothing to measure, or not all was."""
    if search.table is None:
        seen = (run.other + run.dense).most_common()
        reasons = ", ".join(f"{name} ({count} attention calls)" for name, count in seen)
        raise ValueError(f"no self-attention of the clip was seen, so nothing was measured. Seen instead: {reasons}")
    search.table.require_whole()
    return search.table


def kept_file(measured: Measured, path: str, by: str, write: Callable[[], str]) -> str:
    """The name of the strategy file for what was chosen by `by`: written unless it is there already."""
    if by not in measured.saved or not os.path.exists(os.path.join(os.path.dirname(path), measured.saved[by])):
        measured.saved[by] = write()
        write_measured(path, measured)
    return measured.saved[by]
