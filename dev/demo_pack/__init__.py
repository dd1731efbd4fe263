"""Nodes for the demo and the tests: random text conditioning, an empty audio latent and a VAE without weights. ComfyUI
has no node that makes these without a text encoder or a VAE, and none of those is small enough to ship."""
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


class WithoutWeights:
    """Shapes of a video VAE: `frames` frames (the first alone) and `pixels` x `pixels` pixels are one latent cell."""

    def __init__(self, channels, frames, pixels):
        self.channels, self.frames, self.pixels = channels, frames, pixels
        self.downscale_index_formula = (frames, pixels, pixels)

    def encode(self, images):
        t, h, w, _ = images.shape
        gen = torch.Generator().manual_seed(0)
        return torch.randn(1, self.channels, (t - 1) // self.frames + 1, h // self.pixels, w // self.pixels,
                           generator=gen)

    def decode(self, latent):
        b, _, t, h, w = latent.shape
        grey = latent.float().mean(1, keepdim=True).clamp(-1, 1) / 2 + 0.5
        size = (t - 1) * self.frames + 1, h * self.pixels, w * self.pixels
        return torch.nn.functional.interpolate(grey, size).movedim(1, -1).expand(b, *size, 3)


class DemoVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DemoVAE", display_name="Demo VAE", category="demo",
            description="Stands for a video VAE: right shapes, no picture.",
            inputs=[io.Int.Input("channels", default=16, min=1), io.Int.Input("frames", default=4, min=1),
                    io.Int.Input("pixels", default=8, min=1)],
            outputs=[io.Vae.Output()])

    @classmethod
    def execute(cls, channels, frames, pixels):
        return io.NodeOutput(WithoutWeights(channels, frames, pixels))


class DemoExtension(ComfyExtension):
    async def get_node_list(self):
        return [DemoConditioning, DemoAudioLatent, DemoVAE]


async def comfy_entrypoint():
    return DemoExtension()
