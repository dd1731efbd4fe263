"""Every published kind of sparse-trained file, as a file without weights: described as what it is, or refused with the
sentence that leads on. What a file cannot tell, its user does (trained_as)."""
import json

import pytest
import safetensors.torch
import torch

from make_checkpoints import diffusers_state, fastvideo_name, wan_shapes, write_hollow, write_shards
from make_sla_checkpoints import NATIVE, renamed, wrapped
from pack.checkpoints.convert import convert
from pack.checkpoints.describe import describe
from pack.checkpoints.plan import plan_of
from pack.checkpoints.safetensors_file import CheckpointError
from pack.checkpoints.source import open_checkpoint
from pack.checkpoints.torch_source import open_for_conversion
from pack.checkpoints.trained import CHOICES, METADATA_KEY

LAYERS = 2


def wan(channels=16, gates=False, projections=False):
    """Native name -> shape of a tiny Wan; channels 36 is what image-to-video takes in."""
    shapes = wan_shapes(LAYERS, 256, 64, 64)
    shapes["patch_embedding.weight"] = (256, channels, 1, 2, 2)
    shapes = {name: shape for name, shape in shapes.items() if gates or "gate" not in name}
    if projections:
        shapes |= {NATIVE.format(n, part): shape for n in range(LAYERS)
                   for part, shape in (("weight", (128, 128)), ("bias", (128,)))}
    return shapes


def turbo(channels=16):
    return {**wan(channels, projections=True), "patch_embedding.weight": (256, channels * 4)}


def h3_lora(extra=()):
    names = [f"diffusion_model.blocks.{n}.attn.qkv_proj.lora_{part}.weight" for n in range(4) for part in "AB"]
    return dict.fromkeys([*names, *extra], (4, 4))


def ltx():
    return {f"transformer_blocks.{n}.attn1.to_{part}.weight": (64, 64) for n in range(2) for part in "qkv"}


def nvfp4(scales):
    """A linear layer of each block as 4-bit numbers with these scales beside them."""
    return {**wan(), **{f"blocks.{n}.self_attn.q.{scale}": (1,) for n in range(LAYERS) for scale in scales}}


def hollow(name, shapes, metadata=None):
    return lambda folder: write_hollow(shapes, folder / name, metadata=metadata)


def pth(name, state):
    def write(folder):
        torch.save({key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in state.items()}, folder / name)
        return folder / name
    return write


def shards(name, rename):
    def write(folder):
        (folder / name).mkdir()
        state = {key: torch.zeros(shape) for key, shape in wan(projections=True).items()}
        return write_shards(rename(state), folder / name, 2)
    return write


RCM_T2V, RCM_I2V = "sigmas 0.98765, 0.93378, 0.8529, 0.60898, 0 with lcm", "sigmas 0.99502, 0.93378, 0.8529, 0.60898, 0"
NOT_DENSE = "dense or without its projections it is not the model that was trained"
DESCRIBED = {
    # TurboDiffusion's own files, after conversion or as somebody made them safetensors
    "flat patch": (hollow("TurboWan2.1-T2V-1.3B-480P.safetensors", turbo()), None,
                   ["Wan: 2 layers", "Trained as TurboWan2.1-T2V-1.3B-480P: ratio 0.1 (0.15 for quality)", RCM_T2V,
                    "cfg 1, no other few-step LoRA", "no other sparse node", NOT_DENSE]),
    "5-D patch": (hollow("TurboWan2.1-T2V-14B-720P.safetensors", wan(projections=True)), None,
                  ["SLA projections in 2 of 2 layers", "TurboWan2.1-T2V-14B-720P", RCM_T2V]),
    "I2V, high": (hollow("TurboWan2.2-I2V-A14B-high-720P.safetensors", turbo(36)), None,
                  ["TurboWan2.2-I2V-A14B-720P", RCM_I2V, "the low one the other two (boundary 0.9)"]),
    "wrapped": (hollow("TurboWan2.1-T2V-14B-480P.safetensors", wrapped(turbo())), None,
                ["2 of 2", "14B-480P", RCM_T2V]),
    "renamed by its user": (hollow("mine.safetensors", turbo()), "TurboWan2.1-T2V-14B-480P",
                            ["Trained as TurboWan2.1-T2V-14B-480P", RCM_T2V]),
    "loayrashid": (shards("TurboWan2.1-T2V-1.3B-Diffusers", lambda state: renamed(
        state, "attn1.attn_impl", lambda name: fastvideo_name(next(iter(diffusers_state({name: 0})))))), None,
        ["read from 2 files in FastVideo's form", "TurboWan2.1-T2V-1.3B-480P", "2 of 2"]),
    "IPostYellow": (shards("TurboWan2.1-T2V-14B-Diffusers", lambda state: renamed(
        state, "attn1.attn_op.local_attn", lambda name: next(iter(diffusers_state({name: 0}))))), None,
        ["in diffusers' form", "Trained as TurboWan2.1-T2V-14B", "2 of 2"]),
    "FastWan": (hollow("FastWan2.1-T2V-1.3B.safetensors", wan(gates=True)), None,
                ["VSA gates in 2 of 2 layers", "sparsity 0.8, tile 4x4x4", "gives noise or blur"]),
    # nothing in the file shows it
    "NVFP4-Sparse, by its user": (
        hollow("high_nvfp4.safetensors", nvfp4(["weight_scale", "weight_scale_2", "comfy_quant"])),
        "Wan2.2-NVFP4-Sparse-T2V",
        ["is told by trained_as", "ratio 0.1, runs of 128 queries and 64 keys, no projection",
         "4 steps, sigmas 1, 0.9375, 0.83333, 0.625, 0 with euler, shift 5, cfg 1", "the low one the other two",
         "trained with sparse attention alone", "tokens that it learned to do without"]),
    "NVFP4-Sparse I2V, by metadata": (
        hollow("low.safetensors", wan(36), {METADATA_KEY: CHOICES["Wan2.2-NVFP4-Sparse-I2V"].to_json()}), None,
        ["is told by its metadata", "sigmas 1, 0.95455, 0.875, 0.7, 0 with euler, shift 7"]),
    "NVFP4-Sparse, by name": (hollow("Wan2.2-NVFP4-Sparse-I2V-high.safetensors", wan(36)), None,
                              ["if it is that, choose it in trained_as", "speaks of Wan2.2-NVFP4-Sparse-I2V"]),
    "told by both": (
        hollow("x.safetensors", wan(36), {METADATA_KEY: CHOICES["Wan2.2-NVFP4-Sparse-T2V"].to_json()}),
        "Wan2.2-NVFP4-Sparse-I2V",
        ["Its metadata say Wan2.2-NVFP4-Sparse-T2V: trained_as counts", "Trained as Wan2.2-NVFP4-Sparse-I2V"]),
    "TurboT2AV": (hollow("x.safetensors", ltx()), "TurboT2AV",
                  ["ratio 0.3, runs of 128", "dense attention is harmless, only slower"]),
    "a plain model": (hollow("wan2.1_t2v.safetensors", wan()), None, ["dense and sparse attention are both possible"]),
    "gates that somebody dropped": (
        hollow("q8.safetensors", wan(), {METADATA_KEY: CHOICES["FastWan2.1-T2V-1.3B"].to_json()}), None,
        ["WARNING: its metadata say that it was trained as FastWan2.1-T2V-1.3B with VSA, but VSA gates are not in"]),
}
REFUSED = {
    "TurboDiffusion": (pth("TurboWan2.1-T2V-1.3B-480P.pth", turbo()), None,
                       "python -m checkpoints.convert .*1.3B-480P"),
    "quant": (hollow("x-quant.safetensors", {**turbo(), "blocks.0.ffn.0.int8_weight": (64, 256)}), None,
              "TurboDiffusion's int8 weights .* checkpoints.convert"),
    "KsanaDiT, in memory": (hollow("x.safetensors", {**wan(), "blocks.0.self_attn.proj_l.weight": (128, 128)}), None,
                            "in a place that is not known here"),
    "H3 Turbo-SLA": (hollow("minimax_h3_fl2v_turbo_4step_v0.1_768p_sla_comfyui_bf16.safetensors", h3_lora()), None,
                     "is a LoRA.*LoRA loader, behind this node with trained_as MiniMax-H3-Turbo-SLA"),
    "FastH3's LoRA": (hollow("fasth3.safetensors", h3_lora(
        [f"transformer_blocks.{n}.attn.to_gate_compress.set_weight" for n in range(4)])), None,
        "is a LoRA.*and its gates, which that leaves out, through Attach VSA Gates"),
    "a LoRA with projections": (hollow("x.safetensors", h3_lora(
        ["blocks.0.attn1.attn_impl.proj_l.lora_A.weight"])), None, r"changes SLA projections \(proj_l\) too, which no"),
    "LightX2V's NVFP4": (hollow("high_nvfp4.safetensors", nvfp4(["weight_scale", "alpha", "input_global_scale"])), None,
                         "NVFP4 weights as LightX2V writes them .* Kijai/WanVideo_comfy_nvfp4"),
    "SLA projections on LTX": (hollow("x.safetensors", {**ltx(), NATIVE.format(0, "weight"): (128, 128)}), None,
                               "a model that is not Wan"),
    "not a name of the list": (hollow("x.safetensors", wan()), "TurboWan9", "wanted one of FastWan2.1-T2V-1.3B"),
    "TurboWan without projections": (hollow("x.safetensors", wan()), "TurboWan2.1-T2V-14B-480P",
                                     "wanted a file with SLA projections, it has none. Load the file as it was"),
    "FastWan without gates": (hollow("x.safetensors", turbo()), "FastWan2.1-T2V-1.3B",
                              "wanted a file with VSA gates, it has SLA projections"),
    "bare with projections": (hollow("x.safetensors", turbo()), "Wan2.2-NVFP4-Sparse-T2V",
                              "is not Wan2.2-NVFP4-Sparse-T2V, which has no SLA projections: set trained_as to auto"),
    "another family": (hollow("x.safetensors", wan()), "MiniMax-H3-Turbo-SLA",
                       "trained_as MiniMax-H3-Turbo-SLA is a MiniMax H3, this file is Wan. Set trained_as to auto"),
    "image for none": (hollow("x.safetensors", turbo()), "TurboWan2.2-I2V-A14B-720P",
                       "this one takes no start image, which that does"),
    "none for image": (hollow("x.safetensors", turbo(36)), "TurboWan2.1-T2V-14B-720P",
                       "this one takes a start image, which that does not. Set trained_as to auto, or to the other"),
    "LTX for Wan": (hollow("x.safetensors", wan()), "TurboT2AV", "is a LTX-Video, this file is Wan"),
    "none for H3": (hollow("x.safetensors", ltx()), "MiniMax-H3-Turbo-SLA", "this file is neither Wan nor MiniMax H3"),
}


def opened(path, trained_as):
    plan = plan_of(open_checkpoint(path))
    return plan if trained_as is None else plan.told_as(trained_as)


@pytest.mark.parametrize("row", DESCRIBED)
def test_a_published_file_is_described_as_what_it_is(tmp_path, row):
    write, trained_as, parts = DESCRIBED[row]
    text = describe(opened(write(tmp_path), trained_as))
    assert [part for part in parts if part not in text] == [], text


@pytest.mark.parametrize("row", REFUSED)
def test_a_file_that_cannot_be_right_is_refused_with_what_to_do(tmp_path, row):
    write, trained_as, message = REFUSED[row]
    with pytest.raises(CheckpointError, match=message):
        opened(write(tmp_path), trained_as)


@pytest.mark.parametrize(("name", "channels", "sigma"), [
    ("TurboWan2.1-T2V-14B-720P.pth", 16, "0.98765"), ("TurboWan2.2-I2V-A14B-low-720P.pth", 36, "0.99502")])
def test_the_converter_describes_turbodiffusions_own_files(tmp_path, name, channels, sigma):
    text = describe(plan_of(open_for_conversion(pth(name, turbo(channels))(tmp_path))))
    assert name.removesuffix(".pth").replace("-low", "") in text and sigma in text


def test_what_the_user_says_is_kept_by_the_converter(tmp_path):
    state = {name: torch.zeros(shape) for name, shape in wan().items()}
    safetensors.torch.save_file(state, tmp_path / "high.safetensors")
    convert(tmp_path / "high.safetensors", tmp_path / "out.safetensors", trained_as="Wan2.2-NVFP4-Sparse-T2V")
    plan = plan_of(open_checkpoint(tmp_path / "out.safetensors"))
    assert plan.trained == CHOICES["Wan2.2-NVFP4-Sparse-T2V"] and "told by its metadata" in describe(plan)


@pytest.mark.parametrize(("wish", "told"), [
    ({"attention": "comfy_kitchen_int8"}, "ask ComfyUI for comfy_kitchen_int8 (comfy_attention.config)"),
    ([{"attention": "comfy_kitchen_sol", "tau": 0.1}, {"attention": "comfy_kitchen_int8"}],
     "for comfy_kitchen_sol or comfy_kitchen_int8"),
    ("nonsense", "for something that cannot be read")])
def test_attentions_that_ask_for_one_of_comfyuis_are_told(tmp_path, wish, told):
    state = {name: torch.zeros(shape) for name, shape in wan().items()}
    for n in range(LAYERS):
        state[f"blocks.{n}.self_attn.comfy_attention.config"] = torch.tensor(list(json.dumps(wish).encode()),
                                                                             dtype=torch.uint8)
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    text = describe(plan_of(open_checkpoint(tmp_path / "x.safetensors")))
    assert told in text and "2 attention layers ask" in text and "A sparse node on the model takes its place" in text


def test_every_choice_can_be_written_into_metadata_and_read_back(tmp_path):
    for trained in CHOICES.values():
        path = write_hollow(wan(), tmp_path / "x.safetensors", metadata={METADATA_KEY: trained.to_json()})
        plan = plan_of(open_checkpoint(path))
        assert (plan.trained == trained) == trained.bare and (trained.name in describe(plan))
