"""A block of an SLA-trained Wan against its float64 forward, which shares no code with the pack or with ComfyUI."""
import pytest

from sla_oracle import sla_oracle
from wan_block_oracle import DIM, GRID, LATENT, Weights, block_oracle

RATIO, QUERY_RUN = 0.4, 128


def projected_attention(weights, q, k, v, h):
    proj = "self_attn.attn_op.local_attn.proj_l."
    return sla_oracle(q, k, v, RATIO, QUERY_RUN, "softmax", weights[proj + "weight"], weights[proj + "bias"])


def plain_attention(weights, q, k, v, h):
    return sla_oracle(q, k, v, RATIO, QUERY_RUN)


@pytest.mark.parametrize("block", [0, 1])
def test_a_block_with_random_projections_equals_its_float64_forward(load, write_sla, sla, run_of, draw, block):
    path, seen = write_sla("native"), {}
    patched = sla(load(path)[0], RATIO)
    net = patched.model.diffusion_model

    def keep(module, args, kwargs, out):
        seen.update(kwargs, x=args[0], out=out, args=args)
    handle = net.blocks[block].register_forward_hook(keep, with_kwargs=True)
    try:
        draw(patched, LATENT, steps=1, cfg=4.0)
    finally:
        handle.remove()
    assert run_of(patched).gated == {0: 1, 1: 1} and run_of(patched).summary()[0]["grid"] == list(GRID)
    modulation, context = (seen[name].double() if name in seen else seen["args"][at].double()
                           for name, at in (("e", 1), ("context", 3)))
    modulation, x, found = modulation.view(2, 6, DIM), seen["x"].double(), seen["out"].double()
    wanted, plain = (block_oracle(Weights(path, block), x, modulation, context, attend)
                     for attend in (projected_attention, plain_attention))
    moved = (wanted - x).norm()
    assert ((found - wanted).norm() / moved).item() <= 1e-4
    assert ((plain - wanted).norm() / moved).item() > 0.01
