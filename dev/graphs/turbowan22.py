"""TurboWan 2.2 image to video: two models, two steps each, with their projections, a sparse node and a report each."""
from __future__ import annotations

from . import parts
from .files import TURBOWAN22, WAN_VAE
from .notes import MOTION, NEGATIVE, hub
from .page import GREEN
from .two_models import HEIGHT, NOISES

TOP, PASSAGE = 80, 140
"""Height at which the samplers begin, below the links from the VAE; space above them for the latent's link."""
TEXT = (
    "**TurboWan 2.2** is Wan 2.2 I2V distilled to four steps and trained with Sparse-Linear Attention. The projections "
    "are part of both models: the loaders keep them, and the SLA nodes use them.\n\n- `ratio` 0.1 is what they were "
    "trained with, 0.15 looks better. `start_percent` is 0.\n- Four steps at its own sigmas with sampler `lcm`: two on "
    "the model for high noise, down to sigma 0.9, two on the other. No cfg, no shift, no other few-step LoRA.\n\n"
    "**What to expect**: {:,} tokens in either model. The reports say in how many layers the projections were used. "
    "Dense, or without its projections, this is not the model that was trained: there is nothing to compare with.")
FILES = (
    "TurboDiffusion publishes both models as `.pth`, which become safetensors once, by ComfyUI's Python in this pack's "
    "folder:\n\n`hf download {repo} {high}.pth {low}.pth --local-dir .`\n\n`python -m checkpoints.convert {high}.pth "
    "{high}.safetensors`\n\n`python -m checkpoints.convert {low}.pth {low}.safetensors`\n\nThe files named `-quant` "
    "do as well. [{repo}]({url})")


def image_to_video(page):
    size, name = (1280, 720, 81), "TurboDiffusion/TurboWan2.2-I2V-A14B-720P"
    decoder = parts.vae(page, WAN_VAE)
    words = parts.wan_clip(page)
    high, low = (TURBOWAN22.format(noise) for noise in NOISES)
    loaded = [page.add("SparseDiffusionModelLoader", f"Model for {noise} noise", (360, 150),
                       model_name=f"{file}.safetensors", weight_dtype="default")
              for noise, file in zip(NOISES, (high, low), strict=True)]
    a = page.group("Step 1 - Load models", (0, 0), [decoder, words, *loaded])
    picture = page.add("LoadImage", "Start image", (380, 300), image="example.png")
    b = page.group("Step 2 - Start image", (a.right + 20, 2 * TOP), [picture])
    positive, negative = parts.prompts(page, words[0], MOTION, NEGATIVE)
    b2 = page.group("Step 3 - Prompt", (b.left, b.bottom + 20), [positive, negative])
    start = page.add("WanImageToVideo", size=(340, 0), positive=positive[0], negative=negative[0], vae=decoder[0],
                     start_image=picture[0], width=size[0], height=size[1], length=size[2], batch_size=1)
    b3 = page.group("Step 4 - Video size", (b.right + 20, TOP), [start])
    patched = [parts.sparse(page, "sla", model[0], f"SLA, {noise} noise", HEIGHT, 380, start_percent=0.0)
               for model, noise in zip(loaded, NOISES, strict=True)]
    guiders = [page.add("BasicGuider", f"Guider, {noise} noise", (320, 0), model=node[0], conditioning=start[0])
               for node, noise in zip(patched, NOISES, strict=True)]
    choice = page.add("KSamplerSelect", size=(320, 0), sampler_name="lcm")
    noise, quiet = page.add("RandomNoise", size=(320, 0), noise_seed=1), page.add("DisableNoise", size=(320, 0))
    sigmas = page.add("ManualSigmas", "rCM schedule", (320, 0), sigmas="0.99502, 0.93378, 0.8529, 0.60898, 0.0")
    split = page.add("SplitSigmas", "Two steps each", (320, 0), sigmas=sigmas[0], step=2)
    first = page.add("SamplerCustomAdvanced", "Noisy steps", (260, 0), noise=noise[0], guider=guiders[0][0],
                     sampler=choice[0], sigmas=split[0], latent_image=start[2])
    rest = page.add("SamplerCustomAdvanced", "Remaining steps", (260, 0), noise=quiet[0], guider=guiders[1][0],
                    sampler=choice[0], sigmas=split[1], latent_image=first[0])
    c = page.group("Step 5 - Sample", (b3.right + 20, TOP), [PASSAGE, *guiders, choice, noise, quiet, sigmas, split],
                   [first, rest])
    frames = page.add("VAEDecode", size=(260, 0), samples=rest[0], vae=decoder[0])
    e = page.group("Step 6 - Decode", (c.right + 20, 0), [frames])
    parts.save(page, 7, (e.right + 20, 0), frames[0], 16.0, "turbowan22_i2v_sla")
    method, expect = TEXT.format(parts.tokens(*size)).split("\n**What to expect")
    notes = [page.note("What this does", method, (660, 300)),
             page.note("What to expect", "**What to expect" + expect, (660, 300))]
    reports = [parts.report(page, latent[0], node[0], frames[0], f"Report, {noise} noise", (600, HEIGHT))
               for latent, node, noise in zip((first, rest), patched, NOISES, strict=True)]
    # The notes lie below the links from the second sparse node to its guider and to its report.
    page.group("Sparse attention", (b.left, max(b2.bottom, c.bottom) + 20), patched,
               *([HEIGHT + PASSAGE, note] for note in notes), reports, color=GREEN)
    parts.model_links(page, (0, a.bottom + 20), more=FILES.format(repo=name, url=hub(name), high=high, low=low),
                      size=(360, 520))
