"""What the example graphs have in common: loaders, prompts, the sparse node with its report, saving."""
from __future__ import annotations

from .files import UMT5
from .notes import NEGATIVE, links
from .page import GREEN, GREY, POSITIVE
from .page import NEGATIVE as RED

SETTINGS = {"backend": "auto", "start_percent": 0.2, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 12288,
            "strict": False, "verbose": False}
METHODS = {
    "vsa": ("VideoSparseAttentionPatch", {"sparsity": 0.8, "tile_size": "auto"}),
    "sla": ("SparseLinearAttentionPatch", {"ratio": 0.15, "query_run": "auto", "feature_map": "auto"}),
    "vmoba": ("VideoMixtureOfBlockAttentionPatch", {"form": "exact", "select": "threshold", "threshold": 0.25}),
    "sta": ("SlidingTileAttentionPatch", {"window": "1.0x0.5x0.5", "tile_size": "auto"}),
}
VERDICT_SPACE = 420
"""Height of a sparse node that leaves room for its verdict under the widgets."""


def tokens(width, height, length, per_frame=16, per_step=4):
    """Tokens of a clip: `per_frame` pixels along a side and `per_step` frames make one."""
    return ((length - 1) // per_step + 1) * -(-height // per_frame) * -(-width // per_frame)


def wan_clip(page):
    return page.add("CLIPLoader", size=(360, 0), clip_name=UMT5, type="wan", device="default")


def unet(page, name, title=None):
    return page.add("UNETLoader", title, size=(360, 0), unet_name=name, weight_dtype="default")


def vae(page, name):
    return page.add("VAELoader", size=(360, 0), vae_name=name)


def shift(page, model, value, title=None):
    return page.add("ModelSamplingSD3", title, size=(360, 0), model=model, shift=value)


def prompts(page, clip, text, negative=NEGATIVE):
    """The positive and the negative prompt."""
    return (page.add("CLIPTextEncode", "Prompt", (380, 150), POSITIVE, clip=clip, text=text),
            page.add("CLIPTextEncode", "Negative prompt", (380, 130), RED, clip=clip, text=negative))


def sparse(page, method, model, title=None, height=VERDICT_SPACE, width=380, **changes):
    kind, own = METHODS[method]
    return page.add(kind, title, (width, height), model=model, **{**own, **SETTINGS, **changes})


def green(page, at, patched, text, seen, width, above=90):
    """The green group: sparse node, note, report. `above`: room over the note for the link between them."""
    note = page.note("What this does", text, (width, seen.size[1] - above))
    return page.group("Sparse attention", at, patched, [above, note], [seen], color=GREEN)


def report(page, latent, model, images, title=None, size=(480, VERDICT_SPACE)):
    return page.add("SparseAttentionReport", title, size, latent=latent, model=model, images=images)


def sampler(page, model, positive, negative, latent, name, steps, cfg):
    return page.add("KSampler", size=(320, 0), model=model, positive=positive, negative=negative, latent_image=latent,
                    seed=1, steps=steps, cfg=cfg, sampler_name=name, scheduler="simple", denoise=1.0)


def save(page, step, at, images, fps, prefix, size=(480, 360), **more):
    """The group that makes a file of the frames."""
    video = page.add("CreateVideo", size=(size[0], 0), images=images, fps=fps, **more)
    return page.group(f"Step {step} - Save the clip", at,
                      [video, page.add("SaveVideo", size=size, video=video[0],
                                       filename_prefix=f"video/{prefix}")])


def model_links(page, at, family=None, more="", size=(360, 520)):
    """The group with the note on files, of all nodes that there are so far."""
    note = page.note("Models and folders", links(page.nodes, family, more), size)
    return page.group("Models", at, [note], color=GREY)
