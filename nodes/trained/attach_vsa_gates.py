"""The node "Attach VSA Gates"."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io

from ..hook.hook import SparseAttentionHook
from ..hook.settings import why_invalid
from .gate_files import with_gates
from .gates import gates_of
from .model_files import gate_file_names, gate_file_path
from .plain_errors import plain_errors

CHOOSE = "(choose the file with the gates)"
"""Offered first, so that no file is taken that nobody has chosen."""


class VSAGatesAttach(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="VSAGatesAttach",
            display_name="Attach VSA Gates",
            category="model/patch",
            description=(
                "Gives a model the VSA gates of a file, for a model that came from another loader: GGUF, ComfyUI's own "
                "loader, a merge. Only the gates are read. Takes the gates of a LoRA too, such as FastH3's."),
            search_aliases=["VSA gates", "to_gate_compress", "FastWan gates", "gate LoRA"],
            inputs=[
                io.Model.Input("model", tooltip="The video model, from any loader, that the gates belong to."),
                io.Combo.Input(
                    "gates", options=[CHOOSE, *gate_file_names()],
                    tooltip="The VSA-trained model's own file or diffusers folder (FastWan, FastH3, ...), or a LoRA "
                            "with gates. Most models have none: they need no gates, and not this node."),
                io.Float.Input(
                    "strength", default=1.0, min=-10.0, max=10.0, step=0.01, optional=True, advanced=True,
                    tooltip="For a LoRA that changes gates the model has already. Use the strength of the LoRA loader. "
                            "Whole gates are always taken whole."),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, gates=None):
        return why_invalid(_path, gates)

    @classmethod
    def execute(cls, model, gates, strength=1.0) -> io.NodeOutput:
        node_id = getattr(getattr(cls, "hidden", None), "unique_id", None)
        with plain_errors():
            clone = with_gates(model, _path(gates), strength, node_id)
        for hook in SparseAttentionHook.of(clone):
            if hasattr(hook.method, "gates"):
                method = replace(hook.method, gates=gates_of(clone))
                clone = SparseAttentionHook.install(clone, method, hook.settings, hook.node_id)
        return io.NodeOutput(clone)


def _path(gates: str) -> Path:
    """The file or folder of a name from the list. Raises ValueError where none is chosen or it is gone."""
    if gates == CHOOSE:
        raise ValueError("no file is chosen: choose the one that holds the VSA gates of this model")
    return gate_file_path(gates)
