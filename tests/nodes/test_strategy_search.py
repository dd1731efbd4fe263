"""The search node on a model whose heads are local by construction."""
import re

import pytest
import torch

from planted_heads import LATENT, LATENT_LONG, plant


@pytest.fixture
def conditions(wan):
    from sampling import conditioning, kind_of
    gen = torch.Generator().manual_seed(0)
    return [conditioning(wan, kind_of(wan), gen, LATENT, 4.0) for _ in range(2)]


@pytest.fixture
def output(comfyui, tmp_path, monkeypatch):
    """The folder that searches write to, empty: a finished one would be found again by the next test."""
    import folder_paths
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path / "sta_strategies"


@pytest.fixture
def search(comfyui, conditions, output):
    from pack.nodes.strategies import strategy_files
    from pack.nodes.strategies.strategy_search import STAStrategySearch
    strategy_files.register_folders()

    def run(model, latent=LATENT_LONG, steps=2, **widgets):
        widgets = {"tile_size": "4x4x4", "measured_steps": 1, **widgets}
        samples = {"samples": torch.zeros(1, 16, *latent)}
        with torch.inference_mode():
            return STAStrategySearch.execute(model, *conditions, samples, 3, steps, 1.0, "euler", "simple", **widgets)
    return run


def density_of(report):
    found = re.search(r"^- density ([\d.]+)%: so much of dense attention is computed$", report, re.M)
    return float(found.group(1)) / 100


def test_the_search_finds_the_windows_that_were_planted(wan, search):
    strategy, report, picture = search(plant(wan), candidates="1x1x1 6x2x3 3x2x6 6x2x1 1x2x6", max_error=0.05)[:3]
    windows = strategy.sta_param((6, 2, 6))[0]
    for layer in windows:
        assert layer[0][0] == 6 and layer[0][2] <= 3, layer      # all of time, a part of the width
        assert layer[1][2] == 6 and layer[1][0] <= 3, layer      # all of the width, a part of time
    assert "density" in report and picture.shape[0] == 1


def test_running_with_the_result_reproduces_its_table(wan, search, draw):
    from pack.nodes.hook.hook import SparseAttentionHook
    from pack.nodes.methods.sliding_tile_attention import SlidingTileAttentionPatch
    model = plant(wan)
    strategy, report = search(model, max_error=0.1)[:2]
    patched = SlidingTileAttentionPatch.execute(model, "1x1x1", "4x4x4", strategy, min_tokens=0, start_percent=0.0,
                                                verbose=True)[0]
    dense, sparse = draw(model, LATENT_LONG, cfg=1.0), draw(patched, LATENT_LONG, cfg=1.0)
    run = SparseAttentionHook.of(patched)[-1].last_run
    full = run.dense["the strategy's windows cover the clip"]
    measured = (sum(float(x) for record in run.records.values() for x in record.densities) + full) / (
        run.sparse_calls + full)
    foreseen = density_of(report)
    assert measured == pytest.approx(foreseen, abs=0.002)
    assert ((sparse - dense).norm() / dense.norm()).item() < 0.1


def test_a_density_goal_is_kept(wan, search):
    from pack.nodes.strategies.strategy_search import DENSITY
    strategy, report = search(wan, goal=DENSITY, max_density=0.4)[:2]
    assert density_of(report) <= 0.4
    assert strategy.steps == 1 and strategy.layers == 2 and strategy.heads == 2


def test_an_error_bound_of_zero_keeps_everything(wan, search):
    strategy, report = search(wan, max_error=0.0)[:2]
    assert density_of(report) == 1.0 and "moves by 0.0% on average, by 0.0% at worst" in report
    assert set(strategy.windows) == {(1.0, 1.0, 1.0)}


def test_the_sampling_of_a_search_is_the_dense_one(wan, draw, comfyui):
    from pack.nodes.hook.hook import SparseAttentionHook
    from pack.nodes.hook.settings import read_settings
    from pack.nodes.strategies.strategy_measurement import Search
    search = Search("1x1x1", (4, 4, 4), 1, 2, 2, "/nonexistent/state", lambda text: None)
    search._keep = lambda: None
    patched = SparseAttentionHook.install(wan, search, read_settings(min_tokens=0, start_percent=0.0, strict=True))
    dense, found = draw(wan, LATENT), draw(patched, LATENT)
    assert ((found - dense).norm() / dense.norm()).item() <= 1e-5
    assert search.table.calls.min() > 0


def test_an_interrupted_search_goes_on_where_it_stopped(wan, search, output, monkeypatch):
    import comfy.model_management

    from pack.nodes.strategies import strategy_measurement
    calls, stops, original = [], [4], strategy_measurement.candidate_errors

    def counted(*args, **kwargs):
        calls.append(1)
        if stops and len(calls) == stops[0]:
            stops.clear()
            comfy.model_management.interrupt_current_processing()
        return original(*args, **kwargs)

    monkeypatch.setattr(strategy_measurement, "candidate_errors", counted)
    knobs = dict(latent=(8, 16, 32), steps=4, measured_steps=3, max_error=0.07)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        search(wan, **knobs)
    assert list(output.glob("unfinished_*"))
    calls.clear()
    resumed = search(wan, **knobs)
    assert len(calls) == 4                       # the first of three steps, two layers, was not measured again
    assert not list(output.glob("unfinished_*"))
    (measured,) = output.glob("measured_*")
    measured.unlink()
    assert resumed[0] == search(wan, **knobs)[0], "in one go it comes out the same"


def test_a_finished_search_is_not_done_again_whatever_is_chosen_from_it(wan, search, output, monkeypatch):
    from pack.nodes.strategies import dense_sampling, strategy_measurement, strategy_search
    knobs = dict(latent=(8, 16, 32), max_error=0.07)
    first = search(wan, **knobs)
    for module, name in ((strategy_measurement, "candidate_errors"), (dense_sampling.host_nodes, "common_ksampler")):
        monkeypatch.setattr(module, name, lambda *args, **kwargs: pytest.fail("measured again"))
    again = search(wan, **knobs)
    assert again[0] == first[0] and again[1] == first[1], "the same file, named again"
    other = search(wan, **{**knobs, "goal": strategy_search.DENSITY, "max_density": 0.6})
    assert density_of(other[1]) <= 0.6 and other[1].splitlines()[0] != first[1].splitlines()[0]
    assert len(list(output.glob("*.json"))) == 2
    for path in output.glob("*.json"):
        path.unlink()
    assert search(wan, **knobs)[1] == first[1] and len(list(output.glob("*.json"))) == 1, "a lost file is written anew"


@pytest.mark.parametrize("harm", [
    lambda path: path.write_bytes(path.read_bytes()[:-100]), lambda path: path.write_bytes(b"no search"),
    lambda path: path.write_bytes(path.read_bytes().replace(b"sta_search", b"sta_searcH")),
], ids=["cut", "other", "old"])
def test_a_finished_search_that_cannot_be_read_is_done_again(wan, search, output, harm, caplog):
    first = search(wan, latent=(8, 16, 32))
    (measured,) = output.glob("measured_*")
    harm(measured)
    assert search(wan, latent=(8, 16, 32))[0] == first[0]
    assert "a finished search cannot be read and is done again" in caplog.text


def test_every_line_of_a_report_is_a_bullet_and_says_what_its_numbers_are(wan, search):
    report = search(wan, latent=(8, 16, 32))[1].splitlines()
    assert report[0].startswith("saved as output/sta_strategies/") and all(line.startswith("- ") for line in report[1:])
    assert report[2].endswith("dense attention is 0%") and len(report) >= 5
    window = (r"- window \d+x\d+x\d+ \([\d.]+% of attention\): taken by [\d.]+% of the heads"
              r"(, which move by [\d.]+%)?; all heads would move by [\d.]+%")
    assert all(re.fullmatch(window, line) for line in report[3:])


def test_the_cost_is_said_before_the_search_starts(wan, search, caplog):
    import logging
    with caplog.at_level(logging.INFO):
        search(wan, latent=(8, 16, 32))
    text = caplog.text
    said = re.search(r"trying \d windows in 1 steps\. Attention takes about [\d.]+ times as long in such a step", text)
    assert said.start() < text.index("STA search is ON")


@pytest.mark.parametrize(("widgets", "message"), [
    ({"candidates": "3x3"}, "wanted time x height x width"),
    ({"candidates": "9x9x9"}, "too small for these windows"),
])
def test_candidates_that_are_none_are_refused(wan, search, widgets, message):
    with pytest.raises(ValueError, match=message):
        search(wan, latent=LATENT, **widgets)


def test_more_measured_steps_than_steps_are_refused(wan, search):
    with pytest.raises(ValueError, match="measured_steps 9 of 4 steps"):
        search(wan, latent=LATENT, measured_steps=9, steps=4)


@pytest.mark.parametrize(("done", "said"), [
    (set(), ["1 of 3 steps measured, about 24 s left", "2 of 3 steps measured, about 12 s left"]),
    ({(0, 0), (0, 1)}, ["2 of 3 steps measured, about 12 s left"])], ids=["from the start", "gone on with"])
def test_what_is_left_is_told_as_soon_as_one_step_was_measured(comfyui, monkeypatch, done, said):
    """Of six steps the second, fourth and sixth are measured and take 10 s, the others 2 s."""
    from types import SimpleNamespace

    from pack.nodes.strategies import strategy_measurement
    heard, clock = [], [100.0]
    monkeypatch.setattr(strategy_measurement, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    search = strategy_measurement.Search("auto", (4, 4, 4), 3, 2, 2, "/nonexistent/state", heard.append, done=done)
    search.table = SimpleNamespace(work=5.0)
    for step in range(6):
        for _ in range(2):
            search._begin(step, 6)
        clock[0] += 10.0 if step in (1, 3, 5) and (step > 1 or not done) else 2.0
    assert heard == said


def test_without_a_usual_step_before_it_a_measured_one_tells_by_its_work(comfyui, monkeypatch):
    from types import SimpleNamespace

    from pack.nodes.strategies import strategy_measurement
    heard, clock = [], [0.0]
    monkeypatch.setattr(strategy_measurement, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    search = strategy_measurement.Search("auto", (4, 4, 4), 1, 2, 2, "/nonexistent/state", heard.append)
    search.table = SimpleNamespace(work=5.0)
    search._begin(1, 3)
    clock[0] = 50.0
    search._begin(2, 3)
    assert heard == ["1 of 1 steps measured, about 10 s left"]


def test_what_is_left_is_told_and_the_result_is_saved_by_itself(wan, search, caplog):
    import logging

    import folder_paths

    from pack.nodes.strategies.strategy_files import FOLDER, LoadSTAStrategy, strategy_names
    with caplog.at_level(logging.INFO):
        strategy, report = search(wan, latent=(8, 16, 32), steps=4, measured_steps=3)[:2]
    assert re.findall(r"(\d) of 3 steps measured, about [\d.]+ s left", caplog.text) == ["1", "2"]
    name = re.match(r"saved as output/sta_strategies/(\S+): Load Sparse Attention Strategy lists it\n", report).group(1)
    assert re.fullmatch(r"WAN21_8x8x16_error_0\.15_\d{5}_\.json", name)
    assert name in strategy_names() and folder_paths.get_full_path(FOLDER, name)
    assert LoadSTAStrategy.execute(name)[0] == strategy
