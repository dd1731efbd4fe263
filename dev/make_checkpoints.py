"""Write the weights of a tiny VSA-trained Wan in every way such models are published, from dev/make_tiny.py's.

    write("sharded", state_dict, folder)   # -> the path to load

state_dict: native Wan names with gates blocks.N.to_gate_compress (the file tiny_wan_vsa). Also what goes wrong with
such files, for the tests that must see it refused.
"""
import json
import re

from make_tiny import TEXT_DIM, save, save_diffusers, wan_to_diffusers

# diffusers name, FastVideo's name (its configs/models/dits/wanvideo.py).
FASTVIDEO = [
    (r"^patch_embedding\.", "patch_embedding.proj."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "condition_embedder.text_embedder.fc_in."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "condition_embedder.text_embedder.fc_out."),
    (r"^condition_embedder\.time_embedder\.linear_1\.", "condition_embedder.time_embedder.mlp.fc_in."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "condition_embedder.time_embedder.mlp.fc_out."),
    (r"^condition_embedder\.time_proj\.", "condition_embedder.time_modulation.linear."),
    (r"^(blocks\.\d+)\.attn1\.to_([qkv])\.", r"\1.to_\2."),
    (r"^(blocks\.\d+)\.attn1\.to_out\.0\.", r"\1.to_out."),
    (r"^(blocks\.\d+)\.attn1\.norm_([qk])\.", r"\1.norm_\2."),
    (r"^(blocks\.\d+)\.attn2\.to_out\.0\.", r"\1.attn2.to_out."),
    (r"^(blocks\.\d+)\.ffn\.net\.0\.proj\.", r"\1.ffn.fc_in."),
    (r"^(blocks\.\d+)\.ffn\.net\.2\.", r"\1.ffn.fc_out."),
    (r"^(blocks\.\d+)\.norm2\.", r"\1.self_attn_residual_norm.norm."),
]


def fastvideo_name(name):
    for pattern, replacement in FASTVIDEO:
        name = re.sub(pattern, replacement, name)
    return name


def diffusers_state(state_dict):
    return {wan_to_diffusers(key): value for key, value in state_dict.items()}


def half_converted(state_dict):
    """Every second tensor under FastVideo's name, the others under diffusers', as in the 14B preview."""
    names = sorted(diffusers_state(state_dict))
    renamed = {name: fastvideo_name(name) if place % 2 else name for place, name in enumerate(names)}
    return {renamed[name]: value for name, value in diffusers_state(state_dict).items()}


def shards_of(state_dict, count):
    names = sorted(state_dict)
    return [{name: state_dict[name] for name in names[n::count]} for n in range(count)]


def write_shards(state_dict, folder, count=3, index=True):
    """`count` shards beside a config.json, with the index that names them or without."""
    weight_map = {}
    for number, shard in enumerate(shards_of(state_dict, count), 1):
        name = f"diffusion_pytorch_model-{number:05}-of-{count:05}.safetensors"
        save(shard, folder / name)
        weight_map.update(dict.fromkeys(shard, name))
    if index:
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def write(kind, state_dict, folder):
    """One of KINDS under `folder`; returns what a user would choose: a file or a folder."""
    path = folder / kind.replace(" ", "_")
    if kind == "native file":
        path = folder / "native.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        save(state_dict, path, {"text_dim": TEXT_DIM})
        return path
    save_diffusers(state_dict, path / "transformer" if kind == "pipeline folder" else path)
    if kind in ("diffusers file", "pipeline folder"):
        return path
    (path / "diffusion_pytorch_model.safetensors").unlink()
    if kind == "half converted":
        save(half_converted(state_dict), path / "diffusion_pytorch_model.safetensors")
        return path
    return write_shards(diffusers_state(state_dict), path, index=kind == "sharded with index")


KINDS = ("native file", "diffusers file", "sharded with index", "sharded without index", "half converted",
         "pipeline folder")


def wan_shapes(layers=30, dim=1536, ffn_dim=8960, text_dim=4096, freq_dim=256, channels=16):
    """Native name -> shape of Wan 2.1 T2V (default 1.3B) with its gates, from the published code: no weights needed."""
    linear = {"time_embedding.0": (dim, freq_dim), "time_embedding.2": (dim, dim), "time_projection.1": (6 * dim, dim),
              "text_embedding.0": (dim, text_dim), "text_embedding.2": (dim, dim), "head.head": (4 * channels, dim)}
    shapes = {"patch_embedding.weight": (dim, channels, 1, 2, 2), "patch_embedding.bias": (dim,),
              "head.modulation": (1, 2, dim)}
    for n in range(layers):
        shapes[f"blocks.{n}.modulation"] = (1, 6, dim)
        shapes.update({f"blocks.{n}.norm3.weight": (dim,), f"blocks.{n}.norm3.bias": (dim,)})
        for attention in ("self_attn", "cross_attn"):
            linear.update({f"blocks.{n}.{attention}.{part}": (dim, dim) for part in "qkvo"})
            shapes.update({f"blocks.{n}.{attention}.norm_{part}.weight": (dim,) for part in "qk"})
        linear.update({f"blocks.{n}.ffn.0": (ffn_dim, dim), f"blocks.{n}.ffn.2": (dim, ffn_dim),
                       f"blocks.{n}.to_gate_compress": (dim, dim)})
    for name, shape in linear.items():
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})
    return shapes


def write_hollow(shapes, path, dtype="BF16", metadata=None):
    """A safetensors file with these tensors whose weights are a hole in the file: full size, no disk."""
    header, offset = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = {"BF16": 2, "F32": 4}[dtype]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
    return path
