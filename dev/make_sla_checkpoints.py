"""Write the weights of a tiny SLA-trained Wan in every way such models are published or met.

    write_sla("TurboDiffusion", with_projections(state_dict), folder)   # -> the path to load

state_dict: native Wan names, with projections under TurboDiffusion's names once `with_projections` has added them.
"""
import re

from make_checkpoints import fastvideo_name, write_shards
from make_tiny import TEXT_DIM, save, save_diffusers, wan_to_diffusers

HEAD_DIM = 128
NATIVE = "blocks.{}.self_attn.attn_op.local_attn.proj_l.{}"


def with_projections(state_dict, seed=200):
    """The state dict without gates and with random projections, large enough to move a clip by percents."""
    import torch
    gen = torch.Generator().manual_seed(seed)
    blocks = 1 + max(int(m.group(1)) for m in (re.match(r"blocks\.(\d+)\.", name) for name in state_dict) if m)
    out = {name: value for name, value in state_dict.items() if "to_gate_compress" not in name}
    for n in range(blocks):
        out[NATIVE.format(n, "weight")] = torch.randn(HEAD_DIM, HEAD_DIM, generator=gen) * HEAD_DIM ** -0.5
        out[NATIVE.format(n, "bias")] = torch.randn(HEAD_DIM, generator=gen) * 0.1
    return out


def is_projection(name):
    return ".proj_l." in name


def renamed(state_dict, place, rest=lambda name: name):
    """Projections below another place in their block, everything else under rest(name)."""
    return {name.replace("self_attn.attn_op.local_attn", place) if is_projection(name) else rest(name): value
            for name, value in state_dict.items()}


def flat_patch(state_dict):
    """The patch embedding as the linear layer that TurboDiffusion has."""
    return {name: value.flatten(1) if name == "patch_embedding.weight" else value
            for name, value in state_dict.items()}


def wrapped(state_dict):
    return {re.sub(r"^(blocks\.\d+\.)", r"\1_checkpoint_wrapped_module.", name): value
            for name, value in state_dict.items()}


def quantised(state):
    """(the weights of the blocks' linear layers as TurboDiffusion's int8 with a scale for every 128 x 128 of them, the
    bf16 weights that those stand for)."""
    import torch
    out, stood_for = {}, {}
    for name, tensor in state.items():
        linear = name.startswith("blocks.") and name.endswith(".weight") and tensor.ndim == 2 and "proj_l" not in name
        if not linear:
            out[name] = stood_for[name] = tensor
            continue
        rows, columns = tensor.shape
        scale = torch.empty(-(-rows // 128), -(-columns // 128))
        numbers, weight = torch.empty(rows, columns, dtype=torch.int8), torch.empty(rows, columns)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                part = slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128)
                scale[i, j] = tensor[part].float().abs().max() / 128
                numbers[part] = (tensor[part].float() / scale[i, j]).round().clamp(-128, 127).to(torch.int8)
                weight[part] = numbers[part].float() * scale[i, j]
        stem = name.removesuffix(".weight")
        out |= {f"{stem}.int8_weight": numbers, f"{stem}.scale": scale}
        stood_for[name] = weight.bfloat16()
    return out, stood_for


def _file(state_dict, folder, name):
    folder.mkdir(parents=True, exist_ok=True)
    save(state_dict, folder / name, {"text_dim": TEXT_DIM})
    return folder / name


def _folder(state_dict, folder, source):
    save_diffusers({name: value for name, value in source.items() if not is_projection(name)}, folder)   # config.json
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 0', '"num_layers": 2'))
    return write_shards(state_dict, folder, 2)


SLA_KINDS = {
    "native": lambda state, folder: _file(state, folder, "native.safetensors"),
    "TurboDiffusion": lambda state, folder: _file(flat_patch(state), folder, "turbo.safetensors"),
    "behind a prefix": lambda state, folder: _file(
        {f"model.diffusion_model.{name}": value for name, value in state.items()}, folder, "prefixed.safetensors"),
    "checkpoint wrapped": lambda state, folder: _file(wrapped(flat_patch(state)), folder, "wrapped.safetensors"),
    "FastVideo": lambda state, folder: _folder(
        renamed(state, "attn1.attn_impl", lambda name: fastvideo_name(wan_to_diffusers(name))), folder / "fastvideo",
        state),
    "sglang": lambda state, folder: _folder(
        renamed(state, "attn1.attn_op.local_attn", wan_to_diffusers), folder / "sglang", state),
    "sglang running": lambda state, folder: _folder(
        renamed(state, "attn1.local_attn", wan_to_diffusers), folder / "running", state),
}


def write_sla(kind, state_dict, folder):
    """One of SLA_KINDS under `folder`; returns what a user would choose: a file or a folder."""
    return SLA_KINDS[kind](state_dict, folder)
