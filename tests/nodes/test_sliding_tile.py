"""Sliding Tile Attention in a real ComfyUI's sampling, with one window for all and with strategies."""
import pytest
import torch

VARIANTS = ("tiny_wan_t2v", "tiny_wan22_ti2v", "tiny_wan_i2v", "tiny_wan_vace", "tiny_wan_ref")


def strategy_of(table, tiles=(3, 2, 3), **facts):
    from pack.vsa_core.strategy import Strategy
    return Strategy.of_windows(table, tiles, **facts)


def relative_l2(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("latent", [(5, 10, 12), (9, 20, 24), (7, 14, 18)], ids=lambda thw: "x".join(map(str, thw)))
@pytest.mark.parametrize("window", ["1.0x1.0x1.0", "99x99x99"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_window_over_the_whole_clip_equals_dense(load_tiny, sta, run_of, draw, name, window, latent):
    latent = (latent[0], latent[1] + latent[1] // 2 % 2 * 2, latent[2])
    model = load_tiny(name)
    dense, patched = draw(model, latent), sta(model, window)
    assert relative_l2(draw(patched, latent), dense) <= 1e-5
    assert run_of(patched).sparse_calls > 0
    assert torch.equal(draw(model, latent), dense)


@pytest.mark.parametrize("tile", ["6x8x8", "4x4x4", "2x8x8"])
def test_every_tile_size_equals_dense_with_a_full_window(wan, sta, run_of, draw, tile):
    patched = sta(wan, "1.0x1.0x1.0", tile_size=tile)
    assert relative_l2(draw(patched, (7, 14, 18), batch=2), draw(wan, (7, 14, 18), batch=2)) <= 1e-5
    assert run_of(patched).summary()[0]["tile"] == [int(side) for side in tile.split("x")]


def test_a_smaller_window_computes_less_and_moves_further_from_dense(wan, sta, run_of, draw):
    dense, errors, densities = draw(wan, (9, 20, 24)), [], []
    for window in ("3x2x3", "3x1x3", "1x1x1"):
        patched = sta(wan, window)
        errors.append(relative_l2(draw(patched, (9, 20, 24)), dense))
        densities.append(run_of(patched).summary()[0]["density"])
    assert densities == sorted(densities, reverse=True) and densities[0] == pytest.approx(1.0)
    assert errors == sorted(errors) and errors[-1] > 1e-2


def test_a_window_in_fractions_travels_across_resolutions(wan, sta, run_of, draw):
    patched = sta(wan, "1.0x0.5x0.5", tile_size="4x4x4")
    seen = []
    for latent in ((8, 16, 32), (8, 32, 64)):
        draw(patched, latent, steps=1)
        seen.append(run_of(patched).summary()[0]["window"])
    assert seen == [[2, 1, 3], [2, 3, 5]] or all(w[0] == 2 for w in seen)


def test_the_report_names_window_and_density(wan, sta, run_of, draw):
    from pack.nodes.hook.status import status_text
    patched = sta(wan, "3x1x1", tile_size="4x4x4")
    draw(patched, (9, 20, 24))
    text = status_text(run_of(patched))
    assert "window 3x1x1 of 3x3x3 tiles (" in text
    assert "clip of 9x10x12 tokens (time x height x width), tile 4x4x4" in text


def test_a_strategy_gives_every_step_layer_and_head_its_window(wan, sta, run_of, draw):
    wide, narrow = (3, 2, 3), (1, 1, 1)
    strategy = strategy_of([[[wide, narrow], [narrow, narrow]], [[wide, wide], [narrow, wide]]])
    patched = sta(wan, strategy=strategy, verbose=True)
    draw(patched, (9, 20, 24), steps=4)
    run = run_of(patched)
    assert run.dense == {"the strategy's windows cover the clip": 2}
    assert run.layers[0] == {"sparse": 2, "the strategy's windows cover the clip": 2}
    assert run.layers[1] == {"sparse": 4}
    found = [float(x) for x in run.records[next(iter(run.records))].densities]
    assert len(set(found)) == 2


def test_a_strategy_of_one_window_equals_that_window(wan, sta, draw):
    strategy = strategy_of([[[(3, 1, 3)] * 2] * 2])
    assert torch.equal(draw(sta(wan, "1x1x1", strategy=strategy), (9, 20, 24)), draw(sta(wan, "3x1x3"), (9, 20, 24)))


@pytest.mark.parametrize(("layers", "heads"), [(3, 2), (2, 24)])
def test_a_strategy_for_another_model_is_refused_with_both_sides(wan, sta, layers, heads):
    strategy = strategy_of([[[(1, 1, 1)] * heads] * layers], model="Another")
    with pytest.raises(ValueError, match=rf"made for {layers} layers of {heads} heads \(Another\), this model has 2 "
                                         "layers of 2 heads"):
        sta(wan, strategy=strategy)


@pytest.mark.parametrize(("window", "message"), [
    ("0x1x1", "wanted at least 1 tile"), ("-1x1x1", "wanted at least 1 tile"),
    ("1.5x0.5x0.5", "wanted a fraction above 0 and at most 1"), ("1x0.5x0.5", "mixes tiles and fractions"),
    ("3x3", "wanted time x height x width"), ("wide", "wanted time x height x width"),
])
def test_a_window_that_is_none_is_refused_at_execution(wan, sta, window, message):
    with pytest.raises(ValueError, match=message):
        sta(wan, window)


def test_vsa_and_sta_on_one_model_share_the_steps(wan, sta, vsa, draw):
    from pack.nodes.hook.hook import SparseAttentionHook
    early = vsa(wan, 0.5, end_percent=0.5)
    both = sta(early, "1x1x1", start_percent=0.5)
    assert torch.isfinite(draw(both, (9, 20, 24), steps=4)).all()
    runs = {hook.method.name: hook.last_run for hook in SparseAttentionHook.of(both)}
    assert set(runs) == {"VSA", "STA"} and all(run.sparse_calls >= 2 for run in runs.values())
    assert sum(run.sparse_calls for run in runs.values()) == 8


def test_files_are_saved_listed_and_loaded(wan, sta, draw, comfyui):
    import os

    from pack.nodes.strategies import strategy_files
    strategy_files.register_folders()
    strategy = strategy_of([[[(3, 1, 3)] * 2] * 2], model="WAN21")
    saved = [strategy_files.SaveSTAStrategy.execute(strategy, "planted")[0] for _ in range(2)]
    upstream = strategy_files.SaveSTAStrategy.execute(strategy, "planted", "3x2x3")[0]
    names = [os.path.basename(path) for path in (*saved, upstream)]
    assert len(set(names)) == 3 and set(names) <= set(strategy_files.strategy_names())
    assert strategy_files.LoadSTAStrategy.execute(names[0])[0] == strategy
    loaded, description = strategy_files.LoadSTAStrategy.execute(names[2], "3x2x3")
    assert loaded.windows == strategy.windows and "1 steps, 2 layers of 2 heads" in description
    assert torch.equal(draw(sta(wan, strategy=loaded), (9, 20, 24)), draw(sta(wan, strategy=strategy), (9, 20, 24)))


def test_the_folder_that_the_loader_names_is_there_and_its_hint_is_no_file(comfyui, tmp_path, monkeypatch):
    import folder_paths

    from pack.nodes.strategies import strategy_files
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, strategy_files.FOLDER, ([], {".json"}))
    monkeypatch.delitem(folder_paths.filename_list_cache, strategy_files.FOLDER, raising=False)
    (hint,) = strategy_files.strategy_names()
    assert "models/sta_strategies" in hint and (tmp_path / "models" / "sta_strategies").is_dir()
    assert strategy_files.LoadSTAStrategy.validate_inputs(hint).startswith("there is no strategy yet: put a .json")


def test_a_strategy_file_that_is_none_is_refused_by_name(comfyui):
    import os

    import folder_paths

    from pack.nodes.strategies import strategy_files
    strategy_files.register_folders()
    folder = os.path.join(folder_paths.get_output_directory(), strategy_files.FOLDER)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "cut.json"), "w") as file:
        file.write('{"0_0_0": [1, 1,')
    with pytest.raises(ValueError, match="cut.json: no JSON at line 1.*may be cut short"):
        strategy_files.LoadSTAStrategy.execute("cut.json")
    assert "is not in models" in strategy_files.LoadSTAStrategy.validate_inputs("absent.json")
    with pytest.raises(ValueError, match="wanted tiles along"):
        strategy_files.LoadSTAStrategy.execute("cut.json", "5x6")


def test_dense_attention_forced_on_the_selector_is_what_runs_and_is_counted(wan, sta, run_of, draw):
    from pack.vsa_core.selector import AttentionBackendEnum, global_force_attn_backend_context_manager
    patched = sta(wan, "1x1x1")
    with global_force_attn_backend_context_manager(AttentionBackendEnum.TORCH_SDPA):
        assert torch.equal(draw(patched), draw(wan))
    assert run_of(patched).dense == {"the selector was told to take TORCH_SDPA": 4}
    assert not torch.equal(draw(patched), draw(wan))
