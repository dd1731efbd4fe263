"""Nodes for the demo and the tests: random text conditioning and an empty audio latent. ComfyUI has no node that
makes these without a text encoder or an audio VAE, and none of those is small enough to ship."""
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


class DemoAudioLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DemoAudioLatent", display_name="Demo Audio Latent", category="demo",
            description="An empty audio latent for LTX-2.",
            inputs=[io.Int.Input("frames", default=17, min=1)], outputs=[io.Latent.Output()])

    @classmethod
    def execute(cls, frames):
        return io.NodeOutput({"samples": torch.zeros(1, 8, frames, 16), "type": "audio"})


class DemoExtension(ComfyExtension):
    async def get_node_list(self):
        return [DemoConditioning, DemoAudioLatent]


async def comfy_entrypoint():
    return DemoExtension()
