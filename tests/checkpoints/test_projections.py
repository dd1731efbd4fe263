"""SLA's projections in a checkpoint: found under every published name, whole or refused, and told in words."""
import math
import re

import pytest
import safetensors.torch
import torch

from make_checkpoints import wan_shapes, write_hollow
from make_sla_checkpoints import NATIVE, SLA_KINDS, flat_patch, with_projections, write_sla
from pack.checkpoints.convert import convert
from pack.checkpoints.describe import describe
from pack.checkpoints.plan import plan_of
from pack.checkpoints.safetensors_file import CheckpointError
from pack.checkpoints.source import open_checkpoint
from pack.checkpoints.trained import METADATA_KEY, SLA, UNKNOWN_SLA, Trained, rcm_sigmas, trained_facts


@pytest.fixture(scope="module")
def weights():
    generator = torch.Generator().manual_seed(5)
    return with_projections({name: torch.randn(shape, generator=generator) * 0.02 for name, shape in wan_shapes(
        layers=2, dim=256, ffn_dim=64, text_dim=64).items()})


@pytest.fixture
def shapes():
    """Of a model with four layers and whole projections."""
    shapes = {name: shape for name, shape in wan_shapes(4, 256, 64, 64).items() if "gate" not in name}
    for n in range(4):
        shapes |= {NATIVE.format(n, "weight"): (128, 128), NATIVE.format(n, "bias"): (128,)}
    return shapes


def plan_from(shapes, path, **kw):
    return plan_of(open_checkpoint(write_hollow(shapes, path, **kw)))


def refused(shapes, path, message, **kw):
    with pytest.raises(CheckpointError, match=message):
        plan_from(shapes, path, **kw)


@pytest.mark.parametrize("kind", SLA_KINDS)
def test_every_way_of_publishing_converts_to_the_same_bits(weights, tmp_path, kind):
    source, target = write_sla(kind, weights, tmp_path), tmp_path / "out.safetensors"
    plan = plan_of(open_checkpoint(source))
    assert [sorted(parts) for parts in plan.projections.values()] == [["bias", "weight"]] * 2 and plan.layers == 2
    assert not any("proj_l" in name for name in plan.names.values())
    convert(source, target)
    found = safetensors.torch.load_file(target)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert plan_of(open_checkpoint(target)).trained == plan.trained == UNKNOWN_SLA


def test_the_real_key_list_of_turbowan_1_3b_maps_completely(tmp_path):
    """TurboDiffusion/TurboWan2.1-T2V-1.3B-480P: 30 layers of width 1536, 885 tensors, a 2-D patch embedding."""
    native = {name: shape for name, shape in wan_shapes().items() if "gate" not in name}
    native |= {NATIVE.format(n, part): shape for n in range(30) for part, shape in (
        ("weight", (128, 128)), ("bias", (128,)))}
    native["patch_embedding.weight"] = (1536, 64)
    assert len(native) == 885
    path = write_hollow(native, tmp_path / "TurboWan2.1-T2V-1.3B-480P.safetensors")
    plan = plan_of(open_checkpoint(path))
    assert (plan.layers, plan.width, plan.naming, len(plan.projections)) == (30, 1536, "native", 30)
    assert plan.shape_of("patch_embedding.weight") == (1536, 16, 1, 2, 2)
    assert describe(plan).splitlines() == [
        "Wan 1.3B: 30 layers of width 1536, 1.42 billion weights in bfloat16, read from 1 file",
        "SLA projections in 30 of 30 layers",
        "Trained as TurboWan2.1-T2V-1.3B-480P: ratio 0.1 (0.15 for quality), runs of 128 queries and 64 keys, feature "
        "map softmax",
        "Sample with 4 steps, sigmas 0.98765, 0.93378, 0.8529, 0.60898, 0 with lcm, cfg 1, no other few-step LoRA",
        "WARNING: trained with SLA. Sample it through Sparse Linear Attention (SLA) with start_percent 0 and no other "
        "sparse node; dense or without its projections it is not the model that was trained"]


@pytest.mark.parametrize(("name", "known_as", "first_sigma"), [
    ("TurboWan2.1-T2V-1.3B-480P.safetensors", "TurboWan2.1-T2V-1.3B-480P", 0.98765),
    ("TurboWan2.1-T2V-14B-480P.safetensors", "TurboWan2.1-T2V-14B-480P", 0.98765),
    ("TurboWan2.1-T2V-14B-720P.safetensors", "TurboWan2.1-T2V-14B-720P", 0.98765),
    ("TurboWan2.1-T2V-14B-Diffusers", "TurboWan2.1-T2V-14B", 0.98765),
    ("TurboWan2.2-I2V-A14B-high-720P.safetensors", "TurboWan2.2-I2V-A14B-720P", 0.99502),
    ("turbowan2.2_i2v_a14b_low_720p.safetensors", "TurboWan2.2-I2V-A14B-720P", 0.99502)])
def test_released_models_are_known_by_name(name, known_as, first_sigma):
    trained = trained_facts({}, ("models", name, "transformer"), SLA)
    assert (trained.name, trained.method, trained.ratio, trained.query_run, trained.feature) == (
        known_as, "SLA", 0.1, 128, "softmax")
    assert trained.sigmas[0] == first_sigma and trained.sigmas[-1] == 0 and trained.steps == 4
    assert trained_facts({}, (name,)).method == "VSA", "projections are told from gates by what is in the file"
    assert Trained(**{**trained.__dict__}) == trained_facts({METADATA_KEY: trained.to_json()}, (), SLA)


@pytest.mark.parametrize(("largest", "first"), [(80, 0.98765), (200, 0.99502), (1600, 0.99938)])
def test_the_sigmas_are_turbodiffusions(largest, first):
    wanted = (first, 0.93378, 0.85290, 0.60898, 0)
    assert all(math.isclose(x, y, abs_tol=1e-5) for x, y in zip(rcm_sigmas(largest), wanted, strict=True))
    assert rcm_sigmas(largest, 2) == (*rcm_sigmas(largest)[:2], 0), "fewer steps leave out the last ones"


@pytest.mark.parametrize("pattern", [r"blocks\.1\..*proj_l", r"blocks\.[13]\..*proj_l"])
def test_projections_for_some_layers_only_are_refused(tmp_path, shapes, pattern):
    some = {name: shape for name, shape in shapes.items() if not re.match(pattern, name)}
    refused(some, tmp_path / "x.safetensors", r"SLA projections for [23] of 4 layers, none for layer 1.*: wanted all")


@pytest.mark.parametrize(("name", "shape", "message"), [
    (NATIVE.format(2, "weight"), (64, 64), r"a weight of shape \[64, 64\] in layer 2, wanted \[128, 128\]: it belongs"),
    (NATIVE.format(2, "bias"), (64,), r"a bias of shape \[64\] in layer 2, wanted \[128\]"),
    (NATIVE.format(2, "bias"), None, "projection of layer 2 has no bias"),
    (NATIVE.format(7, "weight"), (128, 128), "projections for 8 layers, this model has 4: they belong"),
    ("blocks.0.attn1.attn_impl.proj_l.weight", (128, 128), "two names for one SLA projection"),
    ("blocks.0.self_attn.proj_l.weight", (128, 128), "in a place that is not known here"),
    ("blocks.0.attn1.attn_impl.proj_l.lora_A", (4, 128), "in a place that is not known here"),
    ("blocks.0.to_gate_compress.weight", (256, 256), r"SLA projections \(proj_l\) and VSA gates too")])
def test_projections_that_cannot_be_right_are_refused(tmp_path, shapes, name, shape, message):
    changed = {**shapes, name: shape} if shape else {key: value for key, value in shapes.items() if key != name}
    refused(changed, tmp_path / "x.safetensors", message)


def test_projections_of_another_family_are_refused(tmp_path):
    shapes = {"video_patch_proj.weight": (128, 96), "audio_patch_proj.weight": (128, 32),
              "blocks.0.attn.qkv_proj.weight": (768, 128), "blocks.0.attn1.attn_impl.proj_l.weight": (128, 128)}
    refused(shapes, tmp_path / "h3.safetensors", "a model that is not Wan")
    ltx = {"transformer_blocks.0.attn1.to_q.weight": (64, 64), "transformer_blocks.0.attn1.proj_l.weight": (64, 64)}
    refused(ltx, tmp_path / "ltx.safetensors", "in a place that is not known here")


def test_int8_weights_are_refused_with_the_file_to_take_instead(tmp_path, shapes):
    shapes["blocks.0.ffn.0.int8_weight"] = shapes.pop("blocks.0.ffn.0.weight")
    refused(shapes, tmp_path / "TurboWan2.1-T2V-1.3B-480P-quant.safetensors",
            "Use the file of the same name without -quant, or convert it: ")


def test_a_flat_patch_embedding_that_is_no_patch_is_refused(tmp_path, shapes):
    shapes["patch_embedding.weight"] = (256, 63)
    refused(shapes, tmp_path / "x.safetensors", r"patch embedding of shape \[256, 63\], wanted \[256, channels \* 4\]")


def test_a_flat_patch_embedding_is_the_convolutions_numbers_in_a_row(weights):
    """Upstream cuts a latent into patches (c, t, h, w) and multiplies: what a convolution over its patches gives."""
    x, flat = torch.randn(1, 16, 3, 8, 10), flat_patch(weights)["patch_embedding.weight"]
    patches = x.unfold(3, 2, 2).unfold(4, 2, 2).permute(0, 2, 3, 4, 1, 5, 6).flatten(4)
    wanted = torch.nn.functional.conv3d(x, flat.view(256, 16, 1, 2, 2), stride=(1, 2, 2)).permute(0, 2, 3, 4, 1)
    assert torch.allclose(patches @ flat.T, wanted, atol=1e-5)


def test_metadata_of_another_method_is_refused(tmp_path, shapes):
    told = Trained("mine", 0.8).to_json()
    path = write_hollow(shapes, tmp_path / "x.safetensors", metadata={METADATA_KEY: told})
    with pytest.raises(CheckpointError, match="says trained with VSA, but the tensors are those of SLA"):
        describe(plan_of(open_checkpoint(path)))
