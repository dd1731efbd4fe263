"""Nodes for the demo and the tests: prompts without a text encoder, an empty audio latent, clips without a VAE. ComfyUI
has no node that makes these without such models, and none of those is small enough to ship."""
import importlib.util
import sys
from pathlib import Path

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


def scenes():
    """quality/scenes.py, which knows what the tiny trained model was taught."""
    path = Path(__file__).resolve().parents[2] / "quality" / "scenes.py"
    spec = importlib.util.spec_from_file_location("demo_pack_scenes", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class DemoScene(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DemoScene", display_name="Demo Scene", category="demo",
            description="A prompt for the tiny trained model: coloured shapes, drawn by the seed.",
            inputs=[io.Int.Input("seed", default=1004, min=0)],
            outputs=[io.Conditioning.Output(display_name="positive"), io.Conditioning.Output(display_name="negative")])

    @classmethod
    def execute(cls, seed):
        made = scenes()
        words = made.words(made.draw_scene(torch.Generator().manual_seed(seed), 8, 32, 32))[None]
        return io.NodeOutput([[words, {}]], [[torch.zeros_like(words), {}]])


class DemoDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="DemoDecode", display_name="Demo Decode", category="demo",
            description="The clip that ComfyUI's preview shows of a Wan latent, every latent pixel as a square.",
            inputs=[io.Latent.Input("samples"), io.Int.Input("pixels", default=6, min=1)],
            outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, samples, pixels):
        from comfy.latent_formats import Wan21
        rgb = scenes().to_rgb(Wan21().process_in(samples["samples"].float()))[0]
        images = ((rgb + 1) / 2).clamp(0, 1).permute(1, 2, 3, 0)
        return io.NodeOutput(images.repeat_interleave(pixels, 1).repeat_interleave(pixels, 2))


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
        return [DemoConditioning, DemoScene, DemoDecode, DemoAudioLatent, DemoVAE]


async def comfy_entrypoint():
    return DemoExtension()
