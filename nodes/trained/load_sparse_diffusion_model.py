"""The node "Load Sparse Diffusion Model"."""
from __future__ import annotations

import torch
from comfy_api.latest import io

from ...checkpoints.trained import CHOICES
from ..hook.status import show_under_node
from .model_files import model_names, model_path
from .plain_errors import plain_errors
from .sparse_model import load_sparse_model

# As in ComfyUI's own diffusion model loader.
WEIGHT_DTYPES = {
    "default": {},
    "fp8_e4m3fn": {"dtype": torch.float8_e4m3fn},
    "fp8_e4m3fn_fast": {"dtype": torch.float8_e4m3fn, "fp8_optimizations": True},
    "fp8_e5m2": {"dtype": torch.float8_e5m2},
}


AUTO = "auto"


class SparseDiffusionModelLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SparseDiffusionModelLoader",
            display_name="Load Sparse Diffusion Model",
            category="model/loaders",
            description=(
                "Loads a video model together with what it was trained with: the VSA gates of FastWan, the SLA "
                "projections of TurboWan. Takes a ComfyUI file, or a diffusers folder as it is downloaded, whole or "
                "in shards. Says what the model is and how it wants to be sampled. Loads all other models too."),
            search_aliases=["FastWan", "FastVideo", "TurboWan", "SLA loader", "VSA loader", "diffusers Wan",
                            "UNETLoader"],
            inputs=[
                io.Combo.Input(
                    "model_name", options=model_names(),
                    tooltip="A safetensors file in models/diffusion_models, or a diffusers folder there or in "
                            "models/diffusers. Of a pipeline folder its transformer is loaded."),
                io.Combo.Input(
                    "weight_dtype", options=list(WEIGHT_DTYPES), default="default", optional=True, advanced=True,
                    tooltip="default keeps the weights as they are in the file. fp8 halves the memory of 16-bit "
                            "weights, gates included, at some loss of quality."),
                io.Combo.Input(
                    "trained_as", options=[AUTO, *CHOICES], default=AUTO, optional=True, advanced=True,
                    tooltip="What the model was trained as, where its file does not tell: a few were trained with "
                            "sparse attention and have nothing extra in them, such as Wan2.2-NVFP4-Sparse, or are a "
                            "LoRA that you load behind this node (MiniMax-H3-Turbo-SLA). auto goes by tensors, "
                            "metadata and name."),
            ],
            outputs=[io.Model.Output(), io.String.Output("description")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model_name, weight_dtype="default", trained_as=AUTO) -> io.NodeOutput:
        node_id = getattr(getattr(cls, "hidden", None), "unique_id", None)
        with plain_errors():
            model, description = load_sparse_model(model_path(model_name), dict(WEIGHT_DTYPES[weight_dtype]), node_id,
                                                   None if trained_as == AUTO else trained_as)
        show_under_node(description, node_id)
        return io.NodeOutput(model, description)
