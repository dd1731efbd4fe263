"""Tiny instances of ComfyUI's video models that no tiny file can stand for, ready to be sampled.

Detection fixes the width of Mochi and Cosmos; HuMo, Animate and ByT5 have parts of one size only, 30 to 160 MB.
Here ComfyUI's own model configuration is given a tiny `unet_config` instead of one detected in a file; everything
after the loader is ComfyUI's own.

    from comfy_boot import boot; boot()
    from bare_models import make_bare
    model = make_bare("bare_mochi")      # a ModelPatcher, as comfy.sd.load_diffusion_model returns it
"""
from make_tiny import TEXT_DIM, Unavailable, fill

WAN = dict(image_model="wan2.1", dim=128, ffn_dim=64, num_heads=1, text_dim=TEXT_DIM, in_dim=16, out_dim=16)
COSMOS = dict(max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16, patch_spatial=2,
              patch_temporal=1, model_channels=128, num_blocks=2, num_heads=2, crossattn_emb_channels=TEXT_DIM,
              concat_padding_mask=True, pos_emb_cls="rope3d", use_adaln_lora=True, adaln_lora_dim=16)

# name: (class in comfy.supported_models, unet_config). The position is the seed of the weights.
BARE = {
    "bare_mochi": ("GenmoMochi", dict(
        image_model="mochi_preview", depth=2, patch_size=2, num_heads=2, hidden_size_x=128, hidden_size_y=64,
        mlp_ratio_x=96.0, mlp_ratio_y=4.0, learn_sigma=False, in_channels=12, qk_norm=True, qkv_bias=False,
        out_bias=True, attn_drop=0.0, timestep_scale=1000.0, use_t5=True, t5_feat_dim=TEXT_DIM)),
    "bare_cosmos1": ("CosmosT2V", dict(
        COSMOS, image_model="cosmos", block_config="FA-CA-MLP", block_x_format="THWBD", affline_emb_norm=True,
        extra_per_block_abs_pos_emb=True, extra_per_block_abs_pos_emb_type="learnable")),
    "bare_cosmos_predict2": ("CosmosT2IPredict2", dict(
        COSMOS, image_model="cosmos_predict2", rope_enable_fps_modulation=False)),
    "bare_wan_animate": ("WAN22_Animate", dict(WAN, model_type="animate", in_dim=36, num_layers=2)),
    "bare_wan_humo": ("WAN21_HuMo", dict(WAN, model_type="humo", num_layers=2)),
    "bare_hunyuan15_byt5": ("HunyuanVideo15", dict(
        image_model="hunyuan_video", in_channels=65, patch_size=[1, 1, 1], out_channels=32, vec_in_dim=None,
        context_in_dim=TEXT_DIM, hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=2, depth_single_blocks=0,
        axes_dim=[16, 56, 56], theta=256, qkv_bias=True, guidance_embed=False, byt5=True, meanflow=False,
        use_cond_type_embedding=True, vision_in_dim=1152, meanflow_sum=True)),
}


def make_bare(name):
    """The ModelPatcher of that name, on the CPU in float32, with seeded random weights."""
    import comfy.model_patcher
    import comfy.supported_models
    import torch
    cls, unet_config = BARE[name]
    try:
        config = getattr(comfy.supported_models, cls)(dict(unet_config))
    except AttributeError as error:
        raise Unavailable(f"this ComfyUI has no model for {name}: {error}") from error
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu").eval()
    net = model.diffusion_model
    computed = {key: b.clone() for key, b in net.named_buffers() if key not in net.state_dict()}
    fill(net, 1000 + list(BARE).index(name))
    for key, value in computed.items():
        net.get_buffer(key).data = value
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)
