"""Every model variant in a real ComfyUI's sampling: what equals dense, what runs sparse, and which layer it is."""
import pytest
import torch

from family_cases import CASES, Case
from witness import witnessed

STEPS = 2


def relative_l2(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture
def sampled(comfyui):
    """sampled(model, case, ...) -> the latent that core's sampler makes."""
    from sampling import sample
    return lambda model, case, **knobs: sample(model, case.kind, steps=STEPS, **knobs)


@pytest.fixture(scope="module")
def finished():
    """The dense latents that were sampled, by case and knobs."""
    return {}


@pytest.fixture
def dense(load_tiny, sampled, finished):
    """dense(case, ...) -> what the unpatched model makes; sampled once for all methods."""
    def latent(case, **knobs):
        key = case, *knobs.items()
        if key not in finished:
            finished[key] = sampled(load_tiny(case.checkpoint), case, **knobs)
        return finished[key]
    return latent


variants = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@variants
def test_with_every_pair_kept_the_result_equals_dense_and_the_unpatched_model_is_untouched(
        load_tiny, method, sampled, dense, run_of, case: Case):
    model = load_tiny(case.checkpoint)
    before = dense(case)
    patched = method[0](model)
    assert relative_l2(sampled(patched, case), before) <= 1e-5
    assert torch.equal(sampled(model, case), before)
    run, (entry, *rest) = run_of(patched), run_of(patched).summary()
    assert not rest and tuple(entry["grid"]) == case.grid
    assert (entry["prefix"], entry["suffix"]) == (case.prefix, case.suffix)
    assert run.sparse_calls == STEPS * case.calls_per_step and not run.dense
    assert set(run.other) == case.other and set(run.layers) == set(range(case.layers))


@pytest.mark.parametrize(("case", "latent"), [
    pytest.param(case, latent, id=f"{case.name} {'x'.join(map(str, latent))}")
    for case in CASES for latent in case.odd])
def test_odd_grids_equal_dense_with_every_pair_kept(load_tiny, method, sampled, dense, run_of, case: Case, latent):
    patched = method[0](load_tiny(case.checkpoint))
    assert relative_l2(sampled(patched, case, latent_thw=latent), dense(case, latent_thw=latent)) <= 1e-5
    assert run_of(patched).sparse_calls == STEPS * case.calls_per_step and not run_of(patched).dense


@pytest.mark.parametrize("case", [case for case in CASES if case.batch], ids=lambda case: case.name)
def test_a_batch_of_two_clips_equals_dense_with_every_pair_kept(load_tiny, method, sampled, dense, run_of, case: Case):
    patched = method[0](load_tiny(case.checkpoint))
    assert relative_l2(sampled(patched, case, batch=2), dense(case, batch=2)) <= 1e-5
    assert run_of(patched).sparse_calls >= STEPS * case.calls_per_step


@variants
def test_with_most_pairs_dropped_the_result_differs_and_is_finite(
        load_tiny, method, sampled, dense, run_of, case: Case):
    patched, latent = method[1](load_tiny(case.checkpoint)), case.odd[0]     # large enough for several tiles
    sparse = sampled(patched, case, latent_thw=latent)
    assert torch.isfinite(sparse).all()
    assert relative_l2(sparse, dense(case, latent_thw=latent)) > 1e-4
    assert run_of(patched).sparse_calls == STEPS * case.calls_per_step


@variants
def test_the_layer_index_is_the_index_of_the_block_that_calls(load_tiny, method, sampled, case: Case):
    model = load_tiny(case.checkpoint)
    with witnessed(patched := method[0](model)) as seen:
        sampled(patched, case)
    assert seen and all(told == running for told, running in seen)
    assert {told for told, _ in seen} == set(range(case.layers))


@variants
def test_dense_blocks_leaves_out_the_layers_it_names(load_tiny, method, sampled, run_of, case: Case):
    model = load_tiny(case.checkpoint)
    patched = method[1](model, dense_blocks="0, -1")
    sampled(patched, case)
    layers = run_of(patched).layers
    assert set(layers) == set(range(case.layers))
    for layer, counts in layers.items():
        assert set(counts) == ({"dense_blocks"} if layer in (0, case.layers - 1) else {"sparse"})


def test_audio_of_the_clips_own_length_is_told_from_it_by_its_heads(load_tiny, method, sampled, run_of, monkeypatch):
    import sampling
    case = next(case for case in CASES if case.kind == "ltxav")
    monkeypatch.setitem(sampling.AUDIO, "ltxav", (8, 72, 16))      # the clip has 3 x 4 x 6 tokens
    model = load_tiny(case.checkpoint)
    patched = method[0](model)
    assert relative_l2(sampled(patched, case), sampled(model, case)) <= 1e-5
    assert run_of(patched).sparse_calls == STEPS * case.calls_per_step and set(run_of(patched).layers) == {0, 1}


def test_guides_of_another_strength_run_dense(load_tiny, method, sampled, run_of, monkeypatch):
    import sampling
    case = next(case for case in CASES if case.kind == "ltxv_guide")
    plain = sampling.ADDED["ltxv_guide"]
    entry = {"pre_filter_count": 48, "strength": 0.5, "pixel_mask": None, "latent_shape": [2, 4, 6]}
    monkeypatch.setitem(sampling.ADDED, "ltxv_guide",
                        lambda *args: {**plain(*args), "guide_attention_entries": [entry]})
    model = load_tiny(case.checkpoint)
    patched = method[1](model)
    assert torch.equal(sampled(patched, case), sampled(model, case))
    assert run_of(patched).sparse_calls == 0


def test_a_clip_of_which_tokens_are_dropped_runs_dense(load_tiny, method, sampled, run_of, monkeypatch):
    import sampling
    case = next(case for case in CASES if case.kind == "ltxv_guide")
    plain = sampling.ADDED["ltxv_guide"]

    def thinned(*args):
        found = plain(*args)
        found["concat_mask"][:, :, 1, 0] = -1.0
        return found
    monkeypatch.setitem(sampling.ADDED, "ltxv_guide", thinned)
    model = load_tiny(case.checkpoint)
    patched = method[1](model)
    assert torch.equal(sampled(patched, case), sampled(model, case))
    assert "tokens beside the clip whose place is not known" in run_of(patched).other


def test_a_reference_image_is_seen_by_the_whole_clip_however_few_pairs_are_kept(load_tiny, method, sampled, run_of):
    case = next(case for case in CASES if case.kind == "wan_scail")
    patched = method[1](load_tiny(case.checkpoint))
    sampled(patched, case)
    entry, grid = run_of(patched).summary()[0], 5 * 5 * 6
    others = case.prefix + case.suffix
    assert entry["density"] >= (grid * others + others * (grid + others)) / (grid + others) ** 2
