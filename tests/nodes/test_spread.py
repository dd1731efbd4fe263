"""The work of a sampling spread over its steps by noise, in a real ComfyUI."""
import math

import pytest

from pack.vsa_core.grading import graded_shares

LATENT = (8, 16, 32)         # 8x8x16 tokens: 16 tiles of 4x4x4
KEEPS_ALL = "so noisy a step keeps everything"


@pytest.fixture
def node(comfyui):
    """node(model, **widgets) -> what the VSA node returns, with the widgets of a new node on the page."""
    from pack.nodes.methods.video_sparse_attention import VideoSparseAttentionPatch
    return lambda model, sparsity=0.8, **widgets: VideoSparseAttentionPatch.execute(
        model, sparsity, **{"min_tokens": 0, "backend": "reference", "tile_size": "4x4x4", "preset": "auto",
                            "spread": "auto", "start_percent": 0.2, **widgets})[0]


def work_by_step(run):
    return [round(float(x), 3) for record in run.records.values() for x in record.densities]


def test_auto_spreads_as_much_work_as_the_even_way_has(wan, node, draw, run_of):
    patched = node(wan, 0.6)
    draw(patched, LATENT, steps=10, cfg=1.0)
    run = run_of(patched)
    found = [1.0] * (run.dense[KEEPS_ALL] // 2) + work_by_step(run)
    assert len(found) == 10 and found == sorted(found, reverse=True) and found[0] > 0.8 > 0.2 > found[-1]
    work = 0.2 + 0.8 * 0.4
    assert work <= sum(found) / 10 <= work + 1 / 16, "tiles are rounded up"
    assert set(run.dense) <= {KEEPS_ALL}
    (said,) = [note for note in run.notes if note.startswith("the work is spread over the steps by noise: ")]
    assert said.endswith(f"{sum(found) / 10:.0%} on average")


def test_with_few_steps_auto_is_even_and_by_noise_is_not(wan, node, draw, run_of):
    patched = node(wan)
    draw(patched, LATENT, steps=4, cfg=1.0)
    assert len(set(work_by_step(run_of(patched)))) == 1 and sum(run_of(patched).dense.values()) == 2
    patched = node(wan, spread="by noise")
    draw(patched, LATENT, steps=4, cfg=1.0)
    assert len(set(work_by_step(run_of(patched)))) > 2


def test_a_prompt_from_before_the_input_runs_as_it_did(wan, vsa, draw, run_of):
    patched = vsa(wan, 0.6, start_percent=0.2, tile_size="4x4x4")
    draw(patched, LATENT, steps=10, cfg=1.0)
    run = run_of(patched)
    assert work_by_step(run) == [0.438] * 8 and sum(run.dense.values()) == 4 and not run.notes


def test_two_samplers_in_a_row_share_one_spread(wan, node, run_of, comfyui):
    import torch

    import nodes as host
    from sampling import conditioning
    gen, counts = torch.Generator().manual_seed(0), []
    conds = [conditioning(wan, "wan", gen, LATENT, 1.0) for _ in range(2)]
    patched = node(wan, 0.6)
    latent = {"samples": torch.zeros(1, 16, *LATENT)}
    with torch.inference_mode():
        for first, last in ((0, 6), (6, 12)):
            latent = host.common_ksampler(patched, 1, 12, 1.0, "euler", "simple", *conds, latent, start_step=first,
                                          last_step=last, force_full_denoise=last == 12, disable_noise=first > 0)[0]
            counts.append([1.0] * (run_of(patched).dense[KEEPS_ALL] // 2) + work_by_step(run_of(patched)))
    whole = counts[0] + counts[1]
    assert len(whole) == 12 and whole == sorted(whole, reverse=True)
    assert sum(counts[0]) > 2 * sum(counts[1])
    work = 0.2 + 0.8 * 0.4
    assert sum(whole) / 12 == pytest.approx(work, abs=0.07)


def test_by_noise_is_refused_where_something_else_says_how_much_is_kept(wan, gated, node):
    from pack.vsa_core.budgets import Budgets
    for model, widgets, why in (
            (gated, {}, "was trained to read the same number of tiles in every step"),
            (wan, {"attention_mass": 0.9}, "attention_mass says how many tiles are kept"),
            (wan, {"strategy": Budgets((0.1, 1.0), (((0, 1), (1, 0)),))}, "the strategy spreads the work itself")):
        with pytest.raises(ValueError, match=f"spread by noise: .*{why}. Choose auto or even"):
            node(model, spread="by noise", **widgets)
        node(model, spread="auto", **widgets)
    with pytest.raises(ValueError, match="spread 'late': wanted auto, by noise, even"):
        node(wan, spread="late")


def test_the_noise_of_a_step_is_its_sigma_in_a_flow_model_and_noise_s_part_of_the_latent_elsewhere(load_tiny):
    from pack.nodes.hook.places import noise_of_schedule, noise_share
    flow, other = (load_tiny(name).get_model_object("model_sampling") for name in ("tiny_wan_t2v", "tiny_cogvideox"))
    assert noise_share(flow, 0.7) == 0.7 and noise_share(other, 2.0) == pytest.approx(2 / math.sqrt(5))
    for sampling in (flow, other):
        noise = noise_of_schedule(None, 20, sampling)
        assert noise[0] == pytest.approx(1.0, abs=1e-3) and list(noise) == sorted(noise, reverse=True)
        assert 0 < noise[-1] < 0.6
        shares = graded_shares(noise, 0.3)
        assert shares[0] > 0.5 > 0.1 > shares[-1]


def test_windows_are_spread_too(wan, comfyui, draw, run_of):
    from pack.nodes.methods.sliding_tile_attention import SlidingTileAttentionPatch
    from pack.vsa_core.strategy import Strategy
    from pack.vsa_core.window import window_density
    knobs = dict(window="1.0x0.5x0.5", tile_size="4x4x4", min_tokens=0, backend="reference", spread="auto",
                 start_percent=0.2)
    patched = SlidingTileAttentionPatch.execute(wan, **knobs)[0]
    size = (12, 24, 40)          # 12x12x20 tokens: 3x3x5 tiles
    draw(patched, size, steps=10, cfg=1.0)
    run = run_of(patched)
    found = [round(float(x), 3) for record in run.records.values() for x in record.densities]
    found = [1.0] * run.dense[KEEPS_ALL] + found
    assert len(found) == 20 and found == sorted(found, reverse=True) and set(run.dense) <= {KEEPS_ALL}
    (grid,) = {record.grid for record in run.records.values()}
    even = window_density(grid, (4, 4, 4), (3, 3, 3))
    assert 0.2 + 0.8 * even <= sum(found) / 20 + 0.01
    assert any(note.startswith("the work is spread over the steps by noise: window ") for note in run.notes)
    with pytest.raises(ValueError, match="spread by noise: the strategy spreads the work itself"):
        SlidingTileAttentionPatch.execute(wan, **{**knobs, "spread": "by noise"},
                                          strategy=Strategy(((1.0, 0.5, 0.5),), (((0, 0), (0, 0)),)))
    even = SlidingTileAttentionPatch.execute(wan, **{**knobs, "spread": "even"})[0]
    draw(even, size, steps=10, cfg=1.0)
    assert len({float(x) for record in run_of(even).records.values() for x in record.densities}) == 1
