"""The node "Attach VSA Gates"."""
from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..hook.hook import SparseAttentionHook
from .gate_files import with_gates
from .gates import gates_of
from .model_files import gate_file_names, gate_file_path


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
                    "gates", options=gate_file_names(),
                    tooltip="The file or diffusers folder that the model was made from, or a LoRA with gate keys."),
                io.Float.Input(
                    "strength", default=1.0, min=-10.0, max=10.0, step=0.01, optional=True, advanced=True,
                    tooltip="For a LoRA that changes gates the model has already. Use the strength of the LoRA loader. "
                            "Whole gates are always taken whole."),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, gates, strength=1.0) -> io.NodeOutput:
        node_id = getattr(getattr(cls, "hidden", None), "unique_id", None)
        clone = with_gates(model, gate_file_path(gates), strength, node_id)
        for hook in SparseAttentionHook.of(clone):
            if hasattr(hook.method, "gates"):
                method = replace(hook.method, gates=gates_of(clone))
                clone = SparseAttentionHook.install(clone, method, hook.settings, hook.node_id)
        return io.NodeOutput(clone)
