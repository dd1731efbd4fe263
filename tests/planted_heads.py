"""A tiny Wan whose heads look in directions of their own, and latents for it."""
import torch

LATENT = (8, 16, 16)      # 8x8x8 tokens: 2x2x2 tiles of 4x4x4
LATENT_LONG = (24, 16, 48)   # 24x8x24 tokens: 6x2x6 tiles of 4x4x4


def plant(model):
    """A clone of the tiny Wan whose head 0 looks along time and height only (local in width), head 1 along height
    and width only (local in time): constant queries and keys with weight on one axis' rotary frequencies."""
    clone = model.clone()
    net = model.model.diffusion_model
    sizes = (44, 42, 42)                 # rotary channels of t, h, w in a head of 128
    offsets = {"t": 0, "h": sizes[0], "w": sizes[0] + sizes[1]}
    bias = torch.full((256,), 1e-4)
    for head, axis in ((0, "w"), (1, "t")):
        first = head * 128 + offsets[axis]
        bias[first:first + 20] = 1.0     # the fast half: neighbours differ
    for i in range(len(net.blocks)):
        name = f"diffusion_model.blocks.{i}.self_attn"
        for part in "qk":
            weight = clone.get_key_patches(f"{name}.{part}.weight")
            shape = net.blocks[i].self_attn.q.weight.shape
            assert weight is not None
            clone.add_patches({f"{name}.{part}.weight": ("set", (torch.zeros(shape),)),
                               f"{name}.{part}.bias": ("set", (bias,)),
                               f"{name}.norm_{part}.weight": ("set", (torch.full((256,), 6.0),))}, 1.0)
    return clone
