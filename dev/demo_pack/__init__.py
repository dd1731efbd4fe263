"""One node for the demo and the tests: random text conditioning. ComfyUI has no node that makes conditioning
without a text encoder, and no text encoder is small enough to ship."""
import torch
from comfy_api.latest import ComfyExtension, io


class DemoConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DemoConditioning", display_name="Demo Conditioning", category="demo",
            description="Random text embeddings of the given size: the same seed gives the same ones.",
            inputs=[io.Int.Input("tokens", default=7, min=1), io.Int.Input("width", default=64, min=1),
                    io.Int.Input("seed", default=0, min=0)],
            outputs=[io.Conditioning.Output()])

    @classmethod
    def execute(cls, tokens, width, seed):
        gen = torch.Generator().manual_seed(seed)
        return io.NodeOutput([[torch.randn(1, tokens, width, generator=gen),
                               {"pooled_output": torch.randn(1, 768, generator=gen)}]])


class DemoExtension(ComfyExtension):
    async def get_node_list(self):
        return [DemoConditioning]


async def comfy_entrypoint():
    return DemoExtension()
