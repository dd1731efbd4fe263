"""The node among other nodes that want the attention override, and under torch.compile."""
import logging

import pytest
import torch


def counting(calls, chained=None):
    """An override that counts, and hands on to `chained` when there is one."""
    def override(func, *args, **kwargs):
        calls.append(1)
        return func(*args, **kwargs) if chained is None else chained(func, *args, **kwargs)
    return override


def put(model, override):
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


def override_of(model):
    return model.model_options["transformer_options"].get("optimized_attention_override")


def test_an_override_from_upstream_serves_the_dense_calls(wan, vsa, run_of, draw):
    calls = []
    patched = vsa(put(wan, counting(calls)), 0.9, dense_blocks="0")
    draw(patched)
    run = run_of(patched)
    assert run.sparse_calls == 2
    assert run.dense.total() + run.other.total() == 6 and len(calls) == 6 + run.probes


def test_core_attention_selection_upstream_serves_the_dense_calls(wan, vsa, run_of, draw):
    from comfy.ldm.modules.attention import attention_basic
    seen = []

    def select(func, *args, **kwargs):      # as core's and KJNodes' selections do: ignores func
        seen.append(func)
        return attention_basic.__wrapped__(*args, **kwargs)

    patched = vsa(put(wan, select), 0.0, dense_blocks="1")
    sparse, dense = draw(patched), draw(wan)
    assert ((sparse - dense).norm() / dense.norm()).item() < 1e-5
    assert run_of(patched).sparse_calls == 2 and seen


def test_a_later_node_that_replaces_the_override_becomes_dense_and_is_named(wan, vsa, run_of, draw):
    calls = []
    patched = put(vsa(wan, 0.9), counting(calls))
    draw(patched)
    run = run_of(patched)
    assert run.sparse_calls == run.other.total() == 4 and len(calls) == 4 + run.probes
    assert any("a node behind this one" in note for note in run.said)


def test_a_displaced_override_on_one_clone_does_not_reach_another(wan, vsa, draw):
    calls, patched = [], vsa(wan, 0.9, dense_blocks="0")
    expected = draw(patched)
    draw(put(patched, counting(calls)))
    assert calls
    calls.clear()
    assert torch.equal(draw(patched), expected) and not calls


def test_a_later_node_that_chains_to_ours_does_not_turn_in_a_circle(wan, vsa, run_of, draw):
    calls, patched = [], vsa(wan, 0.9, dense_blocks="0")
    draw(patched)
    later = put(patched, counting(calls, chained=override_of(patched)))
    draw(later)
    assert run_of(later).sparse_calls == 2 and len(calls) == 6 + run_of(later).probes


def test_a_second_vsa_node_replaces_the_first(wan, vsa, run_of, draw, caplog):
    with caplog.at_level(logging.INFO):
        twice = vsa(vsa(wan, 0.9), 0.0)
    assert "replaces the settings" in caplog.text
    assert len(twice.get_all_wrappers("outer_sample")) == 1
    assert ((draw(twice) - draw(wan)).norm() / draw(wan).norm()).item() <= 1e-5
    assert run_of(twice).sparse_calls == 4


def test_two_patched_clones_keep_their_own_counts(wan, vsa, run_of, draw):
    one, two = vsa(wan, 0.9), vsa(wan, 0.5, dense_blocks="0")
    draw(one)
    draw(two, steps=3)
    assert (run_of(one).sparse_calls, run_of(two).sparse_calls) == (4, 3)


def test_cloning_downstream_keeps_the_patch(wan, vsa, run_of, draw):
    patched = vsa(wan, 0.9)
    clone = patched.clone()
    assert torch.equal(draw(clone), draw(patched)) and run_of(clone).sparse_calls == 4


@pytest.mark.parametrize("order", ["compile after", "compile before"])
def test_torch_compile_runs_dense_and_sparse_steps_right(wan, vsa, run_of, draw, order):
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
    torch._logging.set_logs(dynamo=logging.ERROR)
    torch._dynamo.reset()

    def compiled(model):
        clone = model.clone()
        set_torch_compile_wrapper(model=clone, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
        return clone

    widgets = dict(start_percent=0.5, sparsity=0.9)     # the first step is dense: a baked branch would stay dense
    wanted = draw(vsa(wan, **widgets), (5, 8, 12), steps=4, cfg=1.0)
    patched = compiled(vsa(wan, **widgets)) if order == "compile after" else vsa(compiled(wan), **widgets)
    found = draw(patched, (5, 8, 12), steps=4, cfg=1.0)
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-5
    run = run_of(patched)
    assert 0 < run.sparse_calls < 8 and run.sparse_calls + run.dense.total() == 8


def test_applying_the_model_outside_a_guider_is_counted_too(wan, vsa, run_of):
    patched = vsa(wan, 0.0)
    base = patched.model
    patched.patch_model()
    x, context = torch.randn(1, 16, 5, 8, 12), torch.randn(1, 7, 64)
    options = {**patched.model_options["transformer_options"], "wrappers": patched.wrappers,
               "sigmas": torch.tensor([0.5])}
    with torch.inference_mode():
        found = base.apply_model(x, torch.tensor([0.5]), c_crossattn=context, transformer_options=options)
        wanted = base.apply_model(x, torch.tensor([0.5]), c_crossattn=context, transformer_options={})
    patched.cleanup()
    patched.unpatch_model()
    assert ((found - wanted).norm() / wanted.norm()).item() <= 1e-5
    assert run_of(patched).sparse_calls == 2
