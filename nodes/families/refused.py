"""Models with a video latent that this pack does not serve, and why."""
from __future__ import annotations

from .abstract import built_on

_IMAGES = "it makes images, which have no time axis to cut"

REFUSED: tuple[tuple[str, str, str], ...] = (
    ("CausalWanModel", "wan", "it makes a clip piece by piece, and ComfyUI lets no node change how it attends to the "
                              "pieces before"),
    ("NaDiT", "seedvr", "it looks only at small windows already, and ComfyUI lets no node change that"),
    ("QwenImageTransformer2DModel", "qwen_image", _IMAGES),
    ("JoyImageTransformer3DModel", "joyimage", _IMAGES),
    ("SingleStreamDiT", "krea2", _IMAGES),
    ("Anima", "anima", _IMAGES),
)
"""(class, package below comfy.ldm, the reason as a clause)."""


def refusal(net) -> str | None:
    """Why the diffusion model is not served, None when it is not in the table."""
    return next((reason for name, package, reason in REFUSED if built_on(net, name, package)), None)
