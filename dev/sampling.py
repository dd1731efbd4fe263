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
}


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
    for name, kind in (("WAN21_Vace", "wan_vace"), ("WAN21_Camera", "wan_camera"), ("WAN21", "wan"),
                       ("HunyuanVideo15", "hunyuan15"), ("HunyuanVideo", "hunyuan"), ("LTXV", "ltxv"),
                       ("Kandinsky5", "kandinsky5"), ("CogVideoX", "cogvideox"), ("MiniMaxH3", "minimax_h3")):
        if name in classes:
            return kind
    raise ValueError(f"no kind for {classes[0]}: give one of {', '.join(KINDS)}")


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
    if kind == "minimax_h3":
        from comfy.nested_tensor import NestedTensor
        latent = NestedTensor((latent, torch.zeros(batch, 32, 2, 8)))
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
