"""The example graphs, as short descriptions that dev/make_workflows.py turns into workflows.

id: (node type, title or None, (x, y), (width, height), inputs); an input that is a list is a link [id, output].
"""
PROMPT = "a red fox trots through fresh snow at sunrise, steam from its breath, tracking shot"
NEGATIVE = ("bright tones, overexposed, static, blurred details, subtitles, worst quality, low quality, "
            "deformed, still picture")
SHARED = {"backend": "auto", "start_percent": 0.2, "end_percent": 1.0, "dense_blocks": "", "min_tokens": 12288,
          "strict": False, "verbose": False}
VSA_NOTE = (
    "**Video Sparse Attention** lets every 3-D tile of the clip attend only to the tiles that matter to it.\n\n"
    "- `sparsity` 0.8 keeps a fifth of them. Higher is faster and further from dense.\n"
    "- `start_percent` 0.2 keeps the first fifth of the steps dense, where the composition forms.\n"
    "- After a run the node says whether sparse attention was on, whether that was faster, and why not.\n"
    "- **Sparse Attention Report** shows where the middle of the clip looks.\n\n"
    "Bypass the node (Ctrl+B) and run again to compare with dense attention at the same seed: the report names both "
    "times.")
STA_NOTE = (
    "**Sliding Tile Attention** lets every 3-D tile of the clip attend to a window of tiles around it.\n\n"
    "- `window` 1.0x0.5x0.5 sees all of time and half of the height and width. Smaller is faster and further from "
    "dense.\n"
    "- A strategy from **Load STA Strategy** or **STA Strategy Search** gives every step, layer and head a window of "
    "its own.\n"
    "- After a run the node says whether sparse attention was on, whether that was faster, and why not.\n\n"
    "Bypass the node (Ctrl+B) and run again to compare with dense attention at the same seed: the report names both "
    "times.")


def sparse_node(method, model):
    """(node type, its inputs, its note) for "vsa" or "sta"."""
    if method == "vsa":
        own = {"model": model, "sparsity": 0.8, "tile_size": "auto", **SHARED}
        return "VideoSparseAttentionPatch", own, VSA_NOTE
    own = {"model": model, "window": "1.0x0.5x0.5", "tile_size": "auto", **SHARED}
    return "SlidingTileAttentionPatch", own, STA_NOTE


def clip_graph(method, unet, clip, vae, shift, latent, size, sampler, steps, cfg, fps):
    """Text to video with a UNET, a CLIP and a VAE file, KSampler and the sparse node.

    clip: (loader type, its inputs).   latent: node type.   size: (width, height, length).
    """
    node, own, note = sparse_node(method, [4, 0])
    return {
        1: ("UNETLoader", None, (40, 60), (340, 90), {"unet_name": unet, "weight_dtype": "default"}),
        2: (clip[0], None, (40, 200), (340, 140), clip[1]),
        3: ("VAELoader", None, (40, 400), (340, 60), {"vae_name": vae}),
        4: ("ModelSamplingSD3", None, (430, 60), (300, 60), {"model": [1, 0], "shift": shift}),
        5: (node, None, (430, 170), (320, 440), own),
        6: ("CLIPTextEncode", "Prompt", (800, 60), (360, 150), {"clip": [2, 0], "text": PROMPT}),
        7: ("CLIPTextEncode", "Negative prompt", (800, 260), (360, 130), {"clip": [2, 0], "text": NEGATIVE}),
        8: (latent, None, (800, 440), (360, 130),
            {"width": size[0], "height": size[1], "length": size[2], "batch_size": 1}),
        9: ("KSampler", None, (1190, 60), (300, 260),
            {"model": [5, 0], "positive": [6, 0], "negative": [7, 0], "latent_image": [8, 0], "seed": 1,
             "steps": steps, "cfg": cfg, "sampler_name": sampler, "scheduler": "simple", "denoise": 1.0}),
        10: ("SparseAttentionReport", None, (1190, 380), (460, 420),
             {"latent": [9, 0], "model": [5, 0], "images": [11, 0]}),
        11: ("VAEDecode", None, (1540, 60), (220, 50), {"samples": [9, 0], "vae": [3, 0]}),
        12: ("CreateVideo", None, (1540, 170), (220, 80), {"images": [11, 0], "fps": fps}),
        13: ("SaveVideo", None, (1800, 60), (340, 320),
             {"video": [12, 0], "filename_prefix": f"video/{method}"}),
        14: ("MarkdownNote", "What this does", (40, 660), (710, 230), {"text": note}),
    }


def wan(method):
    return clip_graph(
        method, "wan2.1_t2v_1.3B_fp16.safetensors",
        ("CLIPLoader", {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan", "device": "default"}),
        "wan_2.1_vae.safetensors", 8.0, "EmptyHunyuanLatentVideo", (832, 480, 81), "uni_pc", 30, 6.0, 16.0)


def hunyuan15(method):
    return clip_graph(
        method, "hunyuanvideo1.5_720p_t2v_fp16.safetensors",
        ("DualCLIPLoader", {"clip_name1": "qwen_2.5_vl_7b_fp8_scaled.safetensors",
                            "clip_name2": "byt5_small_glyphxl_fp16.safetensors", "type": "hunyuan_video_15",
                            "device": "default"}),
        "hunyuanvideo15_vae_fp16.safetensors", 7.0, "EmptyHunyuanVideo15Latent", (1280, 720, 121), "euler", 20, 6.0,
        24.0)


def ltx2(method):
    """LTX-2: video and audio in one sampling; only the video's self-attention runs sparse."""
    checkpoint = "ltx-2-19b-dev-fp8.safetensors"
    node, own, note = sparse_node(method, [1, 0])
    return {
        1: ("CheckpointLoaderSimple", None, (40, 60), (360, 100), {"ckpt_name": checkpoint}),
        2: ("LTXAVTextEncoderLoader", None, (40, 210), (360, 110),
            {"text_encoder": "gemma_3_12B_it_fp4_mixed.safetensors", "ckpt_name": checkpoint, "device": "default"}),
        3: ("LTXVAudioVAELoader", None, (40, 370), (360, 60), {"ckpt_name": checkpoint}),
        4: (node, None, (450, 60), (320, 440), own),
        5: ("CLIPTextEncode", "Prompt", (820, 60), (360, 150), {"clip": [2, 0], "text": PROMPT}),
        6: ("CLIPTextEncode", "Negative prompt", (820, 260), (360, 130), {"clip": [2, 0], "text": NEGATIVE}),
        7: ("LTXVConditioning", None, (820, 440), (360, 80),
            {"positive": [5, 0], "negative": [6, 0], "frame_rate": 25.0}),
        8: ("EmptyLTXVLatentVideo", None, (820, 570), (360, 130),
            {"width": 1280, "height": 768, "length": 121, "batch_size": 1}),
        9: ("LTXVEmptyLatentAudio", None, (820, 750), (360, 130),
            {"audio_vae": [3, 0], "frames_number": 121, "frame_rate": 25.0, "batch_size": 1}),
        10: ("LTXVConcatAVLatent", None, (1230, 750), (240, 60), {"video_latent": [8, 0], "audio_latent": [9, 0]}),
        11: ("CFGGuider", None, (1230, 60), (240, 100),
             {"model": [4, 0], "positive": [7, 0], "negative": [7, 1], "cfg": 4.0}),
        12: ("KSamplerSelect", None, (1230, 210), (240, 60), {"sampler_name": "euler"}),
        13: ("LTXVScheduler", None, (1230, 320), (240, 160),
             {"steps": 20, "max_shift": 2.05, "base_shift": 0.95, "stretch": True, "terminal": 0.1,
              "latent": [10, 0]}),
        14: ("RandomNoise", None, (1230, 530), (240, 90), {"noise_seed": 1}),
        15: ("SamplerCustomAdvanced", None, (1520, 60), (240, 130),
             {"noise": [14, 0], "guider": [11, 0], "sampler": [12, 0], "sigmas": [13, 0], "latent_image": [10, 0]}),
        16: ("SparseAttentionReport", None, (1520, 250), (460, 420),
             {"latent": [15, 0], "model": [4, 0], "images": [18, 0]}),
        17: ("LTXVSeparateAVLatent", None, (1810, 60), (220, 60), {"av_latent": [15, 0]}),
        18: ("VAEDecode", None, (2070, 60), (220, 50), {"samples": [17, 0], "vae": [1, 2]}),
        19: ("LTXVAudioVAEDecode", None, (2070, 170), (220, 50), {"samples": [17, 1], "audio_vae": [3, 0]}),
        20: ("CreateVideo", None, (2070, 280), (220, 100), {"images": [18, 0], "audio": [19, 0], "fps": 25.0}),
        21: ("SaveVideo", None, (2070, 440), (340, 320), {"video": [20, 0], "filename_prefix": f"video/ltx2_{method}"}),
        22: ("MarkdownNote", "What this does", (40, 560), (730, 230), {"text": note}),
    }


FASTWAN_VSA_3STEP = {
    1: ("SparseDiffusionModelLoader", None, (40, 60), (360, 110),
        {"model_name": "FastWan2.1-T2V-1.3B-Diffusers", "weight_dtype": "default"}),
    2: ("CLIPLoader", None, (40, 220), (360, 110),
        {"clip_name": "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "type": "wan", "device": "default"}),
    3: ("VAELoader", None, (40, 380), (360, 60), {"vae_name": "wan_2.1_vae.safetensors"}),
    4: ("ModelSamplingSD3", None, (450, 60), (320, 60), {"model": [1, 0], "shift": 8.0}),
    5: ("VideoSparseAttentionPatch", None, (450, 170), (320, 440),
        {"model": [4, 0], "sparsity": 0.8, "tile_size": "auto", "backend": "auto", "start_percent": 0.0,
         "end_percent": 1.0, "dense_blocks": "", "min_tokens": 12288, "strict": False, "verbose": False}),
    6: ("CLIPTextEncode", "Prompt", (820, 60), (360, 150),
        {"clip": [2, 0],
         "text": PROMPT}),
    7: ("EmptyHunyuanLatentVideo", None, (820, 260), (360, 130),
        {"width": 832, "height": 448, "length": 61, "batch_size": 1}),
    8: ("ManualSigmas", "DMD schedule: 1000, 757, 522", (820, 440), (360, 60), {"sigmas": "1.0, 0.757, 0.522, 0.0"}),
    9: ("KSamplerSelect", None, (820, 550), (360, 60), {"sampler_name": "lcm"}),
    10: ("RandomNoise", None, (820, 660), (360, 90), {"noise_seed": 1}),
    11: ("BasicGuider", None, (1230, 60), (240, 60), {"model": [5, 0], "conditioning": [6, 0]}),
    12: ("SamplerCustomAdvanced", None, (1230, 170), (240, 130),
         {"noise": [10, 0], "guider": [11, 0], "sampler": [9, 0], "sigmas": [8, 0], "latent_image": [7, 0]}),
    13: ("SparseAttentionReport", None, (1230, 350), (460, 420),
         {"latent": [12, 0], "model": [5, 0], "images": [14, 0]}),
    14: ("VAEDecode", None, (1530, 60), (220, 50), {"samples": [12, 0], "vae": [3, 0]}),
    15: ("CreateVideo", None, (1530, 170), (220, 80), {"images": [14, 0], "fps": 16.0}),
    16: ("SaveVideo", None, (1800, 60), (340, 320), {"video": [15, 0], "filename_prefix": "video/fastwan_vsa"}),
    17: ("MarkdownNote", "What this does", (40, 660), (710, 230),
         {"text": "**FastWan** is Wan 2.1 distilled to three steps and trained with Video Sparse Attention. Its gates "
                  "are part of the model: the loader keeps them, and the VSA node uses them.\n\n"
                  "- Put the diffusers folder `FastWan2.1-T2V-1.3B-Diffusers` into `models/diffusion_models` or "
                  "`models/diffusers`.\n- `start_percent` 0 and `sparsity` 0.8 are what it was trained with; `auto` "
                  "takes its 4x4x4 tiles.\n- Three steps at timesteps 1000, 757 and 522: sampler `lcm`, sigmas 1.0, "
                  "0.757, 0.522, 0. No cfg.\n\nDense, or without its gates, this model gives noise or blur."}),
}
METHODS = ("vsa", "sta")
GRAPHS = {
    **{f"wan_t2v_{method}": wan(method) for method in METHODS},
    **{f"hunyuan_video15_t2v_{method}": hunyuan15(method) for method in METHODS},
    **{f"ltx2_t2v_{method}": ltx2(method) for method in METHODS},
    "fastwan_vsa_3step": FASTWAN_VSA_3STEP,
}
