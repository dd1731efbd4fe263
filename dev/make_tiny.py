"""Write tiny random checkpoints that ComfyUI loads as its real video models.

    python make_tiny.py [OUTDIR] [--comfyui PATH] [--only NAME ...]     # default OUTDIR: .cache/tiny/VERSION

or, after comfy_boot.boot(): make("tiny_wan_t2v", folder), which returns the path. Each is ComfyUI's own
class with tiny dimensions, filled with seeded random float32 weights, so make them again for every ComfyUI
version: key names move. What detection cannot read from tensor shapes (Wan: text width; LTXV: heads and
widths) travels in the file's metadata as {"transformer": {...}}.

Besides the plain families (see BUILDERS), made from the weights of tiny_wan_t2v:
  tiny_wan_vsa.safetensors   the same keys plus random VSA gates blocks.N.to_gate_compress.{weight,bias}
  tiny_wan_sla.safetensors   the same keys plus random SLA projections, under TurboDiffusion's names
  tiny_wan22_i2v_sla.safetensors   such a model that takes a start image as Wan 2.2 does
  tiny_fastwan_diffusers/    the same weights and gates as a diffusers WanTransformer3DModel folder
"""
import argparse
import importlib
import json
import os
import re
from functools import partial
from pathlib import Path

from comfy_boot import PACK, boot, version

TEXT_DIM = 64


def build_wan(heads=1, layers=2, model_type="t2v", cls="WanModel", in_dim=16, out_dim=16, module="model", named=None,
              named_also=None, known=None, **kw):
    """named: the model type that only the file's metadata can tell, with named_also as further metadata.   known: the
    class by which a ComfyUI that knows such a file detects it."""
    if known:
        getattr(importlib.import_module("comfy.supported_models"), known)
    wan = importlib.import_module(f"comfy.ldm.wan.{module}")
    if cls != "VaceWanModel":
        kw["model_type"] = model_type
    model = getattr(wan, cls)(dim=128 * heads, ffn_dim=64, num_heads=heads, num_layers=layers, text_dim=TEXT_DIM,
                              in_dim=in_dim, out_dim=out_dim, **common(), **kw)
    return model, {"text_dim": TEXT_DIM, **({"model_type": named} if named else {}), **(named_also or {})}


def build_hunyuan(heads=1, **kw):
    import comfy.ldm.hunyuan_video.model as hunyuan
    config = dict(image_model="hunyuan_video", in_channels=16, patch_size=[1, 2, 2], out_channels=16, vec_in_dim=768,
                  context_in_dim=TEXT_DIM, hidden_size=128 * heads, mlp_ratio=4.0, num_heads=heads, depth=2,
                  depth_single_blocks=2, axes_dim=[16, 56, 56], theta=256, qkv_bias=True, guidance_embed=True,
                  byt5=False, meanflow=False, use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False)
    return hunyuan.HunyuanVideo(**{**config, **kw}, **common()), None


def build_hunyuan15(in_channels=65, heads=1):
    return build_hunyuan(heads, in_channels=in_channels, patch_size=[1, 1, 1], out_channels=32, vec_in_dim=None,
                         depth_single_blocks=0, guidance_embed=False, use_cond_type_embedding=True, vision_in_dim=1152,
                         meanflow_sum=True)


def build_ltxv(heads=2, head_dim=32):
    import comfy.ldm.lightricks.model as ltxv
    config = dict(num_attention_heads=heads, attention_head_dim=head_dim, cross_attention_dim=heads * head_dim,
                  caption_channels=TEXT_DIM, in_channels=128, num_layers=2)
    return ltxv.LTXVModel(**config, **common()), config


def build_ltxav(heads=2, head_dim=32, audio_head_dim=16):
    import comfy.ldm.lightricks.av_model as ltxav
    config = dict(num_attention_heads=heads, attention_head_dim=head_dim, cross_attention_dim=heads * head_dim,
                  audio_num_attention_heads=heads, audio_attention_head_dim=audio_head_dim,
                  audio_cross_attention_dim=heads * audio_head_dim, caption_channels=TEXT_DIM, in_channels=128,
                  audio_in_channels=128, num_layers=2, connector_num_attention_heads=2,
                  connector_attention_head_dim=32, connector_num_layers=1)
    return ltxav.LTXAVModel(**config, **common()), config


def build_kandinsky5(heads=2):
    import comfy.ldm.kandinsky5.model as kandinsky
    return kandinsky.Kandinsky5(in_text_dim=3584, in_text_dim2=768, time_dim=32, model_dim=64 * heads, ff_dim=64,
                                visual_embed_dim=132, num_text_blocks=1, num_visual_blocks=2,
                                axes_dims=(16, 24, 24), **common()), None


def build_cogvideox(heads=2, **kw):
    import comfy.ldm.cogvideo.model as cogvideo
    return cogvideo.CogVideoXTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=64, in_channels=16, out_channels=16, time_embed_dim=32,
        text_embed_dim=TEXT_DIM, num_layers=2, patch_size=2, use_rotary_positional_embeddings=True, **common(),
        **kw), None


def build_minimax_h3(heads=2):
    import comfy.ldm.minimax.model as minimax
    return minimax.MiniMaxH3Model(
        hidden_size=128, num_layers=2, token_refiner_num_layers=1, num_attention_heads=heads, attention_head_dim=128,
        ffn_hidden_size=64, text_dim=TEXT_DIM, timestep_input_dim=32, time_embed_hidden_size=32, time_embed_dim=32,
        **common()), None


# File stem: builder. The position is the seed of the weights, so append, do not reorder.
BUILDERS = {
    "tiny_wan_t2v": partial(build_wan, heads=2),
    "tiny_wan22_ti2v": partial(build_wan, in_dim=48, out_dim=48),
    "tiny_hunyuan_video": build_hunyuan,
    "tiny_ltxv": build_ltxv,
    "tiny_wan_vace": partial(build_wan, cls="VaceWanModel", layers=4, vace_layers=2, vace_in_dim=96),
    "tiny_wan_i2v": partial(build_wan, model_type="i2v", in_dim=36),
    "tiny_wan_ref": partial(build_wan, in_dim_ref_conv=16),
    "tiny_hunyuan_video15": build_hunyuan15,
    "tiny_kandinsky5": build_kandinsky5,
    "tiny_cogvideox": build_cogvideox,
    "tiny_minimax_h3": build_minimax_h3,
    "tiny_wan_flf": partial(build_wan, model_type="i2v", in_dim=36, flf_pos_embed_token_number=14),   # real: 2 x 257
    "tiny_wan_camera": partial(build_wan, cls="CameraWanModel", model_type="camera_2.2", in_dim=36),
    "tiny_wan_s2v": partial(build_wan, cls="WanModel_S2V", model_type="s2v"),
    "tiny_wan_scail": partial(build_wan, cls="SCAILWanModel", model_type="scail", in_dim=20),
    "tiny_wan_scail2": partial(build_wan, cls="SCAIL2WanModel", model_type="scail2", in_dim=20),
    "tiny_wan_animate2": partial(build_wan, cls="WanAnimate2Model", module="model_animate2", model_type="animate2",
                                 in_dim=36, named="animate2"),
    "tiny_wan_dancer": partial(build_wan, cls="WanDancerModel", module="model_wandancer", model_type="wandancer",
                               in_dim=36),
    "tiny_wan_flow_rvs": partial(build_wan, named="flow_rvs"),
    "tiny_wan_causal": partial(build_wan, named_also={"causal_ar": True}, known="WAN21_CausalAR_T2V"),
    "tiny_ltxav": build_ltxav,
    "tiny_cogvideox15": partial(build_cogvideox, patch_size_t=2),
    "tiny_hunyuan_i2v": partial(build_hunyuan, in_channels=33),
    "tiny_wan_fun": partial(build_wan, model_type="i2v", in_dim=48),
    "tiny_hunyuan15_sr": partial(build_hunyuan15, in_channels=98),
}
# Made from the weights of tiny_wan_t2v.
DERIVED = {"tiny_wan_vsa": "tiny_wan_vsa.safetensors", "tiny_fastwan_diffusers": "tiny_fastwan_diffusers",
           "tiny_wan_sla": "tiny_wan_sla.safetensors", "tiny_wan22_i2v_sla": "tiny_wan22_i2v_sla.safetensors",
           "tiny_wan_vsa_wide": "tiny_wan_vsa_wide.safetensors", "tiny_wan_sla_wide": "tiny_wan_sla_wide.safetensors"}
WIDE = "_wide"
"""Behind any name: that model with WIDE_HEADS heads."""
WIDE_HEADS = 3


def common():
    import comfy.ops
    import torch
    return dict(device="cpu", dtype=torch.float32, operations=comfy.ops.disable_weight_init)


def fill(model, seed):
    """Seeded weights of unit gain, so that attention moves the output by percents, not by rounding errors."""
    import torch
    gen = torch.Generator().manual_seed(seed)
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if name == "rope.inv_freq":  # MiniMax H3 keeps its frequencies in the file
            p.data = 10000.0 ** -(torch.arange(len(p)) / len(p))
        elif p.ndim == 1 and "norm" in name and name.endswith("weight"):
            p.data = torch.ones(p.shape)
        elif p.is_floating_point():
            if p.ndim == 1:
                std = 0.02                          # biases
            elif name.endswith("weight"):
                std = p[0].numel() ** -0.5          # linear and convolution weights
            else:
                std = 0.5                           # modulation tables
            p.data = torch.randn(p.shape, generator=gen) * std


def save(state_dict, path, transformer=None):
    import safetensors.torch
    metadata = {"config": json.dumps({"transformer": transformer})} if transformer else {"format": "pt"}
    part = path.with_name(f"{path.name}.{os.getpid()}.part")   # of this process: others may write the same
    safetensors.torch.save_file({k: v.contiguous() for k, v in state_dict.items()}, part, metadata=metadata)
    os.replace(part, path)   # a file under its own name is complete


def gates(state_dict, seed=100):
    """Random VSA gate layers for a native Wan state dict, at the key names FastVideo writes."""
    import torch
    gen = torch.Generator().manual_seed(seed)
    dim = state_dict["head.modulation"].shape[-1]
    blocks = 1 + max(int(m.group(1)) for m in (re.match(r"blocks\.(\d+)\.", k) for k in state_dict) if m)
    extra = {}
    for n in range(blocks):
        extra[f"blocks.{n}.to_gate_compress.weight"] = torch.randn(dim, dim, generator=gen) * dim ** -0.5
        extra[f"blocks.{n}.to_gate_compress.bias"] = torch.randn(dim, generator=gen) * 0.02
    return extra


# (native, diffusers), applied in order to the first match of each; keys not named here are the same in both.
WAN_TO_DIFFUSERS = [
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.(attn\d)\.([qkv])\.", r".\1.to_\2."),
    (r"\.(attn\d)\.o\.", r".\1.to_out.0."),
    (r"\.norm3\.", ".norm2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
]


def wan_to_diffusers(key):
    for pattern, replacement in WAN_TO_DIFFUSERS:
        key = re.sub(pattern, replacement, key)
    return key


def save_diffusers(state_dict, folder):
    dim = state_dict["head.modulation"].shape[-1]
    config = {
        "_class_name": "WanTransformer3DModel", "added_kv_proj_dim": None, "attention_head_dim": 128,
        "cross_attn_norm": True, "eps": 1e-06, "ffn_dim": state_dict["blocks.0.ffn.0.weight"].shape[0],
        "freq_dim": 256, "image_dim": None, "in_channels": 16, "num_attention_heads": dim // 128,
        "num_layers": sum(k.endswith(".to_gate_compress.bias") for k in state_dict), "out_channels": 16,
        "patch_size": [1, 2, 2], "pos_embed_seq_len": None, "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024, "text_dim": TEXT_DIM,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save({wan_to_diffusers(k): v for k, v in state_dict.items()}, folder / "diffusion_pytorch_model.safetensors")


class Unavailable(Exception):
    """This ComfyUI has no such model."""


def folder_for(comfyui):
    return PACK / ".cache" / "tiny" / version(comfyui)


def current(name, folder):
    """The path of checkpoint `name` in `folder`, or None when it is not there or older than this script."""
    path = Path(folder) / DERIVED.get(name, f"{name}.safetensors")
    weights = path if path.suffix else path / "diffusion_pytorch_model.safetensors"
    return path if weights.exists() and weights.stat().st_mtime > Path(__file__).stat().st_mtime else None


def make(name, folder):
    """The path of checkpoint `name` in `folder`, written now unless it is current."""
    if current(name, folder):
        return current(name, folder)
    path = Path(folder) / DERIVED.get(name, f"{name}.safetensors")
    wide, name = name.endswith(WIDE), name.removesuffix(WIDE)
    base = "tiny_wan_t2v" if name in DERIVED else name
    try:
        builder = partial(build_wan, in_dim=36) if name == "tiny_wan22_i2v_sla" else BUILDERS[base]
        model, transformer = builder(heads=WIDE_HEADS) if wide else builder()
    except (ImportError, AttributeError, TypeError) as error:
        raise Unavailable(f"this ComfyUI has no model for {name}: {error}") from error
    fill(model, list(BUILDERS).index(base) + 1)
    state_dict = model.state_dict()
    if name.endswith("_sla"):
        from make_sla_checkpoints import with_projections
        state_dict = with_projections(state_dict)
    elif name in DERIVED:
        state_dict = {**state_dict, **gates(state_dict)}
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "tiny_fastwan_diffusers":
        save_diffusers(state_dict, path)
    else:
        save(state_dict, path, transformer)
    return path


def main():
    names = [*BUILDERS, *DERIVED]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outdir", type=Path, nargs="?")
    parser.add_argument("--comfyui", help="checkout (default: as comfy_boot.locate finds it)")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    args = parser.parse_args()
    root = boot(args.comfyui)
    folder = args.outdir or folder_for(root)
    for name in args.only:
        try:
            print(make(name, folder))
        except Unavailable as error:
            print(f"SKIPPED {error}")


if __name__ == "__main__":
    main()
