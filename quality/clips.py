"""Clips of the tiny models, sampled by ComfyUI itself: with its own attention, or through the pack's nodes."""
from __future__ import annotations

import fcntl
import functools
from pathlib import Path

import torch

from . import model_file, scenes

KEPT = Path(__file__).parents[1] / ".cache" / "quality"


def load(name):
    """A tiny model as ComfyUI's loaders give it, with its shift."""
    import comfy.sd
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3
    path = model_file.FILES[name]
    if not path.exists():
        raise SystemExit(f"{path} is not there: run `make train-tiny`")
    model = comfy.sd.load_diffusion_model(str(path))
    return ModelSamplingSD3().patch(model, model_file.sampling_of(path)["shift"])[0]


def sample(model, seed, name="dense", noise=None):
    """The latent of one clip in the space that the model sees, [16, T, H, W].   noise: its seed, if not the prompt's"""
    import comfy.sample
    told = model_file.sampling_of(model_file.FILES[name])
    words = scenes.words(model_file.scene_of(seed))[None]
    latent, noise = torch.zeros(1, *told["latent"]), seed if noise is None else noise
    with torch.inference_mode():
        out = comfy.sample.sample(
            model, comfy.sample.prepare_noise(latent, noise), told["steps"], told["cfg"], told["sampler"],
            told["scheduler"], [[words, {}]], [[torch.zeros_like(words), {}]], latent, disable_pbar=True, seed=seed)
    return model.model.latent_format.process_in(out)[0]


def sparse(model, seed, name="dense", **widgets):
    """The latent of one clip through the VSA node, and the share of all pairs that its sparse calls computed."""
    from pack.nodes.hook.hook import SparseAttentionHook
    from pack.nodes.methods.video_sparse_attention import VideoSparseAttentionPatch
    patched = VideoSparseAttentionPatch.execute(model, backend="reference", min_tokens=0, strict=True, **widgets)[0]
    latent = sample(patched, seed, name)
    run = SparseAttentionHook.of(patched)[-1].last_run
    asked = ("start_percent", "the strategy keeps everything", "nothing would be left out",
             "so noisy a step keeps everything")
    dense = {why: n for why, n in run.dense.items() if not any(words in why for words in asked)}
    if dense or not run.sparse_steps:
        raise RuntimeError(f"wanted every call after the dense steps sparse, found dense ones: {dense or run.dense}")
    dense = run.dense.total()
    return latent, {"density": run.density, "sparse_steps": len(run.sparse_steps),
                    "work": (run.density * run.sparse_calls + dense) / (run.sparse_calls + dense)}


@functools.lru_cache
def calibrated(model, seed, work, parts):
    """Budgets that compute so much of dense attention, as Calibrate Sparse Attention makes them, on a clip of its own.

    What it measures is kept in .cache/quality, so that only the first process that needs it samples.
    """
    import folder_paths

    from pack.nodes.strategies.calibrate import WORK, SparseAttentionCalibrate
    from pack.nodes.strategies.strategy_files import register_folders
    told = model_file.sampling_of(model_file.FILES["dense"])
    words = scenes.words(model_file.scene_of(seed))[None]
    folder_paths.set_output_directory(str(KEPT))
    register_folders()
    KEPT.mkdir(parents=True, exist_ok=True)
    with torch.inference_mode(), open(KEPT / "calibrating", "w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        return SparseAttentionCalibrate.execute(
            model, [[words, {}]], [[torch.zeros_like(words), {}]], {"samples": torch.zeros(1, *told["latent"])}, seed,
            told["steps"], told["cfg"], told["sampler"], told["scheduler"], measured_steps=parts, goal=WORK,
            at_most=work, check=False, tile_size="4x4x4", backend="reference", far_field="on",
            shares="0.03125 0.0625 0.125 0.1875 0.25 0.375 0.5 0.75")[0]


def rounded(func, q, k, v, *args, **kwargs):
    """An attention override: dense attention of operands that were rounded to bfloat16, as on most cards."""
    out = func(*(x.bfloat16().to(x.dtype) for x in (q, k, v)), *args, **kwargs)
    return out.bfloat16().to(out.dtype)
