"""Gates against float64 answers that share no code with the pack or with ComfyUI."""
import math

import pytest
import safetensors.torch
import torch
from torch.nn.functional import gelu

from oracles import dense_attention_oracle, relative_l2_per_tile, vsa_attention_oracle

LATENT, GRID, TILE, SPARSITY = (7, 16, 18), (7, 8, 9), (4, 4, 4), 0.6
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


def block_oracle(weights, x, modulation, context):
    """Wan's block with VSA in its self-attention: x [B, S, C], modulation [B, 6, C] of the time, text context."""
    shift, scale, gain, ffn_shift, ffn_scale, ffn_gain = (weights["modulation"] + modulation).unbind(1)
    h = normed(x) * (1 + scale[:, None]) + shift[:, None]
    q, k = (rotated(heads_of(rms_normed(weights.linear(h, f"self_attn.{n}"), weights[f"self_attn.norm_{n}.weight"])))
            for n in "qk")
    v, gate = (heads_of(weights.linear(h, name)) for name in ("self_attn.v", "to_gate_compress"))
    attended, *_ = vsa_attention_oracle(q, k, v, gate, GRID, TILE, SPARSITY)
    x = x + weights.linear(attended.flatten(2), "self_attn.o") * gain[:, None]
    h = normed(x) * weights["norm3.weight"] + weights["norm3.bias"]
    q = heads_of(rms_normed(weights.linear(h, "cross_attn.q"), weights["cross_attn.norm_q.weight"]))
    k = heads_of(rms_normed(weights.linear(context, "cross_attn.k"), weights["cross_attn.norm_k.weight"]))
    v = heads_of(weights.linear(context, "cross_attn.v"))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(HEAD_DIM)
    x = x + weights.linear(torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2), "cross_attn.o")
    h = normed(x) * (1 + ffn_scale[:, None]) + ffn_shift[:, None]
    return x + weights.linear(gelu(weights.linear(h, "ffn.0"), approximate="tanh"), "ffn.2") * ffn_gain[:, None]


@pytest.mark.parametrize("block", [0, 1])
def test_a_block_with_random_gates_equals_its_float64_forward(gated, gate_file, vsa, run_of, draw, block):
    patched, seen = vsa(gated, SPARSITY), {}
    net = patched.model.diffusion_model

    def keep(module, args, kwargs, out):
        seen.update(kwargs, x=args[0], out=out, args=args)
    handle = net.blocks[block].register_forward_hook(keep, with_kwargs=True)
    try:
        draw(patched, LATENT, steps=1, cfg=4.0)
    finally:
        handle.remove()
    assert run_of(patched).gated == {0: 1, 1: 1}
    modulation, context = (seen[name].double() if name in seen else seen["args"][at].double()
                           for name, at in (("e", 1), ("context", 3)))
    assert seen["x"].shape == (2, math.prod(GRID), DIM)
    modulation = modulation.view(2, 6, DIM)
    wanted = block_oracle(Weights(gate_file, block), seen["x"].double(), modulation, context)
    found = seen["out"].double()
    moved = wanted - seen["x"].double()
    assert ((found - wanted).norm() / moved.norm()).item() <= 1e-4
    ungated = block_oracle(Ungated(gate_file, block), seen["x"].double(), modulation, context)
    assert ((ungated - wanted).norm() / moved.norm()).item() > 0.01


class Ungated(Weights):
    def __getitem__(self, name):
        return super().__getitem__(name) * (0 if "gate" in name else 1)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_the_gated_call_combines_coarse_and_fine_as_upstream_does(comfyui, dtype, bound):
    """attend() on a call with a gate, batch 2: coarse * gate + fine, the gate being its layer applied to the input."""
    from types import SimpleNamespace

    from pack.nodes.hook.run import Run
    from pack.nodes.methods.video_sparse_attention import VideoSparseMethod
    from pack.nodes.trained.gates import FED, FedGate
    from pack.vsa_core.grid import TokenGrid
    generator = torch.Generator().manual_seed(8)
    tokens = math.prod(GRID)
    q, k, v = torch.randn(3, 2, tokens, HEADS, HEAD_DIM, generator=generator).to(dtype)
    x = torch.randn(2, tokens, DIM, generator=generator).to(dtype)
    layer = torch.nn.Linear(DIM, DIM, dtype=dtype)
    run = Run("VSA")
    call = SimpleNamespace(record=None, sampled=False, kernel="reference", layer=3, options={FED: FedGate(layer, x)},
                           step=SimpleNamespace(run=run), heads=range(HEADS), of_heads=HEADS)
    method = VideoSparseMethod(SPARSITY, TILE)
    with torch.inference_mode():
        gate = layer(x).view(q.shape)
        found = method.attend(method.plan(TokenGrid(GRID), torch.device("cpu")), q, k, v, call)
    _, selection, _ = vsa_attention_oracle(q, k, v, None, GRID, TILE, SPARSITY)
    wanted, *_ = vsa_attention_oracle(q, k, v, gate, GRID, TILE, SPARSITY, selection=selection)
    assert relative_l2_per_tile(found, wanted, GRID, TILE).max() <= bound
    assert run.gated == {3: 1} and found.dtype == dtype


def test_keeping_every_tile_gives_dense_attention_plus_the_gated_coarse_term(comfyui):
    from types import SimpleNamespace

    from pack.nodes.hook.run import Run
    from pack.nodes.methods.video_sparse_attention import VideoSparseMethod
    from pack.nodes.trained.gates import FED, FedGate
    from pack.vsa_core.grid import TokenGrid
    q, k, v = torch.randn(3, 1, math.prod(GRID), HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(9))
    call = SimpleNamespace(record=None, sampled=False, kernel="reference", layer=0, heads=range(HEADS), of_heads=HEADS,
                           step=SimpleNamespace(run=Run("VSA")), options={FED: FedGate(torch.zeros_like, q.flatten(2))})
    method = VideoSparseMethod(0.0, TILE)
    found = method.attend(method.plan(TokenGrid(GRID), torch.device("cpu")), q, k, v, call)
    assert ((found - dense_attention_oracle(q, k, v)).norm() / found.norm()).item() <= 1e-5
