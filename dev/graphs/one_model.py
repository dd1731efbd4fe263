"""Graphs with one diffusion model and KSampler: Wan 2.1 and HunyuanVideo 1.5, from text or from an image.

From left to right: models, prompt, sampling, saving; below them, in green, the sparse node and its report.
"""
from __future__ import annotations

from . import parts
from .files import WAN_VAE
from .notes import MOTION, PROMPT, about


def text_to_video(page, family, load_clip, unet, vae, shift, latent, size, name, steps, cfg, fps, method, prefix,
                  text=None, strategy=None, **settings):
    """size: (width, height, length). strategy: the file that the sparse node takes. settings: of the sparse node."""
    clip = load_clip(page)
    model = parts.unet(page, unet)
    shifted = parts.shift(page, model[0], shift)
    decoder = parts.vae(page, vae)
    a = page.group("Step 1 - Load models", (0, 0), [clip, model, shifted, decoder])
    positive, negative = parts.prompts(page, clip[0], PROMPT)
    b = page.group("Step 2 - Prompt", (a.right + 20, 0), [positive, negative])
    empty = page.add(latent, size=(380, 0), width=size[0], height=size[1], length=size[2], batch_size=1)
    page.group("Step 3 - Video size", (b.left, b.bottom + 60), [empty])
    stored = [page.add("LoadSTAStrategy", size=(380, 0), strategy_name=strategy)] if strategy else []
    patched = parts.sparse(page, method, shifted[0], height=parts.VERDICT_SPACE - 152 * len(stored), **settings,
                           **({"strategy": stored[0][0]} if stored else {}))
    samples = parts.sampler(page, patched[0], positive[0], negative[0], empty[0], name, steps, cfg)
    frames = page.add("VAEDecode", size=(320, 0), samples=samples[0], vae=decoder[0])
    c = page.group("Step 4 - Sample", (b.right + 20, 0), [samples, frames])
    d = parts.save(page, 5, (c.right + 20, 0), frames[0], fps, prefix)
    top = max(empty.bottom + 20, d.bottom) + 20
    seen = parts.report(page, samples[0], patched[0], frames[0])
    parts.green(page, (b.left, top), [patched, *stored], text or about(method, parts.tokens(*size)), seen,
                c.right - c.left - 40)
    parts.model_links(page, (a.left, a.bottom + 20), family)


def image_to_video(page, family, load_clip, unet, vae, vision, crop, shift, node, size, name, steps, cfg, fps, prefix):
    """vision: the CLIP vision file. node: what makes conditioning and latent of an image."""
    method = "vsa"
    clip = load_clip(page)
    look = page.add("CLIPVisionLoader", size=(360, 0), clip_name=vision)
    model = parts.unet(page, unet)
    shifted = parts.shift(page, model[0], shift)
    decoder = parts.vae(page, vae)
    a = page.group("Step 1 - Load models", (0, 0), [clip, look, model, shifted, decoder])
    picture = page.add("LoadImage", "Start image", (360, 300), image="example.png")
    seen = page.add("CLIPVisionEncode", size=(380, 0), clip_vision=look[0], image=picture[0], crop=crop)
    page.group("Step 2 - Start image", (0, a.bottom + 20), [picture], [190, seen])
    positive, negative = parts.prompts(page, clip[0], MOTION)
    b = page.group("Step 3 - Prompt", (a.right + 20, 0), [positive, negative])
    order = {"positive": positive[0], "negative": negative[0], "vae": decoder[0]}
    start = page.add(node, size=(340, 0), **order, clip_vision_output=seen[0], start_image=picture[0],
                     width=size[0], height=size[1], length=size[2], batch_size=1)
    b2 = page.group("Step 4 - Video size", (b.right + 20, 480), [start])
    patched = parts.sparse(page, method, shifted[0], width=340)
    samples = parts.sampler(page, patched[0], start[0], start[1], start[2], name, steps, cfg)
    frames = page.add("VAEDecode", size=(320, 0), samples=samples[0], vae=decoder[0])
    c = page.group("Step 5 - Sample", (b2.right + 20, 0), [samples, frames])
    parts.save(page, 6, (c.right + 20, 0), frames[0], fps, prefix, size=(480, 420))
    report = parts.report(page, samples[0], patched[0], frames[0])
    parts.green(page, (b2.left, b2.bottom + 20), [patched], about(method, parts.tokens(*size)), report,
                c.right - c.left - 40)
    parts.model_links(page, (-420, 0), family, size=(360, 620))


def wan_t2v(page, method):
    text_to_video(page, "Wan 2.1", parts.wan_clip, "wan2.1_t2v_1.3B_fp16.safetensors", WAN_VAE, 8.0,
                  "EmptyHunyuanLatentVideo", (832, 480, 81), "uni_pc", 30, 6.0, 16.0, method, f"wan_{method}")


def wan_14b_720p(page):
    size = (1280, 720, 81)
    text_to_video(page, "Wan 2.1", parts.wan_clip, "wan2.1_t2v_14B_fp8_scaled.safetensors", WAN_VAE, 5.0,
                  "EmptyHunyuanLatentVideo", size, "uni_pc", 30, 5.0, 16.0, "vsa", "wan_720p_vsa",
                  about("vsa", parts.tokens(*size), "720p has more than twice the tokens of 480p, and dense attention "
                        "grows with the square of that: here it counts most what is left out."))


def wan_i2v(page):
    image_to_video(page, "Wan 2.1", parts.wan_clip, "wan2.1_i2v_480p_14B_fp8_scaled.safetensors", WAN_VAE,
                   "clip_vision_h.safetensors", "none", 8.0, "WanImageToVideo", (832, 480, 81), "uni_pc", 20, 6.0,
                   16.0, "wan_i2v_vsa")


def hunyuan_clip(page):
    return page.add("DualCLIPLoader", size=(360, 0), clip_name1="qwen_2.5_vl_7b_fp8_scaled.safetensors",
                    clip_name2="byt5_small_glyphxl_fp16.safetensors", type="hunyuan_video_15", device="default")


def hunyuan15_t2v(page, method):
    text_to_video(page, "HunyuanVideo 1.5", hunyuan_clip, "hunyuanvideo1.5_720p_t2v_fp16.safetensors",
                  "hunyuanvideo15_vae_fp16.safetensors", 7.0, "EmptyHunyuanVideo15Latent", (1280, 720, 121), "euler",
                  20, 6.0, 24.0, method, f"hunyuan15_{method}")


def hunyuan15_i2v(page):
    image_to_video(page, "HunyuanVideo 1.5", hunyuan_clip, "hunyuanvideo1.5_720p_i2v_fp16.safetensors",
                   "hunyuanvideo15_vae_fp16.safetensors", "sigclip_vision_patch14_384.safetensors", "center", 7.0,
                   "HunyuanVideo15ImageToVideo", (848, 480, 121), "euler", 20, 6.0, 24.0, "hunyuan15_i2v_vsa")
