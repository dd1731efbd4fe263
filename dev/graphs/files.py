"""Where the files come from that the graphs name: what ComfyUI's own templates and documentation link."""
from __future__ import annotations

HUB = "https://huggingface.co"
WAN21 = "Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN22 = "Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
HUNYUAN15 = "Comfy-Org/HunyuanVideo_1.5_repackaged/resolve/main/split_files"
H3 = "Comfy-Org/MiniMax-H3/resolve/main"
FASTWAN = "FastWan2.1-T2V-1.3B-Diffusers"
FASTWAN_FILE = "FastWan2.1-T2V-1.3B.safetensors"
TURBOWAN = "TurboWan2.1-T2V-1.3B-Diffusers"
TURBOWAN22 = "TurboWan2.2-I2V-A14B-{}-720P"

UMT5, WAN_VAE = "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan_2.1_vae.safetensors"
SOURCES = {
    f"{WAN21}/diffusion_models": (
        "wan2.1_t2v_1.3B_fp16.safetensors", "wan2.1_t2v_14B_fp8_scaled.safetensors",
        "wan2.1_i2v_480p_14B_fp8_scaled.safetensors"),
    f"{WAN21}/text_encoders": (UMT5,),
    f"{WAN21}/clip_vision": ("clip_vision_h.safetensors",),
    f"{WAN21}/vae": (WAN_VAE,),
    f"{WAN22}/diffusion_models": tuple(
        f"wan2.2_{task}_{noise}_noise_14B_fp8_scaled.safetensors" for task in ("t2v", "i2v")
        for noise in ("high", "low")),
    f"{WAN22}/loras": tuple(
        f"wan2.2_{task}_lightx2v_4steps_lora_{version}_{noise}_noise.safetensors"
        for task, version in (("t2v", "v1.1"), ("i2v", "v1")) for noise in ("high", "low")),
    f"{HUNYUAN15}/diffusion_models": (
        "hunyuanvideo1.5_720p_t2v_fp16.safetensors", "hunyuanvideo1.5_720p_i2v_fp16.safetensors"),
    f"{HUNYUAN15}/text_encoders": ("qwen_2.5_vl_7b_fp8_scaled.safetensors", "byt5_small_glyphxl_fp16.safetensors"),
    f"{HUNYUAN15}/vae": ("hunyuanvideo15_vae_fp16.safetensors",),
    "Comfy-Org/sigclip_vision_384/resolve/main": ("sigclip_vision_patch14_384.safetensors",),
    "Lightricks/LTX-2/resolve/main": ("ltx-2-19b-dev-fp8.safetensors",),
    "Comfy-Org/ltx-2/resolve/main/split_files/text_encoders": ("gemma_3_12B_it_fp4_mixed.safetensors",),
    f"{H3}/diffusion_models": ("minimax_h3_fl2va_pruned_int8_convrot.safetensors",),
    f"{H3}/text_encoders": ("qwen3vl_32b_minimax_h3_nvfp4_awq.safetensors",),
    f"{H3}/vae": ("minimax_h3_video_vae_fp16.safetensors", "minimax_h3_audio_vae_fp32.safetensors"),
}
URLS = {name: f"{HUB}/{folder}/{name}" for folder, names in SOURCES.items() for name in names}
FOLDERS = {"unet_name": "diffusion_models", "lora_name": "loras", "vae_name": "vae", "text_encoder": "text_encoders",
           "ckpt_name": "checkpoints", "model_name": "diffusion_models", "clip_name": "text_encoders",
           "clip_name1": "text_encoders", "clip_name2": "text_encoders", "gates": "diffusion_models",
           "strategy_name": "sta_strategies"}
"""A widget that names a file, and the folder below ComfyUI/models."""


def files_of(node):
    """[(name, folder), ...] that a node loads."""
    vision = {"clip_name": "clip_vision"} if node.kind == "CLIPVisionLoader" else {}
    return [(value, {**FOLDERS, **vision}[name]) for name, value in node.inputs.items()
            if name in FOLDERS and isinstance(value, str)]


def models_of(node):
    """What ComfyUI's page offers to download for a node; a file without a known address is not among them."""
    return [{"name": name, "url": URLS[name], "directory": folder} for name, folder in files_of(node) if name in URLS]


def tree(files):
    """The folders below ComfyUI/models with these files, drawn as text."""
    folders: dict[str, list] = {}
    for name, folder in files:
        folders.setdefault(folder, []).append(name)
    lines = ["📂 ComfyUI/", "└── 📂 models/"]
    for folder, names in folders.items():
        last = folder == list(folders)[-1]
        lines.append(f"    {'└' if last else '├'}── 📂 {folder}/")
        lines += [f"    {' ' if last else '│'}   {'└' if name == names[-1] else '├'}── {name}" for name in names]
    return "\n".join(lines)
