"""The trained tiny models as ComfyUI loads them, and what a clip of theirs shows."""
import json

import pytest
import torch
from safetensors.torch import load_file

from pack.quality import judge, model_file, scenes

pytestmark = pytest.mark.usefixtures("comfyui")


def test_comfyui_previews_a_latent_as_the_scene_it_was_made_of():
    from comfy.latent_formats import Wan21
    factors, bias = torch.tensor(Wan21.latent_rgb_factors), torch.tensor(Wan21.latent_rgb_factors_bias)
    assert torch.equal(factors, scenes.FACTORS) and torch.equal(bias, scenes.BIAS)


def test_the_file_is_a_wan_21_in_single_precision_and_says_how_to_sample_it():
    from pack.quality import clips
    model = clips.load("dense")
    assert type(model.model).__name__ == "WAN21" and model.model.get_dtype() is torch.float32
    told = model_file.sampling_of(model_file.FILES["dense"])
    assert told == json.loads(json.dumps(model_file.SAMPLING))
    assert model.get_model_object("model_sampling").shift == told["shift"]
    assert model_file.FILES["dense"].stat().st_size < 16 * 2**20


def test_a_sparse_clip_keeps_what_the_dense_one_shows(monkeypatch):
    from pack.quality import clips
    told = {**model_file.SAMPLING, "steps": 4}
    monkeypatch.setattr(model_file, "sampling_of", lambda path: told)
    model = clips.load("dense")
    dense = clips.sample(model, 1004)
    latent, facts = clips.sparse(model, 1004, sparsity=0.5, tile_size="4x4x4", start_percent=0.2, far_field="on")
    assert facts == {"density": pytest.approx(0.5), "sparse_steps": 3, "work": pytest.approx(5 / 8)}
    asked = {shape.colour for shape in model_file.scene_of(1004).shapes}
    shown = set().union(*({blob[0] for blob in judge.blobs_of(scenes.to_rgb(dense)[:, t])} for t in range(8)))
    assert shown & asked
    assert judge.relative(latent, dense) < 0.5 < judge.relative(clips.sample(model, 1004, noise=7), dense)


def test_the_gated_model_samples_as_it_was_trained(monkeypatch):
    """One step through the loader and the VSA node is one step with the attention that its training ran."""
    import comfy.ldm.wan.model as wan
    import comfy.sample
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3

    from pack.nodes.hook.hook import SparseAttentionHook
    from pack.nodes.methods.video_sparse_attention import VideoSparseAttentionPatch
    from pack.nodes.trained.sparse_model import load_sparse_model
    from pack.quality import gated, train
    path = model_file.FILES["gated"]
    model, description = load_sparse_model(path, {})
    assert "0.9" in description and "4x4x4" in description
    model = ModelSamplingSD3().patch(model, 3.0)[0]
    patched = VideoSparseAttentionPatch.execute(model, gated.SPARSITY, backend="reference", min_tokens=0,
                                                start_percent=0.0)[0]
    noise = torch.randn(1, 16, 8, 32, 32, generator=torch.Generator().manual_seed(0))
    words = scenes.words(model_file.scene_of(3))[None]
    with torch.inference_mode():
        found = comfy.sample.sample(patched, noise, 1, 1.0, "euler", "simple", [[words, {}]], [[words, {}]],
                                    torch.zeros_like(noise), disable_pbar=True, seed=0)
    assert set(SparseAttentionHook.of(patched)[-1].last_run.gated) == {0, 1, 2, 3}

    for name in ("apply_rope1", "optimized_attention"):
        monkeypatch.setattr(wan, name, getattr(wan, name))            # put back what `build` puts in their place
    trained, gates = train.build(with_gates=True)
    prefix = "model.diffusion_model."
    state = {k.removeprefix(prefix): v.float() for k, v in load_file(path).items() if k.startswith(prefix)}
    trained.load_state_dict(state)
    gates.grid = gated.grid_of(noise)
    with torch.inference_mode():
        wanted = noise - trained(noise, torch.tensor([1000.0]), words)
    found = model.model.latent_format.process_in(found)
    assert judge.relative(found, wanted) < 1e-4
