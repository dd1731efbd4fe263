"""Wan 2.2 14B: one model for the noisy steps, one for the rest, a sparse node and a report for each."""
from __future__ import annotations

from . import parts
from .files import WAN_VAE
from .notes import MOTION, NEGATIVE, PROMPT, about
from .page import GREEN

NOISES = ("high", "low")
HEIGHT, WIDTH = 390, 720
"""Height of a sparse node, size of a report: two of each stand above one another."""
BOTH = "Wan 2.2 has two models, for noisy steps and for the rest. Each has a sparse node and a report of its own."
LORA = "The LoRAs need four steps and cfg 1. Without them take the graph *{}*, which has 20 steps."


def models(page, task, fast):
    """(nodes in order, [the model to sample with, for either noise], VAE)."""
    column, ready = [parts.wan_clip(page)], []
    for noise in NOISES:
        node = parts.unet(page, f"wan2.2_{task}_{noise}_noise_14B_fp8_scaled.safetensors", f"Model for {noise} noise")
        column.append(node)
        if fast:
            version = {"t2v": "v1.1", "i2v": "v1"}[task]
            node = page.add("LoraLoaderModelOnly", f"4 steps, {noise} noise", (360, 0), model=node[0],
                            lora_name=f"wan2.2_{task}_lightx2v_4steps_lora_{version}_{noise}_noise.safetensors",
                            strength_model=1.0)
            column.append(node)
        node = parts.shift(page, node[0], 5.0 if fast else 8.0)
        column.append(node)
        ready.append(node[0])
    return column, ready, parts.vae(page, WAN_VAE)


def samplers(page, patched, positive, negative, latent, fast):
    """The two KSamplerAdvanced: the second goes on where the first leaves off."""
    steps, cfg = (4, 1.0) if fast else (20, 3.5)
    shared = {"positive": positive, "negative": negative, "noise_seed": 1, "steps": steps, "cfg": cfg,
              "sampler_name": "euler", "scheduler": "simple"}
    first = page.add("KSamplerAdvanced", "Noisy steps", (320, 0), model=patched[0][0], latent_image=latent, **shared,
                     add_noise="enable", start_at_step=0, end_at_step=steps // 2, return_with_leftover_noise="enable")
    rest = page.add("KSamplerAdvanced", "Remaining steps", (320, 0), model=patched[1][0], latent_image=first[0],
                    **shared, add_noise="disable", start_at_step=steps // 2, end_at_step=10000,
                    return_with_leftover_noise="disable")
    return first, rest


def green(page, at, patched, latents, frames, width, size):
    """Both sparse nodes, two notes, both reports. Notes leave room for the links from node to report."""
    text = about("vsa", parts.tokens(*size), each=" in either model")
    method, expect = text.split("\n**What to expect")
    notes = [page.note("What this does", method, (width, HEIGHT - 90)),
             page.note("What to expect", "**What to expect" + expect, (width, HEIGHT - 90))]
    reports = [parts.report(page, latent[0], node[0], frames[0], f"Report, {noise} noise", (WIDTH, HEIGHT))
               for latent, node, noise in zip(latents, patched, NOISES, strict=True)]
    return page.group("Sparse attention", at, list(patched), [90, notes[0], 90, notes[1]], reports, color=GREEN)


def finish(page, step, left, patched, conditioning, latent, decoder, size, fast, prefix):
    """The groups for sampling and saving -> (nodes that the report needs, the sampling group)."""
    latents = samplers(page, patched, *conditioning, latent, fast)
    frames = page.add("VAEDecode", size=(320, 0), samples=latents[1][0], vae=decoder[0])
    c = page.group(f"Step {step} - Sample", (left, 0), [*latents, frames])
    parts.save(page, step + 1, (c.right + 20, 0), frames[0], 16.0, prefix, size=(WIDTH, c.bottom - 290))
    return latents, frames, c


def patches(page, ready, width):
    return [parts.sparse(page, "vsa", model, f"VSA, {noise} noise", HEIGHT, width)
            for model, noise in zip(ready, NOISES, strict=True)]


def model_links(page, fast, slow_name):
    more = f"{BOTH}\n\n{LORA.format(slow_name)}" if fast else BOTH
    parts.model_links(page, (-420, 0), "Wan 2.2", more, (360, 760))


def text_to_video(page, fast):
    size = (832, 480, 81)
    column, ready, decoder = models(page, "t2v", fast)
    a = page.group("Step 1 - Load models", (0, 0), [*column, decoder])
    positive, negative = parts.prompts(page, column[0][0], PROMPT, NEGATIVE)
    b = page.group("Step 2 - Prompt", (a.right + 20, 0), [positive, negative])
    empty = page.add("EmptyHunyuanLatentVideo", size=(380, 0), width=size[0], height=size[1], length=size[2],
                     batch_size=1)
    page.group("Step 3 - Video size", (b.left, b.bottom + 20), [empty])
    patched = patches(page, ready, 380)
    latents, frames, c = finish(page, 4, b.right + 20, patched, (positive[0], negative[0]), empty[0], decoder, size,
                                fast, f"wan22_t2v_{'4step_' if fast else ''}vsa")
    green(page, (b.left, max(a.bottom, c.bottom) + 20), patched, latents, frames, c.right - c.left - 40, size)
    model_links(page, fast, "wan22_t2v_14b_vsa")


def image_to_video(page, fast):
    size = (832, 480, 81)
    column, ready, decoder = models(page, "i2v", fast)
    a = page.group("Step 1 - Load models", (0, 0), [*column, decoder])
    picture = page.add("LoadImage", "Start image", (360, 300), image="example.png")
    page.group("Step 2 - Start image", (0, a.bottom + 20), [picture])
    positive, negative = parts.prompts(page, column[0][0], MOTION, NEGATIVE)
    b = page.group("Step 3 - Prompt", (a.right + 20, 0), [positive, negative])
    start = page.add("WanImageToVideo", size=(340, 0), positive=positive[0], negative=negative[0], vae=decoder[0],
                     start_image=picture[0], width=size[0], height=size[1], length=size[2], batch_size=1)
    b2 = page.group("Step 4 - Video size", (b.right + 20, 420), [start])
    patched = patches(page, ready, 340)
    latents, frames, c = finish(page, 5, b2.right + 20, patched, (start[0], start[1]), start[2], decoder, size, fast,
                                f"wan22_i2v_{'4step_' if fast else ''}vsa")
    green(page, (b2.left, c.bottom + 20), patched, latents, frames, c.right - c.left - 40, size)
    model_links(page, fast, "wan22_i2v_14b_vsa")
