"""The models that the host tests sample: each loads as ComfyUI's own class and its attention matters."""
import pytest

import make_tiny

FILES = [name for name in (*make_tiny.BUILDERS, *make_tiny.DERIVED) if name != "tiny_fastwan_diffusers"]


@pytest.mark.parametrize("name", FILES)
def test_a_counting_override_changes_no_bit_and_zeroing_self_attention_changes_the_result(tiny, name):
    import torch

    import sampling
    model, recorder = sampling.load(tiny(name)), sampling.Recorder()
    kind = sampling.kind_of(model)
    plain = sampling.sample(model, kind)
    assert torch.isfinite(plain).all()
    assert torch.equal(sampling.sample(sampling.with_override(model, recorder), kind), plain)
    assert recorder.rows
    blind = sampling.sample(sampling.with_override(model, sampling.without_self_attention), kind)
    assert (plain - blind).norm() > 0.01 * plain.norm()


def test_a_batch_another_sampler_and_a_callback_reach_the_sampler(tiny):
    import sampling
    model, steps = sampling.load(tiny("tiny_wan_t2v")), []
    out = sampling.sample(model, "wan", batch=2, steps=3, sampler_name="heun", scheduler="normal",
                          callback=lambda step, denoised, x, total: steps.append((step, total)))
    assert out.shape == (2, 16, 5, 9, 12)
    assert steps == [(0, 3), (1, 3), (2, 3)]


def test_the_image_tokens_of_a_first_last_frame_model_are_used_and_optional(tiny):
    import sampling
    model = sampling.load(tiny("tiny_wan_flf"))
    with_image, without = (sampling.sample(model, "wan_flf", clip_vision=wanted) for wanted in (True, False))
    assert (with_image - without).norm() > 0.01 * without.norm()


def test_the_diffusers_folder_holds_a_config_and_the_gates(tiny):
    import json

    import safetensors.torch
    folder = tiny("tiny_fastwan_diffusers")
    layers = json.loads((folder / "config.json").read_text())["num_layers"]
    keys = safetensors.torch.load_file(folder / "diffusion_pytorch_model.safetensors").keys()
    assert {f"blocks.{n}.to_gate_compress.weight" for n in range(layers)} <= set(keys)
