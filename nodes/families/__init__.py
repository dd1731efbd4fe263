"""Video model families: where the video tokens lie in the sequences that reach the attention hook.

Adding a family is one file and one line here.
"""
from __future__ import annotations

from .abstract import ModelCall, Stack, VideoFamily, unwrapped
from .cogvideox import CogVideoX
from .cosmos import Cosmos
from .hunyuan_video import HunyuanVideo
from .kandinsky5 import Kandinsky5
from .ltx_video import LtxVideo
from .minimax_h3 import MiniMaxH3
from .mochi import Mochi
from .refused import REFUSED, refusal
from .wan import Wan

__all__ = ["FAMILIES", "REFUSED", "ModelCall", "Stack", "VideoFamily", "family_of"]

FAMILIES: tuple[VideoFamily, ...] = (
    Wan(), HunyuanVideo(), LtxVideo(), CogVideoX(), Mochi(), Cosmos(), Kandinsky5(), MiniMaxH3())


def family_of(base_model) -> VideoFamily:
    """The family of a loaded model (ComfyUI's BaseModel).

    Raises ValueError, naming what was found, for a model that makes no video, that is refused or of no known family.
    """
    net = unwrapped(base_model.diffusion_model)
    known = ", ".join(family.name for family in FAMILIES)
    found = f"found {type(base_model).__name__} ({type(net).__name__})"
    latent_format = getattr(base_model, "latent_format", None)
    if getattr(latent_format, "latent_dimensions", 2) != 3:
        raise ValueError(f"{found}, which makes no video from a latent with a time axis: wanted {known}")
    if reason := refusal(net):
        raise ValueError(f"{found}: {reason}. Remove this node from its graph; wanted {known}")
    for family in FAMILIES:
        if family.matches(net):
            return family
    raise ValueError(f"{found}, a video model whose token layout is not known here: wanted {known}. "
                     "Remove this node from its graph, or open an issue that names the model")
