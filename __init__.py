"""Sparse attention for ComfyUI's video models. ComfyUI calls `comfy_entrypoint`; nothing is imported before."""

WEB_DIRECTORY = "./web"
MINIMUM_COMFYUI = "0.16.3"
"""The oldest ComfyUI in which the tests run; before 0.14 HunyuanVideo had its tokens in another order."""


async def comfy_entrypoint():
    """The pack's nodes. Raises RuntimeError or ImportError, which ComfyUI logs as one line before it goes on without
    the pack: where ComfyUI is older than the minimum, and where a package is missing."""
    import re

    from comfyui_version import __version__ as found

    def numbers(version):
        return [int(number) for number in re.findall(r"(?:^|\.)(\d+)", version)]

    if numbers(found) < numbers(MINIMUM_COMFYUI):
        raise RuntimeError(f"Video Sparse Attention: found ComfyUI {found}, wanted {MINIMUM_COMFYUI} or newer. "
                           "Update ComfyUI, or remove the pack")
    try:
        from .nodes import VideoSparseAttentionExtension
    except ImportError as error:
        raise ImportError(f"Video Sparse Attention: {error}. Install the pack's requirements.txt into ComfyUI's "
                          f"Python; if that is done, this ComfyUI ({found}) lacks something that the pack needs") \
            from error

    return VideoSparseAttentionExtension()


__all__ = ["comfy_entrypoint", "WEB_DIRECTORY"]
