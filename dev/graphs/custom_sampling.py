"""Graphs with SamplerCustomAdvanced: LTX-2 and MiniMax H3 with sound, FastWan, TurboWan.

VAEs are loaded at the top, so that their links run above the middle columns to the decoders.
"""
from __future__ import annotations

from . import parts
from .files import FASTWAN, FASTWAN_FILE, TURBOWAN, UMT5, WAN_VAE
from .notes import MOTION, PROMPT, SOUND, about, hub
from .page import POSITIVE

PASSAGE = 140
"""Space above the guider, for the latent's link to the sampler behind it."""


def sampling(page, step, at, guider, name, sigmas, latent, above=(), below=(), after=None):
    """The group with guider, companions and sampler -> (sampler, group). after: sampler -> the node that follows it."""
    choice = page.add("KSamplerSelect", size=(320, 0), sampler_name=name)
    noise = page.add("RandomNoise", size=(320, 0), noise_seed=1)
    made = page.add("SamplerCustomAdvanced", size=(260, 0), noise=noise[0], guider=guider[0], sampler=choice[0],
                    sigmas=sigmas[0], latent_image=latent)
    return made, page.group(f"Step {step} - Sample", at, [*above, guider, choice, noise, *below, sigmas],
                            [made, *([after(made)] if after else [])])


def finish(page, step, c, method, fps, prefix, samples, patched, decoder, text, left, low, audio=None):
    """Decoding, saving and the green group. audio: page, node -> the node that decodes the sound."""
    frames = page.add("VAEDecode", size=(260, 0), samples=samples[0][samples[1]], vae=decoder)
    sound = [audio(page)] if audio else []
    e = page.group(f"Step {step} - Decode", (c.right + 20, 0), [frames, *sound])
    d = parts.save(page, step + 1, (e.right + 20, 0), frames[0], fps, prefix,
                   **({"audio": sound[0][0]} if sound else {}))
    seen = parts.report(page, patched[1][0], patched[0][0], frames[0])
    parts.green(page, (left, max(low, d.bottom + 20)), [patched[0]], text, seen, e.right - c.left - 40)


def ltx2(page, method, image=False, long=False):
    """LTX-2: video and audio in one sampling; only the video's self-attention runs sparse. long: 20 s, not 5."""
    file, size, fps = "ltx-2-19b-dev-fp8.safetensors", (1280, 768, 497 if long else 121), 25.0
    loader = page.add("CheckpointLoaderSimple", size=(360, 0), ckpt_name=file)
    audio = page.add("LTXVAudioVAELoader", size=(360, 0), ckpt_name=file)
    words = page.add("LTXAVTextEncoderLoader", size=(360, 0), ckpt_name=file, device="default",
                     text_encoder="gemma_3_12B_it_fp4_mixed.safetensors")
    a = page.group("Step 1 - Load models", (0, 0), [loader, audio, words])
    step = 2
    if image:
        picture = page.add("LoadImage", "Start image", (360, 300), image="example.png")
        pressed = page.add("LTXVPreprocess", size=(360, 0), image=picture[0])
        a = page.group("Step 2 - Start image", (0, a.bottom + 20), [picture, pressed])
        step = 3
    positive, negative = parts.prompts(page, words[0], f"{MOTION}, quiet room tone" if image else SOUND)
    b = page.group(f"Step {step} - Prompt", (a.right + 20, 200), [positive, negative])
    video = page.add("EmptyLTXVLatentVideo", size=(380, 0), width=size[0], height=size[1], length=size[2], batch_size=1)
    silent = page.add("LTXVEmptyLatentAudio", size=(380, 0), audio_vae=audio[0], frames_number=size[2], frame_rate=fps,
                      batch_size=1)
    started = [page.add("LTXVImgToVideoInplace", size=(380, 0), vae=loader[2], image=pressed[0], latent=video[0],
                        strength=1.0)] if image else []
    b2 = page.group(f"Step {step + 1} - Video size", (b.left, b.bottom + 20), [video, *started, silent])
    patched = parts.sparse(page, method, loader[0])
    timed = page.add("LTXVConditioning", size=(320, 0), positive=positive[0], negative=negative[0], frame_rate=fps)
    guider = page.add("CFGGuider", size=(320, 0), model=patched[0], positive=timed[0], negative=timed[1], cfg=4.0)
    both = page.add("LTXVConcatAVLatent", size=(320, 0), video_latent=(started or [video])[0][0],
                    audio_latent=silent[0])
    sigmas = page.add("LTXVScheduler", size=(320, 0), latent=both[0], steps=20, max_shift=2.05, base_shift=0.95,
                      stretch=True, terminal=0.1)
    made, c = sampling(page, step + 2, (b.right + 20, 200), guider, "euler", sigmas, both[0], [timed], [both],
                       lambda made: page.add("LTXVSeparateAVLatent", size=(260, 0), av_latent=made[0]))
    parted = page.nodes[-1]
    text = about(method, parts.tokens(*size, per_frame=32, per_step=8),
                 "LTX-2 makes picture and sound together; the sound keeps dense attention."
                 + (" Twenty seconds have four times the tokens of five, and dense attention sixteen times the work: "
                    "the longer the clip, the more there is to gain." if long else ""))
    kind = "i2v_" if image else "long_" if long else ""
    finish(page, step + 3, c, method, fps, f"ltx2_{kind}{method}", (parted, 0), (patched, made),
           loader[2], text, b.left, max(b2.bottom, c.bottom) + 20,
           lambda page: page.add("LTXVAudioVAEDecode", size=(260, 0), samples=parted[1], audio_vae=audio[0]))
    parts.model_links(page, (a.left, a.bottom + 20))


def minimax_h3(page):
    size = (1344, 768, 124)
    frames = (size[2] - 5) // 17 * 5 + 2
    decoder = parts.vae(page, "minimax_h3_video_vae_fp16.safetensors")
    audio = parts.vae(page, "minimax_h3_audio_vae_fp32.safetensors")
    words = page.add("CLIPLoader", size=(360, 0), clip_name="qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors",
                     type="minimax", device="default")
    model = parts.unet(page, "minimax_h3_fl2va_pruned_int8_convrot.safetensors")
    a = page.group("Step 1 - Load models", (0, 0), [decoder, audio, words, model])
    prompt = page.add("MiniMaxH3ImageToVideo", "Prompt", (380, 400), POSITIVE, clip=words[0], vae=decoder[0],
                      prompt=SOUND, width=size[0], height=size[1], length=size[2])
    b = page.group("Step 2 - Prompt and size", (a.right + 20, 180), [prompt])
    patched = parts.sparse(page, "vsa", model[0])
    guider = page.add("BasicGuider", size=(320, 0), model=patched[0], conditioning=prompt[0])
    sigmas = page.add("BasicScheduler", size=(320, 0), model=patched[0], scheduler="simple", steps=20, denoise=1.0)
    made, c = sampling(page, 3, (b.right + 20, 180), guider, "res_multistep", sigmas, prompt[1], [PASSAGE])
    text = about("vsa", frames * parts.tokens(*size[:2], 1, per_frame=32),
                 "MiniMax H3 makes picture and sound together. Text, sound and reference tokens keep exact attention. "
                 "For image to video connect an image to `first_frame`.")
    finish(page, 4, c, "vsa", 24.0, "minimax_h3_vsa", (made, 0), (patched, made), decoder[0], text, b.left,
           max(b.bottom, c.bottom) + 20,
           lambda page: page.add("VAEDecodeAudio", size=(260, 0), samples=made[0], vae=audio[0]))
    parts.model_links(page, (a.left, a.bottom + 20), "MiniMax H3")


FASTWAN_TEXT = (
    "**FastWan** is Wan 2.1 distilled to three steps and trained with Video Sparse Attention. Its gates are part of "
    "the model{}\n\n- `start_percent` 0 and `sparsity` 0.8 are what it was trained with; `auto` takes its 4x4x4 "
    "tiles.\n- Three steps at timesteps 1000, 757 and 522: sampler `lcm`, sigmas 1.0, 0.757, 0.522, 0. No cfg.\n\n"
    "**What to expect**: {:,} tokens. The report says in how many layers the gates were used. Dense, or without "
    "its gates, this model gives noise or blur: there is nothing to compare with.")
FASTWAN_FILES = (
    f"[FastVideo/{FASTWAN}]({hub(f'FastVideo/{FASTWAN}')}) is a diffusers folder. Only its `transformer` is needed:\n\n"
    f"`hf download FastVideo/{FASTWAN} --include \"transformer/*\" --local-dir ComfyUI/models/diffusion_models/"
    f"{FASTWAN}`")


def fastwan(page, attach=False):
    size = (832, 448, 61)
    decoder = parts.vae(page, WAN_VAE)
    words = page.add("CLIPLoader", size=(360, 0), clip_name=UMT5, type="wan", device="default")
    if attach:
        model = parts.unet(page, FASTWAN_FILE)
        gated = [model, page.add("VSAGatesAttach", size=(360, 90), model=model[0], gates=FASTWAN, strength=1.0)]
        means = (": ComfyUI's own loader and those of other packs (fp8, GGUF) leave them out, **Attach VSA Gates** "
                 "adds them again.")
        files = (f"{FASTWAN_FILES}\n\n{FASTWAN_FILE} stands for any file of this model, such as one made by `python -m "
                 "checkpoints.convert` in this pack's folder.")
    else:
        gated = [page.add("SparseDiffusionModelLoader", size=(360, 130), model_name=FASTWAN, weight_dtype="default")]
        means, files = ": the loader keeps them, and the VSA node uses them.", FASTWAN_FILES
    shifted = parts.shift(page, gated[-1][0], 8.0)
    a = page.group("Step 1 - Load models", (0, 0), [decoder, words, *gated, shifted])
    patched, made, low, left, c = few_steps(page, "vsa", a, words, shifted[0], size=size,
                                            title="DMD schedule: 1000, 757, 522", sigmas="1.0, 0.757, 0.522, 0.0")
    finish(page, 5, c, "vsa", 16.0, "fastwan_vsa", (made, 0), (patched, made), decoder[0],
           FASTWAN_TEXT.format(means, parts.tokens(*size)), left, low)
    parts.model_links(page, (0, a.bottom + 20), more=files, size=(360, 520))


def few_steps(page, method, a, words, model, size, title, sigmas):
    """Size, prompt and sampling of a distilled Wan -> (sparse node, sampler, lowest edge, left edge, last group)."""
    prompt = page.add("CLIPTextEncode", "Prompt", (380, 150), POSITIVE, clip=words[0], text=PROMPT)
    empty = page.add("EmptyHunyuanLatentVideo", size=(380, 0), width=size[0], height=size[1],
                     length=size[2], batch_size=1)
    b = page.group("Step 2 - Video size", (a.right + 20, 80), [empty])
    b2 = page.group("Step 3 - Prompt", (b.left, b.bottom + 20), [prompt])
    patched = parts.sparse(page, method, model, start_percent=0.0)
    guider = page.add("BasicGuider", size=(320, 0), model=patched[0], conditioning=prompt[0])
    schedule = page.add("ManualSigmas", title, (320, 0), sigmas=sigmas)
    made, c = sampling(page, 4, (b.right + 20, 80), guider, "lcm", schedule, empty[0], [PASSAGE])
    return patched, made, max(b2.bottom, c.bottom) + 20, b.left, c


TURBOWAN_TEXT = (
    "**TurboWan** is Wan 2.1 distilled to four steps and trained with Sparse-Linear Attention. Its projections are "
    "part of the model: the loader keeps them, and the SLA node uses them.\n\n- `ratio` 0.1 is what it was trained "
    "with, 0.15 looks better. `start_percent` is 0.\n- Four steps at its own sigmas with sampler `lcm`. No cfg, no "
    "shift.\n\n"
    "**What to expect**: {:,} tokens. The report says in how many layers the projections were used. Dense, or without "
    "its projections, this is not the model that was trained: there is nothing to compare with.")
TURBOWAN_FILES = (
    f"[loayrashid/{TURBOWAN}]({hub(f'loayrashid/{TURBOWAN}')}) is a diffusers folder. Only its `transformer` is needed:"
    f"\n\n`hf download loayrashid/{TURBOWAN} --include \"transformer/*\" --local-dir ComfyUI/models/diffusion_models/"
    f"{TURBOWAN}`\n\nThe `.pth` files of TurboDiffusion itself become a file of one piece by "
    "`python -m checkpoints.convert` in this pack's folder.")


def turbowan(page):
    size = (832, 480, 81)
    decoder = parts.vae(page, WAN_VAE)
    words = page.add("CLIPLoader", size=(360, 0), clip_name=UMT5, type="wan", device="default")
    model = page.add("SparseDiffusionModelLoader", size=(360, 130), model_name=TURBOWAN, weight_dtype="default")
    a = page.group("Step 1 - Load models", (0, 0), [decoder, words, model])
    patched, made, low, left, c = few_steps(page, "sla", a, words, model[0], size=size, title="rCM schedule",
                                            sigmas="0.98765, 0.93378, 0.8529, 0.60898, 0.0")
    finish(page, 5, c, "sla", 16.0, "turbowan_sla", (made, 0), (patched, made), decoder[0],
           TURBOWAN_TEXT.format(parts.tokens(*size)), left, low)
    parts.model_links(page, (0, a.bottom + 20), more=TURBOWAN_FILES, size=(360, 520))
