"""Sparse attention for ComfyUI's video models. ComfyUI calls `comfy_entrypoint`; nothing is imported before."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import VideoSparseAttentionExtension

    return VideoSparseAttentionExtension()


__all__ = ["comfy_entrypoint", "WEB_DIRECTORY"]
