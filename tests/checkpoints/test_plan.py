"""What a checkpoint is, decided from its header, and what is refused."""
import json
import re

import pytest

from make_checkpoints import diffusers_state, wan_shapes, write_hollow
from pack.checkpoints.describe import describe
from pack.checkpoints.plan import plan_of
from pack.checkpoints.safetensors_file import CheckpointError
from pack.checkpoints.source import open_checkpoint
from pack.checkpoints.trained import METADATA_KEY, UNKNOWN, Trained, trained_facts


def plan_from(shapes, path, **kw):
    return plan_of(open_checkpoint(write_hollow(shapes, path, **kw)))


def refused(shapes, path, message):
    with pytest.raises(CheckpointError, match=message):
        plan_from(shapes, path)


@pytest.fixture
def shapes():
    return wan_shapes(layers=4, dim=256, ffn_dim=64, text_dim=64)


def test_the_real_key_list_of_fastwan_1_3b_maps_completely_in_both_namings(tmp_path):
    """FastVideo/FastWan2.1-T2V-1.3B-Diffusers: 30 layers, width 1536, feed-forward 8960, text 4096, bias on gates."""
    native = wan_shapes()
    diffusers = diffusers_state(native)
    assert len(native) == len(diffusers) == 825 + 60
    folder = tmp_path / "FastWan2.1-T2V-1.3B-Diffusers" / "transformer"
    write_hollow(diffusers, folder / "diffusion_pytorch_model.safetensors", "F32")
    plan = plan_of(open_checkpoint(folder.parent))
    assert (plan.layers, plan.width, plan.naming) == (30, 1536, "diffusers")
    assert set(plan.names.values()) == {name for name in native if "gate" not in name}
    assert [sorted(parts) for parts in plan.gates.values()] == [["bias", "weight"]] * 30
    assert describe(plan).splitlines() == [
        "Wan 1.3B: 30 layers of width 1536, 1.49 billion weights in float32, read from 1 file in diffusers' form",
        "VSA gates in 30 of 30 layers",
        "Trained as FastWan2.1-T2V-1.3B: sparsity 0.8, tile 4x4x4, clips of 832x448x61 (width x height x frames)",
        "Sample with 3 steps, sigmas 1, 0.757, 0.522, 0 with lcm, shift 8, cfg 1, no other few-step LoRA",
        "WARNING: trained with VSA. Sample it through Video Sparse Attention (VSA) with start_percent 0; dense or "
        "without its gates it gives noise or blur"]


def test_a_model_without_gates_is_described_without_a_warning(tmp_path, shapes):
    plain = {name: shape for name, shape in shapes.items() if "gate" not in name}
    text = describe(plan_from(plain, tmp_path / "wan.safetensors"))
    assert "No VSA gates" in text and "WARNING" not in text


@pytest.mark.parametrize(("name", "sparsity"), [
    ("FastWan2.1-T2V-1.3B-Diffusers", 0.8), ("FastWan2.1-T2V-14B-480P-Diffusers", 0.9),
    ("FastWan2.1-T2V-14B-Diffusers", None), ("Wan2.1-VSA-T2V-14B-720P-Diffusers", 0.9),
    ("fastwan2.1_t2v_1.3b_vsa.safetensors", 0.8), ("FastVideo-FastH3-4-step-Preview-v1-VSA-DataFree", 0.9)])
def test_released_models_are_known_by_name(name, sparsity):
    trained = trained_facts({}, ("models", name, "transformer"))
    assert trained is not UNKNOWN and trained.sparsity == sparsity and trained.tile == (4, 4, 4)


def test_metadata_says_more_than_a_name():
    told = Trained("mine", 0.85, (2, 4, 8), (1000, 500), 2, 5.0, "640x480x49")
    assert trained_facts({METADATA_KEY: told.to_json()}, ("FastWan2.1-T2V-1.3B",)) == told


@pytest.mark.parametrize("text", ["{", "[]", '{"name": "x", "tile": "4x4x4"}', '{"sparsity": 0.8}'])
def test_metadata_that_cannot_be_read_is_refused(text):
    with pytest.raises(CheckpointError, match="metadata 'video_sparse_attention' cannot be read"):
        trained_facts({METADATA_KEY: text}, ())


def test_minimax_h3_gates_are_found_and_measured(tmp_path):
    shapes = {"video_patch_proj.weight": (128, 96), "audio_patch_proj.weight": (128, 32)}
    for n in range(2):
        shapes[f"blocks.{n}.attn.qkv_proj.weight"] = (3 * 256, 128)
        shapes[f"blocks.{n}.attn.to_gate_compress.weight"] = (256, 128)
    plan = plan_from(shapes, tmp_path / "FastH3.safetensors")
    assert (plan.family, plan.layers, len(plan.gates), plan.trained.sparsity) == ("MiniMax H3", 2, 2, 0.9)
    shapes["blocks.1.attn.to_gate_compress.weight"] = (128, 128)
    refused(shapes, tmp_path / "bad.safetensors", r"gate of shape \[128, 128\] in layer 1, this model takes \[256, 12")


def test_gates_for_some_layers_only_are_refused(tmp_path, shapes):
    some = {name: shape for name, shape in shapes.items() if not re.match(r"blocks\.[13]\.to_gate", name)}
    refused(some, tmp_path / "wan.safetensors", "gates for 2 of 4 layers, none for layer 1, 3: wanted all")


def test_a_gate_per_head_is_told_apart(tmp_path, shapes):
    """LTX-2.3 has a linear of this name with one output per head."""
    per_head = {name: (32, 256) if name.endswith("to_gate_compress.weight") else shape
                for name, shape in shapes.items()}
    refused(per_head, tmp_path / "wan.safetensors", "a gate per head as in LTX-2.3; VSA has one per channel")


def test_a_model_of_another_family_keeps_its_per_head_gates(tmp_path):
    shapes = {"transformer_blocks.0.attn1.to_q.weight": (64, 64),
              "transformer_blocks.0.attn1.to_gate_compress.weight": (4, 64), "adaln_single.linear.weight": (64, 64)}
    plan = plan_from(shapes, tmp_path / "ltx.safetensors")
    assert not plan.gates and "transformer_blocks.0.attn1.to_gate_compress.weight" in plan.names
    assert "is no VSA gate" in describe(plan)


def test_a_lora_is_refused_by_name(tmp_path):
    shapes = {f"diffusion_model.blocks.{n}.self_attn.q.lora_{part}.weight": (4, 4) for n in range(3) for part in "AB"}
    refused(shapes, tmp_path / "lora.safetensors", "is a LoRA: wanted a whole model. Load it through a LoRA loader$")
    shapes["diffusion_model.blocks.0.attn.to_gate_compress.set_weight"] = (4, 4)
    refused(shapes, tmp_path / "gates.safetensors", "and its gates, which that leaves out, through Attach VSA Gates")


def test_a_block_without_its_tensors_is_refused(tmp_path, shapes):
    some = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.2.ffn")}
    refused(some, tmp_path / "wan.safetensors", "block 2 lacks ffn.0.bias and 3 more: a file of the model is missing")


def test_a_whole_missing_block_is_refused(tmp_path, shapes):
    some = {name: shape for name, shape in shapes.items() if not name.startswith("blocks.1.")}
    refused(some, tmp_path / "wan.safetensors", "block 1 lacks")


def test_a_diffusers_model_of_another_kind_says_so_when_comfyui_does_not_know_it(tmp_path):
    path = write_hollow({"transformer_blocks.0.attn1.to_q.weight": (8, 8)}, tmp_path / "m" / "model.safetensors")
    assert "does not know: found names such as transformer_blocks.0.attn1" in plan_of(open_checkpoint(path)).refusal
    (path.parent / "config.json").write_text(json.dumps({"_class_name": "LTXVideoTransformer3DModel"}))
    assert "a diffusers model (LTXVideoTransformer3DModel): of those, only Wan" in plan_of(
        open_checkpoint(path)).refusal


def native_beside(config, shapes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return plan_from(shapes, tmp_path / "wan.safetensors")


@pytest.mark.parametrize("config", [
    {"_class_name": "CogVideoXTransformer3DModel", "num_attention_heads": 30, "text_dim": 1, "freq_dim": 2, "eps": 3},
    {"_class_name": "WanTransformer3DModel", "num_attention_heads": 12, "attention_head_dim": 128, "text_dim": 4096},
    {"_name_or_path": "FastVideo/FastWan2.1-T2V-1.3B-Diffusers", "architectures": ["T5EncoderModel"]}],
    ids=["of CogVideoX", "of another Wan", "of a text encoder"])
def test_a_config_beside_a_native_file_changes_nothing(tmp_path, shapes, config):
    alone, beside = plan_from(shapes, tmp_path / "alone" / "wan.safetensors"), native_beside(config, shapes, tmp_path)
    assert (beside.family, beside.names, beside.metadata, beside.trained) == (
        alone.family, alone.names, alone.metadata, alone.trained)


def test_a_config_of_another_model_beside_a_diffusers_file_is_not_believed(write):
    folder = write("diffusers file")
    right = json.loads(plan_of(open_checkpoint(folder)).metadata["config"])["transformer"]
    (folder / "config.json").write_text(json.dumps({
        "_class_name": "WanTransformer3DModel", "num_attention_heads": 40, "attention_head_dim": 128, "text_dim": 4096,
        "freq_dim": 512, "eps": 1e-3, "_name_or_path": "FastWan2.1-T2V-14B"}))
    plan = plan_of(open_checkpoint(folder))
    assert json.loads(plan.metadata["config"])["transformer"] == {
        name: right[name] for name in ("text_dim", "freq_dim")}
    assert plan.trained is UNKNOWN


def test_a_diffusers_file_without_a_config_keeps_what_its_tensors_say(write):
    folder = write("diffusers file")
    (folder / "config.json").unlink()
    assert json.loads(plan_of(open_checkpoint(folder)).metadata["config"])["transformer"] == {
        "text_dim": 64, "freq_dim": 256}


def test_a_config_that_cannot_be_read_is_described(write):
    folder = write("diffusers file")
    for text, found in (("{half", "config.json was left out, it cannot be read"), ("[" * 100_000, "cannot be read"),
                        ("[1]", "config.json was left out: found a JSON list, wanted an object")):
        (folder / "config.json").write_text(text)
        assert found in describe(plan_of(open_checkpoint(folder)))


def test_a_tensor_without_a_place_in_wan_is_refused(tmp_path, shapes):
    odd = {**diffusers_state(shapes), "blocks.0.attn1.to_mystery.weight": (8, 8)}
    refused(odd, tmp_path / "wan.safetensors", "1 tensors whose place in Wan is not known, such as blocks.0.attn1.to_")


def test_a_prefix_of_a_whole_checkpoint_is_taken_off(tmp_path, shapes):
    prefixed = {f"model.diffusion_model.{name}": shape for name, shape in shapes.items()}
    plan = plan_from(prefixed, tmp_path / "wan.safetensors")
    assert len(plan.gates) == 4 and "head.modulation" in plan.names.values()


def test_what_only_a_diffusers_config_knows_reaches_comfyui(write):
    plan = plan_of(open_checkpoint(write("diffusers file")))
    assert json.loads(plan.metadata["config"])["transformer"] == {
        "text_dim": 64, "freq_dim": 256, "eps": 1e-06, "num_heads": 2}

