"""The graph for Raylight, another pack that starts a process per GPU: its own loader and sampler, our node between.

Its nodes are recorded here, from its source at c049571 (version 1.5.1), so that drawing needs no Raylight.
"""
from __future__ import annotations

from . import parts
from .files import WAN_VAE
from .notes import PROMPT, VSA
from .page import GREEN

PACK = "raylight"
"""Its name in ComfyUI's registry, by which ComfyUI Manager finds it for whoever lacks it."""


def _int(default, **more):
    return "INT", {"default": default, **more}


NODES = {
    "RayInitializer": (
        [("ray_cluster_address", ("STRING", {"default": "local"})),
         ("ray_cluster_namespace", ("STRING", {"default": "default"})),
         ("GPU", _int(2)), ("ulysses_degree", _int(2)), ("ring_degree", _int(1)), ("cfg_degree", _int(1)),
         ("dp_degree", _int(1)),
         *((name, ("BOOLEAN", {"default": False})) for name in (
             "sync_ulysses", "clear_vram_after_sampling", "FSDP", "FSDP_CPU_OFFLOAD")),
         ("XFuser_attention", (["TORCH_FLASH"], {"default": "TORCH_FLASH"})),
         *((name, ("BOOLEAN", {"default": False})) for name in ("skip_comm_test", "use_mmap"))],
        [("ray_actors_init", "RAY_ACTORS_INIT")]),
    "RayUNETLoader": (
        [("unet_name", ([],)), ("weight_dtype", (["default"],)), ("ray_actors_init", ("RAY_ACTORS_INIT", {})),
         ("lora", ("RAY_LORA", {}))],
        [("ray_actors", "RAY_ACTORS")]),
    "RayModelSamplingSD3": (
        [("ray_actors", ("RAY_ACTORS",)), ("shift", ("FLOAT", {"default": 3.0}))],
        [("ray_actors", "RAY_ACTORS")]),
    "XFuserKSamplerAdvanced": (
        [("add_noise", (["enable", "disable"],)), ("noise_seed", _int(0, control_after_generate=True)),
         ("steps", _int(20)), ("cfg", ("FLOAT", {"default": 8.0})), ("sampler_name", (["euler"],)),
         ("scheduler", (["simple"],)), ("ray_actors", ("RAY_ACTORS", {})), ("positive", ("CONDITIONING",)),
         ("negative", ("CONDITIONING",)), ("latent_image", ("LATENT",)), ("start_at_step", _int(0)),
         ("end_at_step", _int(10000)), ("return_with_leftover_noise", (["disable", "enable"],)),
         ("denoise", ("FLOAT", {"default": 1.0}))],
        [("latent", "LATENT"), ("ray_actors", "RAY_ACTORS")]),
}
"""Node: its inputs and outputs, as `Page` takes them. Lists hold the first choice alone, or the one that is used."""

GPUS = ("**Sparse Attention for Raylight** gives Raylight's workers an exact split of the clip, with sparse attention "
        "on it. [Raylight](https://github.com/komikndr/raylight) has to be installed; with a few cards in one computer "
        "*Multi-GPU Sequence Split* does without it.\n\n"
        "- `GPU` and `ulysses_degree` are the number of your cards, `ring_degree` and `cfg_degree` stay 1.\n"
        "- What each run did stands in the log, a line per worker.\n")
EXPECT = ("**What to expect**: {tokens:,} tokens, of which every card computes its share.\n\n**To compare**, bypass "
          "the sparse node (Ctrl+B) and run again with the same seed: Raylight splits the clip itself, dense.")


def text_to_video(page):
    size = (832, 480, 81)
    workers = page.add("RayInitializer", size=(360, 0))
    model = page.add("RayUNETLoader", size=(360, 0), unet_name="wan2.1_t2v_14B_fp8_scaled.safetensors",
                     ray_actors_init=workers[0])
    shifted = page.add("RayModelSamplingSD3", size=(360, 0), ray_actors=model[0], shift=5.0)
    decoder = parts.vae(page, WAN_VAE)
    clip = parts.wan_clip(page)
    a = page.group("Step 1 - Load models, one in every worker", (0, 0), [workers, model, shifted, decoder, clip])
    positive, negative = parts.prompts(page, clip[0], PROMPT)
    b = page.group("Step 2 - Prompt", (a.right + 20, 0), [positive, negative])
    empty = page.add("EmptyHunyuanLatentVideo", size=(380, 0), width=size[0], height=size[1], length=size[2],
                     batch_size=1)
    page.group("Step 3 - Video size", (b.left, b.bottom + 20), [empty])
    patched = page.add("SparseAttentionForRaylight", size=(380, parts.VERDICT_SPACE + 40), ray_actors=shifted[0],
                       method="VSA", sparsity=0.8, **parts.SETTINGS)
    samples = page.add("XFuserKSamplerAdvanced", size=(320, 0), ray_actors=patched[0], positive=positive[0],
                       negative=negative[0], latent_image=empty[0], noise_seed=1, steps=30, cfg=5.0,
                       sampler_name="uni_pc", scheduler="simple")
    frames = page.add("VAEDecode", size=(320, 0), samples=samples[0], vae=decoder[0])
    c = page.group("Step 4 - Sample", (b.right + 20, 0), [samples, 250, frames])
    d = parts.save(page, 5, (c.right + 20, 0), frames[0], 16.0, "wan_raylight_vsa", size=(560, 360))
    note = page.note("What this does", f"{GPUS}\n{VSA}\n{EXPECT.format(tokens=parts.tokens(*size))}",
                     (d.right - c.left - 40, patched.size[1] - 90))
    page.group("Sparse attention", (b.left, max(empty.bottom + 20, c.bottom, d.bottom) + 20), [patched], [90, note],
               color=GREEN)
    parts.model_links(page, (a.left, a.bottom + 20), "Wan 2.1", size=(360, 420))
