"""What an interrupted search may go on with: measurements of the very same model, conditioning and settings."""
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

LATENT = (8, 16, 32)
ROOT = Path(__file__).resolve().parents[2]
NAME = "diffusion_model.blocks.0.ffn.0.weight"


def lora(rank_of_one=1.0):
    """A low-rank patch as ComfyUI's LoRA loaders make it."""
    from comfy.weight_adapter.lora import LoRAAdapter
    up = torch.full((64, 1), 0.5 * rank_of_one)
    return {NAME: LoRAAdapter({"a", "b"}, (up, torch.full((1, 256), 0.25), 1.0, None, None, None))}


def with_lora(model, strength=1.0, **kw):
    clone = model.clone()
    shape = dict(model.model.named_parameters())[NAME].shape
    patch = lora(**kw)
    patch[NAME].weights = (torch.full((shape[0], 1), 0.5 * kw.get("rank_of_one", 1.0)), torch.full((1, shape[1]), 0.25),
                           1.0, None, None, None)
    assert clone.add_patches(patch, strength) == [NAME]
    return clone


def with_shift(model, shift):
    from comfy_extras.nodes_model_advanced import ModelSamplingSD3
    return ModelSamplingSD3().patch(model, shift)[0]


def with_rescaled_cfg(model, multiplier):
    from comfy_extras.nodes_model_advanced import RescaleCFG
    node = RescaleCFG()
    return node.patch(model, multiplier)[0] if hasattr(node, "patch") else node.execute(model, multiplier)[0]


def with_image(conditions, value):
    return [[[embedding, {**extras, "concat_latent_image": torch.full((1, 16, *LATENT), value)}]
             for embedding, extras in condition] for condition in conditions]


class Control:
    """Stands for a control net: an object with settings and tensors."""

    def __init__(self, strength):
        self.strength, self.hint, self._cache = strength, torch.ones(1, 3, 8, 8), object()


def with_control(conditions, strength):
    return [[[embedding, {**extras, "control_of_a_pack": Control(strength)}] for embedding, extras in condition]
            for condition in conditions]


@pytest.fixture
def conditions(wan):
    from sampling import conditioning, kind_of
    generator = torch.Generator().manual_seed(0)
    return [conditioning(wan, kind_of(wan), generator, LATENT, 4.0) for _ in range(2)]


@pytest.fixture
def inputs(comfyui, wan, conditions):
    """What a search is started with."""
    return {"model": with_shift(with_lora(wan, 0.75), 5.0), "conditions": with_image(conditions, 0.5),
            "latent": {"samples": torch.zeros(1, 16, *LATENT)}, "seed": 3, "steps": 4, "cfg": 1.0,
            "sampler_name": "euler", "scheduler": "simple", "tile_size": "4x4x4", "measured_steps": 3}


CHANGES = {
    "a LoRA added": lambda wan, conditions: {"model": with_shift(with_lora(with_lora(wan, 0.75), 0.1), 5.0)},
    "the LoRA removed": lambda wan, conditions: {"model": with_shift(wan, 5.0)},
    "the LoRA's strength": lambda wan, conditions: {"model": with_shift(with_lora(wan, 0.5), 5.0)},
    "another LoRA for the same weights": lambda wan, conditions: {
        "model": with_shift(with_lora(wan, 0.75, rank_of_one=2.0), 5.0)},
    "the sampling shift": lambda wan, conditions: {"model": with_shift(with_lora(wan, 0.75), 3.0)},
    "the start image": lambda wan, conditions: {"conditions": with_image(conditions, 0.25)},
    "no start image": lambda wan, conditions: {"conditions": conditions},
    "a control net": lambda wan, conditions: {"conditions": with_control(with_image(conditions, 0.5), 1.0)},
    "a mask": lambda wan, conditions: {
        "latent": {"samples": torch.zeros(1, 16, *LATENT), "noise_mask": torch.ones(1, 1, *LATENT)}},
    "a latent that is not empty": lambda wan, conditions: {"latent": {"samples": torch.ones(1, 16, *LATENT)}},
    "the seed": lambda wan, conditions: {"seed": 4},
    "the steps": lambda wan, conditions: {"steps": 5},
    "the cfg": lambda wan, conditions: {"cfg": 2.0},
    "the scheduler": lambda wan, conditions: {"scheduler": "normal"},
    "the kernel": lambda wan, conditions: {"backend": "reference"},
    "a patch of the cfg": lambda wan, conditions: {
        "model": with_rescaled_cfg(with_shift(with_lora(wan, 0.75), 5.0), 0.7)},
}


@pytest.fixture
def resumed(comfyui, monkeypatch, tmp_path):
    """resumed(inputs) -> how many (step, layer) a search finds measured; it is interrupted then, or with
    stop_after=n once n were measured."""
    import comfy.model_management
    import folder_paths

    from pack.nodes.strategies import strategy_files, strategy_measurement
    from pack.nodes.strategies.strategy_search import STAStrategySearch
    strategy_files.register_folders()
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    original, resume = strategy_measurement.candidate_errors, strategy_measurement.Search._resume

    def run(inputs, stop_after=0):
        seen, calls = [], []

        def counted(*args, **kwargs):
            if len(calls) == stop_after:
                comfy.model_management.interrupt_current_processing()
            calls.append(1)
            return original(*args, **kwargs)

        def noted(self):
            resume(self)
            seen.append(len(self.done))
            if not stop_after:
                raise comfy.model_management.InterruptProcessingException
        monkeypatch.setattr(strategy_measurement, "candidate_errors", counted)
        monkeypatch.setattr(strategy_measurement.Search, "_resume", noted)
        given = dict(inputs)
        with torch.inference_mode(), pytest.raises(comfy.model_management.InterruptProcessingException):
            STAStrategySearch.execute(given.pop("model"), *given.pop("conditions"), given.pop("latent"), **given)
        return seen[0]
    return run


def test_only_a_search_of_the_very_same_inputs_goes_on(resumed, inputs, wan, conditions):
    import comfy.model_management
    comfy.model_management.unload_all_models()
    assert resumed(inputs, stop_after=3) == 0
    assert resumed(inputs) == 2                       # the first of three steps, two layers
    for change, changed in CHANGES.items():
        assert resumed({**inputs, **changed(wan, conditions)}) == 0, change
    again = {"model": with_shift(with_lora(wan, 0.75), 5.0), "conditions": with_image(conditions, 0.5)}
    comfy.model_management.unload_all_models()
    assert resumed({**inputs, **again, "goal": "density of the whole", "max_density": 0.5}) == 2


@pytest.fixture
def key(comfyui):
    from pack.nodes.strategies.search_key import search_key
    return search_key


def test_equal_content_has_an_equal_key_whatever_objects_hold_it(key, wan, conditions):
    def made():
        model = with_rescaled_cfg(with_shift(with_lora(wan, 0.75), 5.0), 0.7)
        return key(model, with_control(copy.deepcopy(conditions), 0.5), {"b": {2, 1}, "a": (1, "x")})
    assert made() == made()


def test_a_model_that_was_sampled_has_the_key_it_had(key, wan, vsa, draw):
    import comfy.model_management
    comfy.model_management.unload_all_models()
    model = with_shift(with_lora(wan, 0.75), 5.0)
    before, plain, patched = key(model), key(wan), vsa(model, 0.5)
    with_hook = key(patched)
    draw(patched, LATENT)
    draw(model, LATENT)                               # its patches are in the loaded weights now
    assert model.backup and (key(model), key(wan), key(patched)) == (before, plain, with_hook)
    assert len({before, plain, with_hook, key(vsa(model, 0.6))}) == 4


@pytest.mark.parametrize(("one", "other"), [
    (0.7, 0.6), ("a", "b"), ([1], (1,)), ({"a": 1}, {"a": 2}), ({1, 2}, {1, 3}), (torch.zeros(3), torch.ones(3)),
    (torch.zeros(2, 3), torch.zeros(3, 2)), (torch.zeros(3), torch.zeros(3).half()), (Control(1.0), Control(0.5)),
    ([Control(1.0)], [Control(1.0), Control(1.0)]), (1, True), (None, "None"), (["ab", "c"], ["a", "bc"])])
def test_other_content_has_another_key(key, wan, one, other):
    assert key(wan, one) == key(wan, copy.deepcopy(one)) and key(wan, one) != key(wan, other)


def test_what_a_closure_or_a_partial_holds_counts(key, wan):
    import functools

    def made(strength, options={"a": 1}):  # noqa: B006
        def patch(x, scale=strength):
            return x * strength
        return patch, functools.partial(patch, scale=strength), Control(strength).__init__
    for place in range(3):
        assert key(wan, made(0.5)[place]) == key(wan, made(0.5)[place]) != key(wan, made(0.6)[place])


def test_gates_and_their_loras_count(key, wan, gated, with_gates, gate_file, state, tmp_path):
    from make_tiny import save
    save({name.replace(".weight", ".diff"): value for name, value in state.items()
          if name.endswith("to_gate_compress.weight")}, tmp_path / "lora.safetensors")
    keys = [key(model) for model in (wan, gated, with_gates(gated, tmp_path / "lora.safetensors"),
                                     with_gates(gated, tmp_path / "lora.safetensors", 0.5))]
    assert len(set(keys)) == 4 and key(with_gates(wan, gate_file)) == keys[1]


def test_other_weights_of_the_same_class_have_another_key(key, tiny):
    from sampling import load
    with torch.inference_mode(False), torch.no_grad():
        one, other = load(tiny("tiny_wan_t2v")), load(tiny("tiny_wan_t2v"))
        assert key(one) == key(other)
        other.model.diffusion_model.blocks[1].self_attn.q.weight.mul_(1.5)
        assert key(one) != key(other)


def test_a_circle_of_objects_ends(key, wan):
    circle = Control(1.0)
    circle.me, circle.list = circle, [circle]
    circle.list.append(circle.list)
    assert key(wan, circle) == key(wan, circle)


PROCESS = """
import sys
sys.path[:0] = [{tests!r}, {nodes!r}, {dev!r}]
import conftest, comfy_boot, torch
comfy_boot.boot()
import test_search_key as made
print(made.key_of_everything({path!r}))
"""


def key_of_everything(path):
    import sampling
    from pack.nodes.strategies.search_key import search_key
    model = with_rescaled_cfg(with_shift(with_lora(sampling.load(path), 0.75), 5.0), 0.7)
    return search_key(model, Control(0.5), {"set": {"a", "b", "c", "d"}})


def test_the_key_is_the_same_in_another_process(comfyui, tiny):
    path = str(tiny("tiny_wan_t2v"))
    code = PROCESS.format(tests=str(ROOT / "tests"), nodes=str(ROOT / "tests" / "nodes"), dev=str(ROOT / "dev"),
                          path=path)
    other = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONHASHSEED": other})
    assert done.returncode == 0, done.stderr[-2000:]
    key = done.stdout.split()[-1]
    assert len(key) == 32 and key == key_of_everything(path)
