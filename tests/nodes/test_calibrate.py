"""Calibrate Sparse Attention in a real ComfyUI, and its budgets in Video Sparse Attention."""
import json
import re

import pytest
import torch

from planted_heads import plant

LATENT = (8, 16, 32)         # 8x8x16 tokens: 2x2x4 tiles of 4x4x4
KNOBS = {"tile_size": "4x4x4", "measured_steps": 1, "backend": "reference", "far_field": "off", "check": False}
SHARES = "0.0625 0.25 0.5"
GOALS = {"work": "work of the whole", "time": "time of the whole", "error": "error of every head",
         "kept": "attention of every head"}


@pytest.fixture
def output(comfyui, tmp_path, monkeypatch):
    """The folder that calibrations write to, empty: a finished one would be found again by the next test."""
    import folder_paths

    from pack.nodes.strategies.strategy_files import register_folders
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    register_folders()
    return tmp_path / "sta_strategies"


@pytest.fixture
def calibrate(output):
    """calibrate(model, latent, steps, ...) -> (strategy, report, map), as the node gives them."""
    from pack.nodes.strategies.calibrate import SparseAttentionCalibrate
    from sampling import AUDIO, KINDS, conditioning, kind_of

    def run(model, latent=LATENT, steps=2, cfg=1.0, **widgets):
        kind, gen = kind_of(model), torch.Generator().manual_seed(0)
        conds = [conditioning(model, kind, gen, latent, cfg) for _ in range(2)]
        samples = torch.zeros(1, KINDS[kind][0] or model.model.latent_format.latent_channels, *latent)
        if kind in AUDIO:
            from comfy.nested_tensor import NestedTensor
            samples = NestedTensor((samples, torch.zeros(1, *AUDIO[kind])))
        with torch.inference_mode():
            return SparseAttentionCalibrate.execute(
                model, *conds, {"samples": samples}, 3, steps, cfg, "euler", "simple",
                **{**KNOBS, "shares": SHARES, "goal": GOALS["error"], "at_most": 0.1, **widgets})[:3]
    return run


@pytest.fixture
def counted(comfyui, monkeypatch):
    """A list that grows by one for every call that is measured and every sampling."""
    from pack.nodes.strategies import budget_measurement, dense_sampling
    calls = []

    def count(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **kwargs: (calls.append(name), original(*args, **kwargs))[1])
    count(budget_measurement, "try_shares")
    count(dense_sampling.host_nodes, "common_ksampler")
    return calls


def percent(pattern, report):
    return float(re.search(pattern.replace("N", r"([\d.]+)%"), report, re.M).group(1)) / 100


def test_heads_get_what_they_need_and_a_run_with_it_computes_what_was_foreseen(wan, calibrate, vsa, draw, run_of):
    model = plant(wan)
    strategy, report, picture = calibrate(model, measured_steps=2)
    assert 8 not in strategy.uses.values(), "not every head gets the same"
    patched = vsa(model, 0.9, strategy=strategy, tile_size="4x4x4", far_field="off", verbose=True)
    sparse, dense = draw(patched, LATENT, cfg=1.0), draw(model, LATENT, cfg=1.0)
    run = run_of(patched)
    full = run.dense["nothing would be left out"] + run.dense["the strategy keeps everything there"]
    ran = sum(float(x) for record in run.records.values() for x in record.densities) + full
    ran /= run.sparse_calls + full
    assert ran == pytest.approx(percent("^- N of dense attention is computed", report), abs=0.002)
    assert run.sparse_calls + full == 4 and "strategy for WAN21, 2 steps" in run.summary()[0]["label"]
    assert ((sparse - dense).norm() / dense.norm()).item() < 0.1
    assert picture.shape[0] == 1 and 0 <= picture.min() < picture.max() <= 1


def test_every_goal_chooses_from_one_measurement(wan, calibrate, counted):
    work = calibrate(wan, goal=GOALS["work"], at_most=0.4)[1]
    assert counted == ["common_ksampler", "try_shares", "try_shares"]
    assert percent("^- N of dense attention is computed", work) <= 0.4
    error = calibrate(wan, goal=GOALS["error"], at_most=0.2)[1]
    assert percent("by N at worst", error) <= 0.2
    loose, strict = (calibrate(wan, goal=GOALS["kept"], at_least=share)[0].mean_share for share in (0.3, 0.9))
    assert loose < strict
    quick = calibrate(wan, goal=GOALS["time"], at_most=1.0)[1]
    assert percent("takes N of its time", quick) <= 1.0
    assert len(counted) == 3, "nothing is sampled or measured again"


def test_the_check_tells_how_far_the_finished_clip_is_and_takes_the_closest_way(wan, calibrate, counted, vsa,
                                                                                 monkeypatch):
    from pack.nodes.strategies.dense_sampling import Sampling
    latents, sample = [], Sampling.__call__
    monkeypatch.setattr(Sampling, "__call__", lambda self, model: latents.append(sample(self, model)) or latents[-1])
    knobs = dict(steps=4, measured_steps=4, goal=GOALS["work"], at_most=0.4, check=True)
    report = calibrate(wan, **knobs)[1]
    dense, *tried = (latent["samples"] for latent in latents)
    found = sorted(float((x - dense).norm() / dense.norm()) for x in tried)
    assert len(found) in (2, 3) and found[0] > 0.001
    said = [float(x) / 100 for x in re.findall(r"([\d.]+)%", report.splitlines()[1])]
    assert said[0] == pytest.approx(found[0], abs=6e-4) and max(said) == pytest.approx(found[-1], abs=6e-4)
    counted.clear()
    assert calibrate(wan, **knobs)[1] == report and not counted, "a check is made once"


def test_an_interrupted_calibration_goes_on_where_it_stopped(wan, calibrate, output, monkeypatch):
    import comfy.model_management

    from pack.nodes.strategies import budget_measurement
    calls, stops, original = [], [4], budget_measurement.try_shares

    def interrupted(*args, **kwargs):
        calls.append(1)
        if stops and len(calls) == stops[0]:
            stops.clear()
            comfy.model_management.interrupt_current_processing()
        return original(*args, **kwargs)

    monkeypatch.setattr(budget_measurement, "try_shares", interrupted)
    knobs = dict(latent=(8, 16, 16), steps=3, measured_steps=3, goal=GOALS["work"], at_most=0.5)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        calibrate(wan, **knobs)
    assert list(output.glob("unfinished_*"))
    calls.clear()
    resumed = calibrate(wan, **knobs)[0]
    assert len(calls) == 4 and not list(output.glob("unfinished_*"))
    (measured,) = output.glob("measured_*")
    measured.unlink()
    assert resumed == calibrate(wan, **knobs)[0], "in one go it comes out the same"


@pytest.mark.parametrize(("name", "latent", "said"), [
    ("tiny_hunyuan_video", (4, 16, 16), "checked: "), ("tiny_ltxv", (4, 8, 8), "checked: "),
    ("tiny_ltxav", (4, 8, 8), "not checked: the latent of this model is not one tensor")], ids=str)
def test_other_families_are_calibrated_and_run(load_tiny, calibrate, vsa, draw, run_of, name, latent, said):
    model = load_tiny(name)
    knobs = dict(goal=GOALS["work"], at_most=0.6, shares="0.25 0.5")
    strategy, report, _ = calibrate(model, latent, check=True, **knobs)
    assert f"- {said}" in report
    patched = vsa(model, strategy=strategy, tile_size="4x4x4", far_field="off")
    draw(patched, latent)
    assert run_of(patched).sparse_calls > 0
    assert percent("^- N of dense attention is computed", report) <= 0.6


def test_a_strategy_holds_for_another_size_and_number_of_steps(wan, calibrate, vsa, draw, run_of):
    strategy = calibrate(wan, goal=GOALS["work"], at_most=0.5, steps=4, measured_steps=4)[0]
    patched = vsa(wan, strategy=strategy, far_field="off")
    draw(patched, (5, 18, 20), steps=6)
    run = run_of(patched)
    ran = run.sparse_calls + sum(run.dense.values())
    assert run.sparse_calls and ran == 6 * 2 and set(run.dense) <= {"the strategy keeps everything there"}


def test_the_file_that_was_saved_is_the_strategy_and_is_described(wan, calibrate):
    from pack.nodes.strategies.strategy_files import LoadSTAStrategy, SaveSTAStrategy, strategy_names
    strategy, report, _ = calibrate(wan)
    name = re.match(r"saved as output/sta_strategies/(\S+): Load Sparse Attention Strategy lists it\n", report).group(1)
    assert re.fullmatch(r"WAN21_8x8x16_error_0\.1_\d{5}_\.json", name) and name in strategy_names()
    loaded, words = LoadSTAStrategy.execute(name)[:2]
    assert loaded == strategy
    assert words.startswith("WAN21, 1 steps, 2 layers of 2 heads, made at 8x8x16 tokens; budgets for VSA, measured "
                            "without the far field: ")
    saved = SaveSTAStrategy.execute(strategy, "mine")[0]
    assert json.loads(open(saved).read())["format"] == "video sparse attention budgets"


@pytest.mark.parametrize(("widgets", "message"), [
    ({"shares": "a b"}, "shares 'a b': wanted numbers above 0 and at most 1, such as 0.1 0.2 0.5"),
    ({"shares": "0 0.5"}, "shares '0 0.5': wanted numbers above 0"),
    ({"shares": "0.999"}, "a clip of 16 tiles is too small for these shares: every one keeps all tiles"),
    ({"goal": GOALS["work"], "at_most": 0.01}, "at_most 0.01: the smallest share, 0.0625 of the tiles, takes 0.062 of "
                                               "dense attention. Raise at_most or try smaller shares"),
    ({"measured_steps": 3}, "measured_steps 3 of 2 steps: wanted at most as many as steps"),
    ({"goal": "speed"}, "goal 'speed': wanted work of the whole, time of the whole"),
    ({"far_field": "maybe"}, "far_field 'maybe': wanted auto, on, off"),
])
def test_bad_input_is_refused_in_a_sentence(wan, calibrate, widgets, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        calibrate(wan, **widgets)


def test_a_strategy_goes_to_the_node_that_it_is_for(wan, gated, vsa, sta):
    from pack.vsa_core.budgets import Budgets
    from pack.vsa_core.strategy import Strategy
    budgets = Budgets((0.1, 1.0), (((0, 1), (1, 0)),))
    windows = Strategy(((1.0, 0.5, 0.5),), (((0, 0), (0, 0)),))
    with pytest.raises(ValueError, match="holds windows for Sliding Tile Attention .STA.: connect it there"):
        vsa(wan, strategy=windows)
    with pytest.raises(ValueError, match="holds budgets for Video Sparse Attention .VSA.: connect it there"):
        sta(wan, strategy=budgets)
    with pytest.raises(ValueError, match="attention_mass 0.9 and a strategy: both say how many tiles a head keeps"):
        vsa(wan, strategy=budgets, attention_mass=0.9)
    with pytest.raises(ValueError, match="made for 2 layers of 3 heads, this model has 2 layers of 2 heads"):
        vsa(wan, strategy=Budgets((0.1,), (((0, 0, 0), (0, 0, 0)),)))
    with pytest.raises(ValueError, match="was trained to read the same number of tiles everywhere"):
        vsa(gated, strategy=budgets)
    with pytest.raises(ValueError, match="strategy: found str, wanted one from a search or from a file"):
        vsa(wan, strategy="budgets")


def test_a_gated_model_has_nothing_to_calibrate(gated, calibrate):
    with pytest.raises(ValueError, match="there is nothing to calibrate. Use Video Sparse Attention without"):
        calibrate(gated)


def test_a_strategy_brings_its_dense_steps_and_says_what_it_was_measured_with(wan, vsa, draw, run_of):
    from pack.vsa_core.budgets import Budgets
    budgets = Budgets((0.3, 1.0), (((1, 1), (1, 1)), ((0, 1), (0, 0))), far_field=True)
    patched = vsa(wan, strategy=budgets, preset="auto", start_percent=0.2, far_field="off")
    draw(patched, LATENT, steps=4, cfg=1.0)
    run = run_of(patched)
    assert run.dense == {"the strategy keeps everything there": 4} and run.sparse_calls == 4
    assert run.chosen == "preset auto: start_percent 0"
    assert ("the strategy was measured with the far field and is used without it: set far_field to on"
            in run.warnings)
