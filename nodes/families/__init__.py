"""Video model families: where the video tokens lie in the sequences that reach the attention hook.

Adding a family is one file and one line here.
"""
from __future__ import annotations

from .abstract import ModelCall, VideoFamily
from .wan import Wan

__all__ = ["FAMILIES", "ModelCall", "VideoFamily", "family_of"]

FAMILIES: tuple[VideoFamily, ...] = (Wan(),)


def family_of(base_model) -> VideoFamily:
    """The family of a loaded model (ComfyUI's BaseModel).

    Raises ValueError, naming what was found, for a model that is no video model or of no known family.
    """
    net = base_model.diffusion_model
    for family in FAMILIES:
        if family.matches(net):
            return family
    known = ", ".join(family.name for family in FAMILIES)
    found = f"{type(base_model).__name__} ({type(net).__name__})"
    latent_format = getattr(base_model, "latent_format", None)
    if getattr(latent_format, "latent_dimensions", 2) != 3:
        raise ValueError(f"found {found}, which makes no video: wanted a video model ({known})")
    raise ValueError(f"found {found}, a video model whose token layout is not known here: wanted {known}. "
                     "Remove this node from its graph, or open an issue that names the model")
