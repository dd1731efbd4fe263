"""Trained gates in a real ComfyUI: used where they belong, nowhere else, and gone when they should be."""
import copy
import gc
import logging
import weakref

import pytest
import safetensors.torch
import torch

GRID = (5, 10, 12)


def relative_l2(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def hook_count(model):
    return sum(len(module._forward_pre_hooks) for module in model.model.modules())


@pytest.fixture
def changed_gates(gate_file, tmp_path):
    """changed_gates(f) -> a file with only the gates, every tensor replaced by f(tensor)."""
    def write(change, name="gates.safetensors"):
        state = {key: change(value) for key, value in safetensors.torch.load_file(gate_file).items() if "gate" in key}
        safetensors.torch.save_file(state, tmp_path / name)
        return tmp_path / name
    return write


@pytest.fixture
def tile_4x4x4(vsa):
    return lambda model, sparsity=0.5, **widgets: vsa(model, sparsity, tile_size="4x4x4", **widgets)


def test_gates_of_zero_equal_no_gates(wan, with_gates, changed_gates, tile_4x4x4, draw):
    zero = with_gates(wan, changed_gates(torch.zeros_like))
    assert torch.equal(draw(tile_4x4x4(zero), GRID), draw(tile_4x4x4(wan), GRID))


def test_random_gates_change_the_result_and_are_used_in_every_layer(wan, gated, tile_4x4x4, run_of, draw):
    patched = tile_4x4x4(gated)
    assert relative_l2(draw(patched, GRID), draw(tile_4x4x4(wan), GRID)) > 0.01
    run = run_of(patched)
    assert run.gated == {0: 2, 1: 2} and run.summary()[0]["gated_calls"] == run.sparse_calls == 4
    assert "VSA gates of this model used in 2 layers" in run.said


def test_auto_takes_the_trained_tile_for_gates_and_another_without(wan, gated, vsa, run_of, draw):
    for model, trained in ((gated, True), (wan, False)):
        patched = vsa(model, 0.5)
        draw(patched, GRID)
        assert (run_of(patched).summary()[0]["tile"] == [4, 4, 4]) is trained


def test_a_chosen_tile_is_taken_with_gates_too(gated, vsa, run_of, draw):
    patched = vsa(gated, 0.5, tile_size="2x4x8")
    draw(patched, GRID)
    assert run_of(patched).summary()[0]["tile"] == [2, 4, 8]


def test_a_clip_in_a_batch_gets_the_gates_it_gets_alone(gated, tile_4x4x4, draw):
    patched = tile_4x4x4(gated)
    both = draw(patched, GRID, batch=2)
    assert torch.isfinite(both).all() and both.shape[0] == 2


def test_the_plain_model_is_bit_equal_before_and_after(wan, gated, tile_4x4x4, draw):
    before, keys = draw(wan, GRID), set(wan.model.state_dict())
    draw(tile_4x4x4(gated), GRID)
    assert hook_count(wan) == 0
    assert torch.equal(draw(wan, GRID), before)
    assert set(wan.model.state_dict()) == keys and not any("gate" in key for key in keys)
    assert not any("gate" in key for key in wan.state_dict_for_saving())
    assert not wan.additional_models and "video_sparse_attention.gates" not in str(wan.model_options)


def test_a_clone_uses_the_gates_and_shares_their_memory(gated, tile_4x4x4, draw):
    from pack.nodes.trained.gates import KEY
    patched = tile_4x4x4(gated)
    clone = patched.clone().clone()
    assert torch.equal(draw(clone, GRID), draw(patched, GRID))
    assert clone.get_additional_models_with_key(KEY)[0].model is gated.get_additional_models_with_key(KEY)[0].model


def test_copying_model_options_deeply_copies_no_gates(gated):
    from pack.nodes.trained.gates import gates_of
    options = copy.deepcopy({"transformer_options": {"video_sparse_attention.gates": gates_of(gated)}})
    assert options["transformer_options"]["video_sparse_attention.gates"] is gates_of(gated)


def test_unloading_and_loading_again_changes_nothing(gated, tile_4x4x4, draw):
    import comfy.model_management as mm
    patched = tile_4x4x4(gated)
    before = draw(patched, GRID)
    names = {type(model.model.model).__name__ for model in mm.current_loaded_models if model.model is not None}
    assert "GateLayers" in names
    mm.unload_all_models()
    assert not mm.current_loaded_models and hook_count(gated) == 0
    assert torch.equal(draw(patched, GRID), before)


def test_two_models_with_different_gates_in_one_graph_keep_their_own(wan, gated, with_gates, changed_gates, tile_4x4x4,
                                                                    draw):
    one, two = tile_4x4x4(gated), tile_4x4x4(with_gates(wan, changed_gates(lambda gate: -2 * gate)))
    first, second = draw(one, GRID), draw(two, GRID)
    assert relative_l2(first, second) > 0.01
    for _ in range(2):
        assert torch.equal(draw(one, GRID), first) and torch.equal(draw(two, GRID), second)
    assert torch.equal(draw(tile_4x4x4(wan), GRID), draw(tile_4x4x4(wan.clone()), GRID))


def test_a_loaded_clone_that_is_dropped_leaves_nothing_on_the_model(wan, gated, tile_4x4x4, draw):
    before, patched = draw(wan, GRID), tile_4x4x4(gated)
    draw(patched, GRID)
    del patched
    gc.collect()
    assert hook_count(wan) == 0 and torch.equal(draw(wan, GRID), before)


def test_a_clone_dropped_in_the_middle_of_a_sampling_takes_no_gates_along(gated, tile_4x4x4, run_of, draw):
    """As ComfyUI's PatcherInjection would: a clone of a loaded model ejects, when it dies, what that model injected."""
    patched = tile_4x4x4(gated)
    expected = draw(patched, GRID, steps=3)

    def drop(*_):
        patched.clone()
        gc.collect()
    assert torch.equal(draw(patched, GRID, steps=3, callback=drop), expected)
    assert run_of(patched).gated.total() == 6


def test_an_interrupt_halfway_leaves_no_hooks_and_no_trace(wan, gated, tile_4x4x4, draw):
    import comfy.model_management as mm
    patched, plain = tile_4x4x4(gated), draw(wan, GRID)
    expected = draw(patched, GRID, steps=3)

    def stop(step, *_):
        raise mm.InterruptProcessingException()
    with pytest.raises(mm.InterruptProcessingException):
        draw(patched, GRID, steps=3, callback=stop)
    assert hook_count(wan) == 0
    assert torch.equal(draw(wan, GRID), plain) and torch.equal(draw(patched, GRID, steps=3), expected)


@pytest.mark.parametrize("layer", [0, 1])
def test_an_exception_in_a_pre_hook_reaches_the_user_and_leaves_nothing(wan, gated, tile_4x4x4, draw, monkeypatch,
                                                                        layer):
    from pack.nodes.trained.gates import KEY
    patched, plain = tile_4x4x4(gated), draw(wan, GRID)
    expected = draw(patched, GRID)
    feeds = patched.get_additional_models_with_key(KEY)[0].model.feeds

    def fail(*_):
        raise RuntimeError("no gate today")
    monkeypatch.setattr(patched.get_additional_models_with_key(KEY)[0].model, "feeds",
                        [fail if n == layer else feed for n, feed in enumerate(feeds)])
    with pytest.raises(RuntimeError, match="no gate today"):
        draw(patched, GRID)
    monkeypatch.undo()
    assert hook_count(wan) == 0
    assert torch.equal(draw(wan, GRID), plain) and torch.equal(draw(patched, GRID), expected)


def test_gates_are_freed_with_the_last_model_that_has_them(gated, tile_4x4x4, draw):
    import comfy.model_management as mm

    from pack.nodes.trained.gates import KEY, GateLayers

    def gate_bytes():
        gc.collect()
        alive = [module for module in gc.get_objects() if type(module) is GateLayers and module is not kept]
        return sum(p.numel() * p.element_size() for module in alive for p in module.parameters())

    kept = gated.get_additional_models_with_key(KEY)[0].model
    before = gate_bytes()
    from pack.nodes.trained.gate_files import open_gates
    from pack.nodes.trained.gates import attach, gates_of
    patcher = open_gates(gated_path(gated), torch.float32, gated.load_device, gated.offload_device)
    patched = tile_4x4x4(attach(gated, patcher, gates_of(gated).trained, "self_attn"))
    gone = weakref.ref(patcher.model)
    draw(patched, GRID)
    assert gate_bytes() - before == 2 * (256 * 256 + 256) * 4
    del patched, patcher
    mm.unload_all_models()
    assert gate_bytes() == before and gone() is None


def gated_path(gated):
    from pack.nodes.trained.gates import KEY
    return gated.get_additional_models_with_key(KEY)[0].cached_patcher_init[1][0]


def test_gates_under_low_memory_give_the_same(gated, tile_4x4x4, draw):
    """As `--lowvram` loads them: every layer that does not fit is cast when it is called."""
    from pack.nodes.trained.gates import KEY
    patcher = gated.get_additional_models_with_key(KEY)[0]
    x = torch.randn(1, 9, 256)
    wanted = patcher.model.layers[1](x)
    patcher.load(torch.device("cpu"), lowvram_model_memory=1)
    try:
        assert patcher.model.model_lowvram
        assert torch.equal(patcher.model.layers[1](x), wanted)
    finally:
        patcher.detach()
    assert torch.equal(patcher.model.layers[1](x), wanted)


def test_the_gates_can_be_made_again_as_comfyui_asks_for_other_devices(gated, tile_4x4x4, draw):
    from pack.nodes.trained.gates import KEY
    patcher = gated.get_additional_models_with_key(KEY)[0]
    again = patcher.cached_patcher_init[0](*patcher.cached_patcher_init[1], disable_dynamic=True)
    assert again.model is not patcher.model
    for one, two in zip(again.model.state_dict().values(), patcher.model.state_dict().values()):
        assert torch.equal(one, two)


def test_gates_attached_after_the_vsa_node_are_used_too(wan, gate_file, gated, vsa, run_of, draw, monkeypatch):
    from pack.nodes.trained import attach_vsa_gates
    monkeypatch.setattr(attach_vsa_gates, "gate_file_path", lambda name: gate_file)
    after = attach_vsa_gates.VSAGatesAttach.execute(vsa(wan, 0.5), "x")[0]
    assert torch.equal(draw(after, GRID), draw(vsa(gated, 0.5), GRID))
    assert run_of(after).gated.total() == 4 and run_of(after).summary()[0]["tile"] == [4, 4, 4]


def test_attaching_other_gates_replaces_the_first(wan, gated, with_gates, changed_gates, tile_4x4x4, draw):
    other = changed_gates(lambda gate: -gate)
    twice = with_gates(gated, other)
    assert torch.equal(draw(tile_4x4x4(twice), GRID), draw(tile_4x4x4(with_gates(wan, other)), GRID))
    assert len(twice.get_additional_models()) == 1 and len(twice.get_all_wrappers("apply_model")) == 1


def test_a_lora_on_the_model_still_counts(gated, tile_4x4x4, draw):
    key = "diffusion_model.blocks.0.self_attn.q.weight"
    patch = {key: (torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) * 0.1,)}

    def with_lora(model):
        clone = model.clone()
        assert clone.add_patches(patch, 1.0)
        return clone
    before, after = draw(tile_4x4x4(with_lora(gated)), GRID), draw(with_lora(tile_4x4x4(gated)), GRID)
    assert torch.equal(before, after) and relative_l2(before, draw(tile_4x4x4(gated), GRID)) > 1e-4


@pytest.mark.parametrize("order", ["compile after", "compile before"])
def test_torch_compile_uses_the_right_gates_whatever_ran_before(wan, gated, with_gates, changed_gates, tile_4x4x4, draw,
                                                                run_of, order):
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
    torch._logging.set_logs(dynamo=logging.ERROR)
    torch._dynamo.reset()

    def compiled(model):
        clone = model.clone()
        set_torch_compile_wrapper(model=clone, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
        return clone

    def both(model):
        return compiled(tile_4x4x4(model)) if order == "compile after" else tile_4x4x4(compiled(model))
    models = {"none": wan, "gates": gated, "others": with_gates(wan, changed_gates(lambda gate: -gate))}
    wanted = {name: draw(tile_4x4x4(model), (5, 8, 12), cfg=1.0) for name, model in models.items()}
    patched = {name: both(model) for name, model in models.items()}
    for name in ("none", "gates", "none", "others", "gates", "others"):
        assert relative_l2(draw(patched[name], (5, 8, 12), cfg=1.0), wanted[name]) < 1e-5, name
        assert run_of(patched[name]).gated.total() == (0 if name == "none" else 4)


def test_a_gated_model_outside_comfyuis_samplers_says_so(gated, vsa):
    patched = vsa(gated, 0.5)
    options = {**patched.model_options["transformer_options"], "wrappers": patched.wrappers,
               "sigmas": torch.tensor([0.5])}
    with torch.inference_mode(), pytest.raises(RuntimeError, match="gates are not loaded: sample it through ComfyUI's"):
        patched.model.apply_model(torch.randn(1, 16, 5, 8, 12), torch.tensor([0.5]), c_crossattn=torch.randn(1, 7, 64),
                                  transformer_options=options)
