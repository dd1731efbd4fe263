"""A step is placed in the whole denoising, whatever part of it is sampled; two samplers are told apart."""
from types import SimpleNamespace

import pytest
import torch

SIZE = (5, 8, 12)


@pytest.fixture
def sigmas(comfyui, wan):
    from comfy.samplers import calculate_sigmas
    return lambda scheduler, steps: calculate_sigmas(wan.model.model_sampling, scheduler, steps)


def place(wan, sigma, part):
    from pack.nodes.hook.places import place_in_schedule
    return place_in_schedule(float(sigma), part, wan.model.model_sampling.percent_to_sigma)


@pytest.mark.parametrize("steps", [4, 20, 30])
@pytest.mark.parametrize("scheduler", ["simple", "normal", "sgm_uniform", "beta", "karras", "linear_quadratic"])
def test_in_a_whole_schedule_every_step_is_itself(wan, sigmas, scheduler, steps):
    whole = sigmas(scheduler, steps)
    assert [place(wan, sigma, whole) for sigma in whole[:-1]] == [(i, steps) for i in range(len(whole) - 1)]


@pytest.mark.parametrize(("first", "last"), [(0, 10), (10, 20), (5, 13), (19, 20)])
def test_a_part_of_an_even_schedule_is_placed_exactly(wan, sigmas, first, last):
    whole = sigmas("simple", 20)
    part = whole[first:last + 1]
    assert [place(wan, sigma, part) for sigma in part[:-1]] == [(i, 20) for i in range(first, last)]


def test_a_part_of_an_uneven_schedule_is_placed_in_the_right_part_of_the_denoising(wan, sigmas):
    whole = sigmas("beta", 20)
    for first, last in ((0, 10), (10, 20)):
        part = whole[first:last + 1]
        places = [index / total for index, total in (place(wan, sigma, part) for sigma in part[:-1])]
        assert places == sorted(places) and all(abs(p - i / 20) < 0.15 for p, i in zip(places, range(first, last)))


def test_without_a_schedule_there_is_one_step(wan):
    assert place(wan, 0.5, None) == place(wan, 0.5, torch.tensor([0.5])) == (0, 1)


@pytest.fixture
def sampled_places(wan, vsa, monkeypatch, comfyui):
    """sampled_places(**knobs of comfy.sample.sample) -> (index, total) of every forward pass."""
    import comfy.sample

    from pack.nodes.methods.video_sparse_attention import VideoSparseMethod
    from sampling import conditioning
    seen, attend = [], VideoSparseMethod.attend

    def spying(self, plan, q, k, v, call):
        if call.layer == 0:
            seen.append((call.step.index, call.step.total))
        return attend(self, plan, q, k, v, call)
    monkeypatch.setattr(VideoSparseMethod, "attend", spying)

    def draw(steps=10, **knobs):
        seen.clear()
        patched, gen = vsa(wan, 0.9), torch.Generator().manual_seed(0)
        given = conditioning(patched, "wan", gen, SIZE, 1.0)
        latent = torch.zeros(1, 16, *SIZE)
        with torch.inference_mode():
            comfy.sample.sample(patched, comfy.sample.prepare_noise(latent, 0), steps, 1.0, "euler", "simple", given,
                                given, latent, disable_pbar=True, seed=0, **knobs)
        return list(seen)
    return draw


def test_start_and_end_steps_and_denoise_are_placed_in_the_whole(sampled_places):
    assert sampled_places() == [(i, 10) for i in range(10)]
    assert sampled_places(start_step=0, last_step=4) == [(i, 10) for i in range(4)]
    assert sampled_places(start_step=4, last_step=10, disable_noise=True) == [(i, 10) for i in range(4, 10)]
    assert sampled_places(steps=5, denoise=0.5) == [(i, 10) for i in range(5, 10)]


def test_a_strategy_under_two_samplers_in_a_row_takes_the_windows_of_its_own_steps(wan, sta, sampled_places):
    """The first sampler's steps are those of the first half, the second's of the second half."""
    first = sampled_places(start_step=0, last_step=5)
    second = sampled_places(start_step=5, last_step=10, disable_noise=True)
    assert [index for index, _ in first + second] == list(range(10)) and {total for _, total in first + second} == {10}


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 7.0, 8.0])
def test_start_percent_is_that_part_of_the_steps_of_an_even_schedule(wan, share, shift):
    from comfy.model_sampling import ModelSamplingDiscreteFlow
    from comfy.samplers import calculate_sigmas

    from pack.vsa_core.schedule import Schedule
    sampling = ModelSamplingDiscreteFlow(wan.model.model_config)
    sampling.set_parameters(shift=shift, multiplier=1000)
    for steps in (10, 20, 30):
        whole = calculate_sigmas(sampling, "simple", steps)
        dense = [not Schedule(share).holds(float(sigma), sampling.percent_to_sigma) for sigma in whole[:-1]]
        assert dense == [True] * round(share * steps) + [False] * (steps - round(share * steps))


@pytest.fixture
def report_of(comfyui):
    """report_of(model, node id, prompt) -> the text of a report node with that id in that prompt."""
    from pack.nodes.evidence.report import SparseAttentionReport

    def report(model, node_id, prompt):
        node = type("Report", (SparseAttentionReport,), {"hidden": SimpleNamespace(
            unique_id=node_id, prompt=prompt, extra_pnginfo=None)})
        return node.execute({"samples": torch.zeros(1, 16, *SIZE)}, model)[1]
    return report


@pytest.fixture
def in_prompt(comfyui):
    """in_prompt(prompt id, node id): what ComfyUI sets while it executes a node."""
    utils = pytest.importorskip("comfy_execution.utils")
    return utils.CurrentNodeContext


PROMPT = {
    "1": {"inputs": {}}, "2": {"inputs": {"model": ["1", 0]}}, "20": {"inputs": {}},
    "3": {"inputs": {"model": ["2", 0], "latent_image": ["20", 0]}},
    "4": {"inputs": {"model": ["2", 0], "latent_image": ["3", 0]}},
    "8": {"inputs": {"latent": ["3", 0], "model": ["2", 0]}}, "9": {"inputs": {"latent": ["4", 0], "model": ["2", 0]}}}


def test_reports_of_two_samplers_on_one_model_show_their_own_runs(wan, vsa, draw, report_of, in_prompt):
    patched = vsa(wan, 0.9)
    with in_prompt("prompt one", "3"):
        draw(patched, SIZE, steps=1)
    with in_prompt("prompt one", "4"):
        draw(patched, SIZE, steps=3)
    assert "calls: 2 sparse" in report_of(patched, "8", PROMPT) and "calls: 6" not in report_of(patched, "8", PROMPT)
    both = report_of(patched, "9", PROMPT)
    assert both.index("sampler 1 of 2:") < both.index("calls: 2 sparse") < both.index("sampler 2 of 2:") < both.index(
        "calls: 6 sparse")


def test_runs_of_an_earlier_prompt_are_not_shown(wan, vsa, draw, report_of, in_prompt):
    patched = vsa(wan, 0.9)
    for prompt, steps in (("one", 1), ("two", 3)):
        with in_prompt(prompt, "4"):
            draw(patched, SIZE, steps=steps)
    assert "calls: 6 sparse" in report_of(patched, "9", PROMPT) and "sampler" not in report_of(patched, "9", PROMPT)
