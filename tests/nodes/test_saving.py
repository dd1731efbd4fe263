"""A gated model saved by ComfyUI's own nodes and loaded again."""
import gc
import weakref

import pytest
import safetensors.torch
import torch

from make_checkpoints import wan_shapes
from make_tiny import save
from pack.checkpoints.source import open_checkpoint
from pack.checkpoints.trained import METADATA_KEY

GRID = (5, 10, 12)
MODEL = "model.diffusion_model."


@pytest.fixture(scope="module")
def published(comfyui, tmp_path_factory):
    """A gated Wan with text of the real width, which a saved file says nothing of, under a released name."""
    generator = torch.Generator().manual_seed(8)
    shapes = wan_shapes(layers=2, dim=256, ffn_dim=64, text_dim=4096)
    state = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    path = tmp_path_factory.mktemp("published") / "fastwan2.1_t2v_1.3b.safetensors"
    save(state, path)
    return path, state


@pytest.fixture
def save_model(comfyui, tmp_path, monkeypatch):
    """save_model(model) -> the file that ComfyUI's Save Model node writes."""
    import folder_paths
    from comfy_extras.nodes_model_merging import ModelSave
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))

    def run(model, node=ModelSave):
        with torch.inference_mode():
            node().save(model, filename_prefix="models/saved", prompt={"1": {}})
        return sorted((tmp_path / "models").glob("saved_*.safetensors"))[-1]
    return run


def gates_in(path):
    return {name: value for name, value in safetensors.torch.load_file(path).items() if "to_gate_compress" in name}


def test_a_saved_model_has_its_gates_and_its_training_and_samples_the_same(published, load, save_model, vsa, draw,
                                                                           run_of):
    path, state = published
    model, description = load(path)
    saved = save_model(vsa(model, 0.8))
    assert {name.removeprefix(MODEL): value for name, value in gates_in(saved).items()}.keys() == {
        name for name in state if "to_gate_compress" in name}
    assert all(torch.equal(value, state[name.removeprefix(MODEL)]) for name, value in gates_in(saved).items())
    again, told = load(saved)
    assert told.splitlines()[1:] == description.splitlines()[1:] and "Trained as FastWan2.1-T2V-1.3B" in told
    first, second = vsa(model, 0.8), vsa(again, 0.8)
    assert torch.equal(draw(second, GRID), draw(first, GRID)) and run_of(second).gated.total() == 4


def test_what_comfyui_loads_from_a_saved_file_is_as_if_the_gates_were_not_there(published, load, save_model, draw,
                                                                                caplog):
    from sampling import load as load_by_core
    model = load(published[0])[0]
    with torch.inference_mode():
        core = load_by_core(save_model(model))
    assert torch.equal(draw(core, GRID), draw(model, GRID)) and METADATA_KEY not in caplog.text


@pytest.mark.parametrize("patches", [("clone",), ("vsa", "clone"), ("shift", "vsa", "clone", "clone"), ("lora", "vsa")])
def test_every_clone_is_saved_with_its_gates(published, load, save_model, vsa, patches):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3
    model, wanted = load(published[0])[0], published[1]
    for patch in patches:
        if patch == "lora":
            model = model.clone()
            model.add_patches({"diffusion_model.head.head.bias": ("diff", (torch.ones(64),))}, 0.5)
        else:
            model = {"clone": lambda m: m.clone(), "vsa": vsa,
                     "shift": lambda m: ModelSamplingSD3().patch(m, 3.0)[0]}[patch](model)
    found = safetensors.torch.load_file(save_model(model))
    gates = {name: value for name, value in found.items() if "to_gate_compress" in name}
    assert len(gates) == 4 and all(torch.equal(value, wanted[name.removeprefix(MODEL)])
                                   for name, value in gates.items())
    bias = wanted["head.head.bias"] + (0.5 if "lora" in patches else 0)
    assert torch.allclose(found[MODEL + "head.head.bias"], bias)


def test_differences_of_a_lora_are_saved_in_the_gates_whether_they_are_loaded_or_not(
        gated, state, with_gates, save_model, vsa, draw, tmp_path):
    delta = {name.replace(".weight", ".diff"): torch.full_like(value, 0.25) for name, value in state.items()
             if name.endswith("to_gate_compress.weight")}
    save(delta, tmp_path / "lora.safetensors")
    patched = with_gates(gated, tmp_path / "lora.safetensors", 0.5)
    wanted = {name: value + 0.125 * name.endswith("weight") for name, value in state.items() if "to_gate" in name}

    def check():
        for name, value in gates_in(save_model(patched)).items():
            assert torch.allclose(value, wanted[name.removeprefix(MODEL)], atol=1e-6)
    check()
    draw(vsa(patched, 0.5), GRID)
    check()
    plain = gates_in(save_model(gated))       # its clone's patches may still be in the loaded weights
    assert all(torch.equal(value, state[name.removeprefix(MODEL)]) for name, value in plain.items())


def test_gates_of_another_file_replace_those_that_would_be_saved(gated, state, with_gates, save_model, tmp_path):
    other = {name: value + 1 for name, value in state.items() if "to_gate_compress" in name}
    save(other, tmp_path / "other.safetensors")
    found = gates_in(save_model(with_gates(gated, tmp_path / "other.safetensors")))
    assert all(torch.equal(value, other[name.removeprefix(MODEL)]) for name, value in found.items()) and len(found) == 4


def test_minimax_h3_is_saved_under_the_names_that_its_gates_are_published_with(load_tiny, with_gates, save_model,
                                                                               tmp_path):
    gates = {f"blocks.{n}.attn.to_gate_compress.weight": torch.randn(256, 128) for n in range(2)}
    save(gates, tmp_path / "FastH3.safetensors")
    found = gates_in(save_model(with_gates(load_tiny("tiny_minimax_h3"), tmp_path / "FastH3.safetensors")))
    assert found.keys() == {MODEL + name for name in gates}
    assert all(torch.equal(value, gates[name.removeprefix(MODEL)]) for name, value in found.items())


def test_gates_in_eight_bits_are_saved_as_they_are(published, load, save_model):
    from pack.nodes.trained.gates import KEY
    model = load(published[0], "fp8_e4m3fn")[0]
    inside = model.get_additional_models_with_key(KEY)[0].model.state_dict()
    found = gates_in(save_model(model))
    assert all(value.dtype == torch.float8_e4m3fn for value in found.values())
    for n in range(2):
        saved = found[f"{MODEL}blocks.{n}.to_gate_compress.weight"]
        assert torch.equal(saved.float(), inside[f"layers.{n}.weight"].float())


def test_a_model_without_gates_is_saved_as_before(wan, vsa, save_model):
    found = safetensors.torch.load_file(save_model(vsa(wan, 0.5)))
    assert not [name for name in found if "gate" in name or METADATA_KEY in name]


def test_a_model_that_can_be_saved_is_freed_as_soon_as_it_is_dropped(gated):
    clone = gated.clone()
    gone = weakref.ref(clone)
    assert clone.state_dict_for_saving is not None
    gc.disable()
    try:
        del clone
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(1 << 17, dtype=torch.uint8)])
def test_a_training_told_in_something_else_than_a_few_bytes_is_refused(tmp_path, state, tensor):
    save({**state, METADATA_KEY: tensor}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=f"found {METADATA_KEY} of .*wanted up to 65536 U8"):
        open_checkpoint(tmp_path / "x.safetensors")
