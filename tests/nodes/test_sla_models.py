"""An SLA-trained model in a real ComfyUI: loaded from every layout, its projections used wherever attention runs."""
import gc
import logging

import pytest
import safetensors.torch
import torch

from make_sla_checkpoints import NATIVE, SLA_KINDS, flat_patch, is_projection, quantised
from make_tiny import save

GRID = (5, 10, 12)
"""150 tokens: three runs of 64 keys."""


def relative_l2(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def hook_count(model):
    return sum(len(module._forward_pre_hooks) for module in model.model.modules())


@pytest.fixture
def turbo(load, write_sla):
    return load(write_sla("native"))[0]


@pytest.fixture
def zeros(load, write_sla, sla_state):
    """The same weights with projections of zero: SLA is then top-k."""
    return load(write_sla("native", {name: value * 0 if is_projection(name) else value
                                     for name, value in sla_state.items()}))


@pytest.mark.parametrize("kind", SLA_KINDS)
def test_every_layout_samples_the_same_with_nothing_missing(load, write_sla, sla, run_of, draw, caplog, kind):
    model, description = load(write_sla(kind))
    patched = sla(model)
    wanted = sla(load(write_sla("native"))[0])
    assert relative_l2(draw(patched, GRID), draw(wanted, GRID)) <= 1e-6
    assert run_of(patched).gated == {0: 2, 1: 2} and "SLA projections in 2 of 2 layers" in description
    assert "unet missing" not in caplog.text and "unet unexpected" not in caplog.text


@pytest.mark.parametrize("kind", ["", "-quant"])
def test_turbodiffusions_files_sample_the_same_when_converted(load, write_sla, sla, sla_state, draw, tmp_path, kind):
    from pack.checkpoints.convert import convert
    state, wanted = quantised(sla_state) if kind else (sla_state, sla_state)
    torch.save(flat_patch(state), tmp_path / f"turbo{kind}.pth")
    convert(tmp_path / f"turbo{kind}.pth", tmp_path / "turbo.safetensors")
    found = safetensors.torch.load_file(tmp_path / "turbo.safetensors")
    save(found, tmp_path / "told.safetensors", {"text_dim": 64})      # which no tensor of so small a model tells
    model, description = load(tmp_path / "told.safetensors")
    assert "SLA projections in 2 of 2 layers" in description
    assert relative_l2(draw(sla(model), GRID), draw(sla(load(write_sla("native", wanted))[0]), GRID)) <= 1e-6


def test_projections_change_the_result_and_are_used_in_every_layer(turbo, wan, sla, run_of, draw):
    patched = sla(turbo, query_run="128")
    assert relative_l2(draw(patched, GRID), draw(sla(wan, query_run="128"), GRID)) > 0.01
    assert "SLA projections of this model used in 2 layers" in run_of(patched).said


def test_projections_of_zero_are_told_and_the_model_is_then_a_plain_one(zeros, wan, sla, run_of, draw):
    model, description = zeros
    assert "all of them zero: not trained with SLA" in description and not model.additional_models
    patched = sla(model)
    assert torch.equal(draw(patched, GRID), draw(sla(wan), GRID))
    assert any("no trained projection in this model: plain top-k" in text for text in run_of(patched).warnings)


def test_auto_takes_the_released_run_for_a_trained_model_and_the_finer_one_without(turbo, wan, sla, run_of, draw):
    for model, run in ((turbo, 128), (wan, 64)):
        draw(patched := sla(model), GRID)
        assert run_of(patched).summary()[0]["runs"] == [run, 64]
    draw(patched := sla(turbo, query_run="64"), GRID)
    assert run_of(patched).summary()[0]["runs"] == [64, 64]
    assert "query_run 64 differs from the 128 of this model" in run_of(patched).said


@pytest.mark.parametrize("how", ["ratio 1", "too few tokens", "outside the schedule", "dense blocks",
                                 "a place not known", "no kernel", "out of memory"])
def test_calls_that_run_dense_get_the_projection_too(turbo, sla, run_of, draw, monkeypatch, how):
    """Ratio 1 is dense attention plus the projection: whatever runs dense must give that."""
    from pack.nodes.hook.hook import SparseAttentionHook
    wanted = draw(sla(turbo, 1.0), GRID)
    widgets = {"too few tokens": {"min_tokens": 9999}, "outside the schedule": {"start_percent": 1.0},
               "dense blocks": {"dense_blocks": "0, 1"}}.get(how, {})
    if how in ("no kernel", "out of memory"):
        widgets["backend"] = "auto"
    patched = sla(turbo, 1.0 if how == "ratio 1" else 0.3, **widgets)
    method = SparseAttentionHook.of(patched)[-1].method
    if how == "a place not known":
        monkeypatch.setattr(SparseAttentionHook, "_grid", lambda *_: "tokens beside the clip whose place is not known")
    elif how == "no kernel":
        from pack import kernels
        monkeypatch.setattr(kernels, "KERNELS", ())
    elif how == "out of memory":
        def fail(*_):
            raise torch.cuda.OutOfMemoryError("full")
        monkeypatch.setattr(type(method), "attend", fail)
    found = draw(patched, GRID, steps=2)
    run = run_of(patched)
    if how == "ratio 1":
        assert run.gated.total() == 4
    elif how == "outside the schedule":
        assert run.completed.total() in (2, 4)          # the last sigma lies on the boundary
    else:
        assert run.completed.total() >= 4 and not run.gated
    if how != "outside the schedule":
        assert relative_l2(found, wanted) <= 1e-5


def test_cross_attention_gets_none(turbo, sla, run_of, draw):
    draw(patched := sla(turbo, min_tokens=9999), GRID)
    run = run_of(patched)
    assert run.other["cross-attention"] == 4 and run.completed == {0: 2, 1: 2}
    said = "4 attention calls of this SLA-trained model ran dense, with its projections"
    assert any(said in text for text in run.warnings)


def test_sampling_without_the_node_or_with_another_one_warns(turbo, vsa, sta, sla, run_of, draw, caplog):
    draw(turbo, GRID)
    assert "about to run without its projections" in caplog.text
    for patch in (vsa, sta):
        caplog.clear()
        patched = patch(turbo)
        sentence = ("this model was trained with SLA and its SLA projections are not used here: use the node Sparse "
                    "Linear Attention (SLA) in place of this one")
        assert sentence in caplog.text
        draw(patched, GRID)
        assert sentence in run_of(patched).warnings and "about to run without its projections" in caplog.text
    caplog.clear()
    draw(sla(turbo), GRID)
    assert "about to run" not in caplog.text and "not used here" not in caplog.text


def test_a_vsa_trained_model_under_the_sla_node_warns(gated, sla, run_of, draw, caplog):
    draw(patched := sla(gated), GRID)
    assert any("was trained with VSA and its VSA gates are not used here: use the node Video Sparse Attention" in text
               for text in run_of(patched).warnings)


def test_vsa_gates_are_refused_on_an_sla_trained_model(turbo, gate_file, with_gates):
    with pytest.raises(ValueError, match="trained with SLA and has SLA projections: VSA gates are not for it"):
        with_gates(turbo, gate_file)


def test_settings_that_leave_the_training_are_named_at_once(load, write_sla, sla, caplog):
    path = write_sla("native")
    named = path.rename(path.with_name("TurboWan2.1-T2V-1.3B-480P.safetensors"))
    model, description = load(named)
    assert "Trained as TurboWan2.1-T2V-1.3B-480P: ratio 0.1 (0.15 for quality)" in description
    sla(model, 0.5, start_percent=0.2, dense_blocks="0", feature_map="elu")
    for part in ("start_percent 0.2 (wanted 0), dense_blocks (wanted none)", "ratio 0.5 is far from the 0.1",
                 "feature_map elu differs from the softmax"):
        assert part in caplog.text
    caplog.clear()
    sla(model, 0.15)
    assert "[SLA]" not in caplog.text


def test_the_plain_model_is_bit_equal_before_and_after(turbo, sla, wan, draw):
    before = draw(wan, GRID)
    draw(sla(turbo), GRID)
    assert hook_count(turbo) == 0 and not any("proj_l" in key for key in turbo.model.state_dict())
    assert torch.equal(draw(wan, GRID), before)


def test_clones_share_and_unloading_changes_nothing(turbo, sla, draw):
    import comfy.model_management as mm

    from pack.nodes.trained.projections import KEY
    patched = sla(turbo)
    before, clone = draw(patched, GRID), patched.clone().clone()
    assert torch.equal(draw(clone, GRID), before)
    assert clone.get_additional_models_with_key(KEY)[0].model is turbo.get_additional_models_with_key(KEY)[0].model
    mm.unload_all_models()
    assert torch.equal(draw(patched, GRID), before)


def test_a_clone_dropped_or_an_interrupt_in_the_middle_leaves_nothing(turbo, sla, run_of, draw):
    import comfy.model_management as mm
    patched = sla(turbo)
    expected = draw(patched, GRID, steps=3)

    def drop(*_):
        patched.clone()
        gc.collect()

    def stop(*_):
        raise mm.InterruptProcessingException()
    assert torch.equal(draw(patched, GRID, steps=3, callback=drop), expected)
    with pytest.raises(mm.InterruptProcessingException):
        draw(patched, GRID, steps=3, callback=stop)
    assert hook_count(turbo) == 0 and torch.equal(draw(patched, GRID, steps=3), expected)


def test_a_lora_on_the_model_still_counts(turbo, sla, draw):
    key = "diffusion_model.blocks.0.self_attn.q.weight"
    patch = {key: (torch.randn(256, 256, generator=torch.Generator().manual_seed(1)) * 0.1,)}

    def with_lora(model):
        clone = model.clone()
        assert clone.add_patches(patch, 1.0)
        return clone
    before, after = draw(sla(with_lora(turbo)), GRID), draw(with_lora(sla(turbo)), GRID)
    assert torch.equal(before, after) and relative_l2(before, draw(sla(turbo), GRID)) > 1e-4


def test_low_memory_and_a_narrow_weight_dtype_keep_the_projections_whole(load, write_sla, sla, run_of, draw):
    from pack.nodes.trained.projections import KEY
    model, _ = load(write_sla("TurboDiffusion"), "fp8_e4m3fn")
    patcher = model.get_additional_models_with_key(KEY)[0]
    assert patcher.model.layers[0].weight.dtype is torch.float32
    x = torch.randn(3, 128)
    wanted = patcher.model.layers[1](x)
    patcher.load(torch.device("cpu"), lowvram_model_memory=1)
    try:
        assert torch.equal(patcher.model.layers[1](x), wanted)
    finally:
        patcher.detach()
    draw(patched := sla(model), GRID)
    assert run_of(patched).gated.total() == 4


def test_comfyui_can_ask_for_the_projections_again(turbo):
    from pack.nodes.trained.projections import KEY
    patcher = turbo.get_additional_models_with_key(KEY)[0]
    again = patcher.cached_patcher_init[0](*patcher.cached_patcher_init[1], disable_dynamic=True)
    assert again.model is not patcher.model
    assert all(torch.equal(one, two) for one, two in zip(
        again.model.state_dict().values(), patcher.model.state_dict().values(), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_projections_that_are_not_finite_are_refused(load, write_sla, sla_state, value):
    broken = {name: tensor.clone() for name, tensor in sla_state.items()}
    broken[NATIVE.format(1, "bias")][3] = value
    with pytest.raises(ValueError, match="projection of layer 1 holds NaN or infinity: the file is damaged"):
        load(write_sla("native", broken))


def test_a_saved_model_has_its_projections_and_its_training(load, write_sla, sla_state, sla, tmp_path, monkeypatch):
    import folder_paths
    from comfy_extras.nodes_model_merging import ModelSave
    path = write_sla("native")
    model, description = load(path.rename(path.with_name("TurboWan2.1-T2V-14B-720P.safetensors")))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    with torch.inference_mode():
        ModelSave().save(sla(model), filename_prefix="models/saved", prompt={"1": {}})
    saved = next((tmp_path / "models").glob("saved_*.safetensors"))
    found = {name.removeprefix("model.diffusion_model."): value
             for name, value in safetensors.torch.load_file(saved).items()}
    assert all(torch.equal(found[name], value) for name, value in sla_state.items() if is_projection(name))
    from pack.checkpoints.plan import plan_of
    from pack.checkpoints.source import open_checkpoint
    plan = plan_of(open_checkpoint(saved))
    assert (plan.trained.name, len(plan.projections)) == ("TurboWan2.1-T2V-14B-720P", 2)
    assert "TurboWan2.1-T2V-14B-720P" in description


def test_torch_compile_uses_the_projections_too(turbo, sla, run_of, draw):
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
    torch._logging.set_logs(dynamo=logging.ERROR)
    torch._dynamo.reset()
    wanted = draw(sla(turbo), (5, 8, 12), cfg=1.0)
    patched = sla(turbo)
    set_torch_compile_wrapper(model=patched, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    assert relative_l2(draw(patched, (5, 8, 12), cfg=1.0), wanted) < 1e-5 and run_of(patched).gated.total() == 4
