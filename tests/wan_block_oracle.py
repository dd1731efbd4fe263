"""The forward pass of one block of Wan in float64, straight from the file. Shares no code with the pack or ComfyUI."""
import math

import safetensors.torch
import torch
from torch.nn.functional import gelu

LATENT, GRID = (7, 16, 18), (7, 8, 9)
"""Of the clip: latent cells, and tokens."""
HEADS, DIM, HEAD_DIM, EPS = 2, 256, 128, 1e-6


class Weights:
    """The tensors of one block in float64, straight from the file."""

    def __init__(self, path, block):
        self.state, self.prefix = safetensors.torch.load_file(path), f"blocks.{block}."

    def __getitem__(self, name):
        return self.state[self.prefix + name].double()

    def linear(self, x, name):
        return x @ self[f"{name}.weight"].T + self[f"{name}.bias"]


def normed(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + EPS).sqrt()


def rms_normed(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


def heads_of(x):
    return x.view(*x.shape[:2], HEADS, HEAD_DIM)


def rotated(x):
    """Wan's rotary embedding: of every head's 64 pairs 22 turn with t, 21 with h and 21 with w. x: [B, S, H, D]"""
    out = torch.empty_like(x)
    for place in range(math.prod(GRID)):
        t, h, w = place // (GRID[1] * GRID[2]), place // GRID[2] % GRID[1], place % GRID[2]
        angles = [position * 10000.0 ** (-n / pairs) for position, pairs in ((t, 22), (h, 21), (w, 21))
                  for n in range(pairs)]
        cos, sin = (torch.tensor([f(a) for a in angles], dtype=torch.float64) for f in (math.cos, math.sin))
        even, odd = x[:, place, :, 0::2], x[:, place, :, 1::2]
        out[:, place, :, 0::2], out[:, place, :, 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return out


def block_oracle(weights, x, modulation, context, attend):
    """Wan's block around attend(weights, q, k, v, input of the self-attention) -> [B, S, H, D].

    x: [B, S, C], modulation: [B, 6, C] of the time, context: of the text.
    """
    shift, scale, gain, ffn_shift, ffn_scale, ffn_gain = (weights["modulation"] + modulation).unbind(1)
    h = normed(x) * (1 + scale[:, None]) + shift[:, None]
    q, k = (rotated(heads_of(rms_normed(weights.linear(h, f"self_attn.{n}"), weights[f"self_attn.norm_{n}.weight"])))
            for n in "qk")
    attended = attend(weights, q, k, heads_of(weights.linear(h, "self_attn.v")), h)
    x = x + weights.linear(attended.flatten(2), "self_attn.o") * gain[:, None]
    h = normed(x) * weights["norm3.weight"] + weights["norm3.bias"]
    q = heads_of(rms_normed(weights.linear(h, "cross_attn.q"), weights["cross_attn.norm_q.weight"]))
    k = heads_of(rms_normed(weights.linear(context, "cross_attn.k"), weights["cross_attn.norm_k.weight"]))
    v = heads_of(weights.linear(context, "cross_attn.v"))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(HEAD_DIM)
    x = x + weights.linear(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2), "cross_attn.o")
    h = normed(x) * (1 + ffn_scale[:, None]) + ffn_shift[:, None]
    return x + weights.linear(gelu(weights.linear(h, "ffn.0"), approximate="tanh"), "ffn.2") * ffn_gain[:, None]
