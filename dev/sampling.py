"""Sample a video model through ComfyUI's Python API: random conditioning, no text encoder, no VAE.

    from comfy_boot import boot; boot()
    from sampling import Recorder, kind_of, load, sample, with_override
    model = load("tiny_wan_t2v.safetensors")
    latent = sample(with_override(model, Recorder()), kind_of(model), latent_thw=(5, 9, 12), steps=2)
"""
from collections import Counter
from types import SimpleNamespace

# kind: latent channels (None: the model says), default latent T, H, W, default cfg
KINDS = {
    "wan": (None, (5, 9, 12), 4.0),         # odd height: the model pads to its patch size
    "wan_flf": (None, (5, 9, 12), 4.0),     # image tokens of a first and a last frame in the cross-attention
    "wan_camera": (None, (5, 8, 12), 4.0),  # core does not pad this branch, nor the next two
    "wan_vace": (None, (5, 8, 12), 4.0),
    "wan_ref": (None, (5, 8, 12), 4.0),     # one reference frame in front of the video tokens
    "hunyuan": (16, (3, 8, 12), 1.0),       # text mask at cfg 1 and batch 1 only: core cannot batch that mask
    "hunyuan15": (32, (3, 4, 6), 4.0),
    "ltxv": (128, (3, 4, 6), 4.0),
    "kandinsky5": (16, (3, 8, 12), 4.0),
    "cogvideox": (16, (3, 8, 12), 4.0),
    "minimax_h3": (24, (2, 8, 12), 4.0),    # sampled together with an audio latent; batch 1 only
    "minimax_h3_keyframe": (24, (2, 8, 12), 4.0),
    "wan_context": (None, (5, 9, 12), 4.0),     # in-context references behind the clip (Bernini)
    "wan_concat": (None, (5, 9, 12), 4.0),      # reference frames appended in time (Phantom)
    "wan_s2v": (None, (5, 9, 16), 4.0),
    "wan_scail": (None, (5, 9, 12), 4.0),
    "wan_scail2": (None, (5, 9, 12), 4.0),
    "wan_animate": (None, (5, 8, 12), 4.0),
    "wan_animate2": (None, (5, 9, 12), 4.0),    # the first frame is the reference image's
    "wan_animate2_pose": (None, (5, 8, 12), 4.0),
    "wan_humo": (None, (5, 8, 12), 4.0),
    "wan_dancer": (None, (5, 8, 16), 4.0),    # core cuts every frame into eight for the music
    "hunyuan_ref": (16, (3, 8, 12), 1.0),       # batch 1 only: a reference image between the text and the clip
    "ltxv_guide": (128, (5, 4, 6), 4.0),        # the last two latent frames are guides
    "ltxv_sparse_guide": (128, (5, 4, 6), 4.0),     # the same, with every second guide token dropped
    "ltxav": (128, (3, 4, 6), 4.0),             # sampled together with an audio latent
    "mochi": (12, (3, 8, 12), 4.0),
    "cosmos": (16, (3, 8, 12), 4.0),
    "cosmos_predict2": (16, (3, 9, 12), 4.0),
}
# kind: shape of the audio latent that is sampled with the video, without the batch
AUDIO = {"minimax_h3": (32, 2, 8), "minimax_h3_keyframe": (32, 2, 8), "ltxav": (8, 9, 16)}


def load(path):
    import comfy.sd
    return comfy.sd.load_diffusion_model(str(path))


def kind_of(model):
    """The entry of KINDS that fits a loaded ModelPatcher."""
    classes = [c.__name__ for c in type(model.model).__mro__]
    net = model.model.diffusion_model
    if getattr(net, "ref_conv", None) is not None:
        return "wan_ref"
    if getattr(getattr(net, "img_emb", None), "emb_pos", None) is not None:
        return "wan_flf"
    for name, kind in (("WAN21_Vace", "wan_vace"), ("WAN21_Camera", "wan_camera"), ("WAN22_S2V", "wan_s2v"),
                       ("WAN21_SCAIL2", "wan_scail2"), ("WAN21_SCAIL", "wan_scail"), ("WAN22_Animate", "wan_animate"),
                       ("WAN_Animate2", "wan_animate2"), ("WAN21_HuMo", "wan_humo"), ("WAN22_WanDancer", "wan_dancer"),
                       ("WAN21", "wan"), ("HunyuanVideo15", "hunyuan15"), ("HunyuanVideo", "hunyuan"),
                       ("LTXAV", "ltxav"), ("LTXV", "ltxv"), ("Kandinsky5", "kandinsky5"), ("CogVideoX", "cogvideox"),
                       ("MiniMaxH3", "minimax_h3"), ("GenmoMochi", "mochi"), ("CosmosVideo", "cosmos"),
                       ("CosmosPredict2", "cosmos_predict2")):
        if name in classes:
            return kind
    raise ValueError(f"no kind for {classes[0]}: give one of {', '.join(KINDS)}")


def _vision(states):
    return SimpleNamespace(penultimate_hidden_states=states, last_hidden_state=states)


def _prompt_mask(shown, hidden=0):
    import torch
    return torch.tensor([[1] * shown + [0] * hidden])


def _guides(thw, randn, dropped=False):
    """Two guide frames at the end of an LTXV latent, as its guide nodes leave them behind."""
    t, h, w = thw
    mask = randn(1, 1, t, h, w) * 0 + 1
    mask[:, :, -2:] = 0.25
    if dropped:
        mask[:, :, -2:, :, 1::2] = -1.0
    return {"keyframe_idxs": randn(1, 3, 2 * h * w, 2).abs() * 8, "concat_mask": mask, "frame_rate": 25,
            "attention_mask": _prompt_mask(7)}


def _scail(net, thw, randn):
    t, h, w = thw
    even = (h + h % 2, w + w % 2)
    return {"reference_latents": [randn(1, 16, 1, h, w)],
            "pose_video_latent": randn(1, 16, t, even[0] // 2, even[1] // 2)}


def _scail2(net, thw, randn):
    t, h, w = thw
    found = _scail(net, thw, randn)
    pose = found["pose_video_latent"].shape[2:]
    return {**found, "ref_mask_28ch": randn(1, t + 1, 28, h, w), "driving_mask_28ch": randn(1, t, 28, *pose[1:])}


# kind: what the nodes of that model add to a conditioning, from the model, the latent (t, h, w) and random numbers
ADDED = {
    "wan_context": lambda net, thw, randn: {"context_latents": [randn(1, 16, 1, *thw[1:]), randn(1, 16, 2, 5, 8)]},
    "wan_concat": lambda net, thw, randn: {"time_dim_concat": randn(1, 16, 2, *thw[1:])},
    "wan_s2v": lambda net, thw, randn: {
        "reference_latents": [randn(1, 16, 1, *(n + n % 2 for n in thw[1:]))],
        "reference_motion": randn(1, 16, 19, 8 * -(-thw[1] // 8), 8 * -(-thw[2] // 8)),
        "audio_embed": randn(1, 25, 1024, 4 * thw[0])},
    "wan_scail": _scail,
    "wan_scail2": _scail2,
    "wan_animate": lambda net, thw, randn: {"pose_video_latent": randn(1, 16, thw[0] - 1, *thw[1:])},
    "wan_animate2_pose": lambda net, thw, randn: {"pose_video_latent": randn(1, 16, thw[0] - 1, *thw[1:])},
    "wan_humo": lambda net, thw, randn: {"reference_latents": [randn(1, 16, 2, *thw[1:])],
                                         "audio_embed": randn(1, thw[0], 8, 5, 1280)},
    "wan_dancer": lambda net, thw, randn: {
        "audio_embed": randn(1, 12, 35), "clip_vision_output": _vision(randn(1, 9, 1280)),
        "clip_vision_output_ref": _vision(randn(1, 9, 1280)), "fps": 30},
    "hunyuan_ref": lambda net, thw, randn: {"pooled_output": randn(1, 768), "ref_latent": randn(1, 16, 1, *thw[1:])},
    "hunyuan15": lambda net, thw, randn: {"clip_vision_output": _vision(randn(1, 5, 1152)),
                                          "conditioning_byt5small": randn(1, 4, 1472)},
    "ltxv_guide": lambda net, thw, randn: _guides(thw, randn),
    "ltxv_sparse_guide": lambda net, thw, randn: _guides(thw, randn, dropped=True),
    "mochi": lambda net, thw, randn: {"attention_mask": _prompt_mask(5, 2)},
    "minimax_h3_keyframe": lambda net, thw, randn: {
        "minimax_keyframes": [{"latent": randn(1, 24, 1, *(n + n % 2 for n in thw[1:])), "resolved_frame_index": 0}]},
}


def conditioning(model, kind, gen, thw, cfg, batch=1, tokens=7, clip_vision=True):
    """One random conditioning in ComfyUI's form, [[text embedding, extras]]. `clip_vision`: with the image
    tokens that first-last-frame models take from the CLIP vision encoder (they are optional)."""
    import torch
    net, extra = model.model.diffusion_model, {}
    width = 64
    if kind.startswith("wan"):
        width = net.text_dim
    if kind == "wan_ref":
        extra["reference_latents"] = [torch.randn(1, 16, 1, *thw[1:], generator=gen)]
    if kind == "wan_flf" and clip_vision:
        states = torch.randn(1, *net.img_emb.emb_pos.shape[1:], generator=gen)
        extra["clip_vision_output"] = SimpleNamespace(penultimate_hidden_states=states)
    if kind == "wan_camera":
        channels = net.control_adapter.conv.weight.shape[1] // 64
        extra["camera_conditions"] = torch.randn(1, channels, thw[0], thw[1] * 8, thw[2] * 8, generator=gen)
    if kind == "hunyuan":
        extra["pooled_output"] = torch.randn(1, 768, generator=gen)
        if cfg == 1.0 and batch == 1:
            extra["attention_mask"] = torch.tensor([[1] * (tokens - 2) + [0] * 2])
    if kind == "hunyuan15":
        extra["pooled_output"] = None
    if kind == "ltxv":
        extra.update(attention_mask=torch.ones(1, tokens, dtype=torch.long), frame_rate=25)
    if kind == "kandinsky5":
        width = 3584
        extra["pooled_output"] = torch.randn(1, 768, generator=gen)
    if kind == "ltxav":
        width = 128     # the video's text and the audio's
    if kind in ADDED:
        extra.update(ADDED[kind](net, thw, lambda *shape: torch.randn(*shape, generator=gen)))
    return [[torch.randn(1, tokens, width, generator=gen), extra]]


def sample(model, kind, latent_thw=None, steps=2, cfg=None, seed=0, batch=1, sampler_name="euler",
           scheduler="simple", callback=None, clip_vision=True):
    """What KSampler returns at denoise 1: the video latent (batch, C, T, H, W).

    latent_thw counts latent cells. Everything random comes from `seed`: the same call gives the same tensor.
    Defaults for None are in KINDS. callback(step, denoised, x, total_steps) is called after every step.
    """
    import comfy.sample
    import torch
    channels, default_thw, default_cfg = KINDS[kind]
    thw = tuple(latent_thw or default_thw)
    cfg = default_cfg if cfg is None else cfg
    gen = torch.Generator().manual_seed(seed)
    positive, negative = (conditioning(model, kind, gen, thw, cfg, batch, clip_vision=clip_vision) for _ in range(2))
    latent = torch.zeros(batch, channels or model.model.latent_format.latent_channels, *thw)
    if kind in AUDIO:
        from comfy.nested_tensor import NestedTensor
        latent = NestedTensor((latent, torch.zeros(batch, *AUDIO[kind])))
    with torch.inference_mode():
        latent = comfy.sample.fix_empty_latent_channels(model, latent)
        out = comfy.sample.sample(model, comfy.sample.prepare_noise(latent, seed), steps, cfg, sampler_name, scheduler,
                                  positive, negative, latent, callback=callback, disable_pbar=True, seed=seed)
    return out.unbind()[0] if getattr(out, "is_nested", False) else out


def with_override(model, override):
    """A clone of `model` whose attention goes through override(func, q, k, v, heads, **kwargs)."""
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


class Recorder:
    """An attention override that changes nothing and remembers what it saw."""

    def __init__(self):
        self.shapes = Counter()   # (q shape, k shape, heads, skip_reshape, mask shape) -> calls
        self.rows = []            # (block_type, block_index, sigma, cond_or_uncond, grid_sizes, q shape) per call
        self.option_keys, self.kwarg_keys = set(), set()

    def __call__(self, func, q, k, v, heads, mask=None, *args, **kwargs):   # some models pass mask by position
        options = kwargs.get("transformer_options") or {}
        self.option_keys |= set(options)
        self.kwarg_keys |= set(kwargs)
        self.shapes[tuple(q.shape), tuple(k.shape), heads, kwargs.get("skip_reshape", False),
                    None if mask is None else tuple(mask.shape)] += 1
        sigma = float(options["sigmas"][0]) if "sigmas" in options else None
        self.rows.append((options.get("block_type"), options.get("block_index"), sigma,
                          options.get("cond_or_uncond"), options.get("grid_sizes"), tuple(q.shape)))
        return func(q, k, v, heads, mask, *args, **kwargs)


def without_self_attention(func, q, k, v, *args, **kwargs):
    """An attention override that zeroes self-attention: how far a result moves shows how much it depends on it."""
    out = func(q, k, v, *args, **kwargs)
    return out * 0 if q.shape == k.shape else out
