"""Gates against float64 answers that share no code with the pack or with ComfyUI."""
import math

import pytest
import torch

from oracles import dense_attention_oracle, relative_l2_per_tile, vsa_attention_oracle
from wan_block_oracle import DIM, GRID, HEAD_DIM, HEADS, LATENT, Weights, block_oracle, heads_of

TILE, SPARSITY = (4, 4, 4), 0.6


def gated_attention(weights, q, k, v, h):
    return vsa_attention_oracle(q, k, v, heads_of(weights.linear(h, "to_gate_compress")), GRID, TILE, SPARSITY)[0]


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
    wanted = block_oracle(Weights(gate_file, block), seen["x"].double(), modulation, context, gated_attention)
    found = seen["out"].double()
    moved = wanted - seen["x"].double()
    assert ((found - wanted).norm() / moved.norm()).item() <= 1e-4
    ungated = block_oracle(Ungated(gate_file, block), seen["x"].double(), modulation, context, gated_attention)
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
    call = SimpleNamespace(record=None, reads=None, watch=None, sampled=False, kernel="reference", layer=3,
                           options={FED: FedGate(layer, x)}, step=SimpleNamespace(run=run), heads=range(HEADS),
                           of_heads=HEADS)
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
    call = SimpleNamespace(record=None, reads=None, watch=None, sampled=False, kernel="reference", layer=0,
                           heads=range(HEADS), of_heads=HEADS, step=SimpleNamespace(run=Run("VSA")),
                           options={FED: FedGate(torch.zeros_like, q.flatten(2))})
    method = VideoSparseMethod(0.0, TILE)
    found = method.attend(method.plan(TokenGrid(GRID), torch.device("cpu")), q, k, v, call)
    assert ((found - dense_attention_oracle(q, k, v)).norm() / found.norm()).item() <= 1e-5
