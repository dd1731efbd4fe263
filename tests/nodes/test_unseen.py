"""A sampling in which the hook is never called is named, or mended where it can be; what the hook leaves behind."""
import copy
import logging

import pytest
import torch

SIZE = (5, 8, 12)


def relative_l2(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture
def compiled(comfyui):
    """compiled(model) -> a clone that core's TorchCompileModel has been through."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
    torch._logging.set_logs(dynamo=logging.ERROR)
    torch._dynamo.reset()

    def compile_model(model):
        clone = model.clone()
        set_torch_compile_wrapper(model=clone, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
        return clone
    return compile_model


def test_a_graph_compiled_before_the_node_was_there_is_compiled_again(wan, vsa, run_of, draw, compiled):
    wanted = draw(vsa(wan, 0.9), SIZE)
    plain = compiled(wan)
    dense = draw(plain, SIZE)
    patched = vsa(plain, 0.9)
    found = draw(patched, SIZE)
    run = run_of(patched)
    assert run.sparse_calls == 4 and relative_l2(found, wanted) < 1e-5 < relative_l2(found, dense)
    assert any("it was compiled again" in note for note in run.said)
    assert relative_l2(draw(plain, SIZE), dense) < 1e-5, "and without the node it is dense again"


def test_a_graph_compiled_around_an_earlier_node_serves_the_next_one(wan, vsa, run_of, draw, compiled):
    wanted = draw(vsa(wan, 0.9), SIZE)
    model = compiled(wan)
    draw(vsa(model, 0.5), SIZE)
    patched = vsa(model, 0.9)
    assert relative_l2(draw(patched, SIZE), wanted) < 1e-5 and run_of(patched).sparse_calls == 4
    assert run_of(patched).summary()[0]["sparsity"] == 0.9


def without_options(model):
    """The pattern of older caching packs: the model's forward is replaced by one that hands no options on."""
    clone, net = model.clone(), model.model.diffusion_model
    original = net.forward_orig

    def forward_orig(*args, transformer_options=None, **kwargs):
        return original(*args, **kwargs)
    clone.add_object_patch("diffusion_model.forward_orig", forward_orig)
    return clone


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_replaced_forward_that_drops_the_options_is_named(wan, vsa, run_of, draw, order):
    from pack.nodes.hook.status import status_text
    patched = vsa(without_options(wan), 0.9) if order == "before" else without_options(vsa(wan, 0.9))
    assert torch.equal(draw(patched, SIZE), draw(wan, SIZE))
    run = run_of(patched)
    assert run.sparse_calls == run.seen == 0
    first = status_text(run).splitlines()[0]
    assert first.startswith("VSA is OFF: the model made no attention call that this node could see.")
    assert "Bypass that node, or put this one behind it" in first


def test_strict_ends_such_a_sampling_after_its_first_step(wan, vsa, draw):
    steps = []
    patched = vsa(without_options(wan), 0.9, strict=True)
    with pytest.raises(RuntimeError, match="VSA is OFF: the model made no attention call that this node could see"):
        from sampling import kind_of, sample
        sample(patched, kind_of(patched), SIZE, steps=5, callback=lambda *args: steps.append(args))
    assert not steps


class Cached(torch.nn.Module):
    """Another pack's module in the model's place, that answers from what it has kept."""

    def __init__(self, net):
        super().__init__()
        self.net, self.dtype, self.patch_embedding, self.text_dim = net, net.dtype, net.patch_embedding, net.text_dim

    def forward(self, x, *args, **kwargs):
        return torch.zeros_like(x)


def test_a_model_in_another_class_is_named_and_nothing_crashes(wan, vsa, run_of, draw):
    from pack.nodes.hook.status import status_text
    patched, strict = vsa(wan, 0.9), vsa(wan, 0.9, strict=True)
    for model in (patched, strict):
        model.add_object_patch("diffusion_model", Cached(wan.model.diffusion_model))
    try:
        draw(patched, SIZE)
        with pytest.raises(RuntimeError, match="VSA is OFF: another node has put a Cached"):
            draw(strict, SIZE)
    finally:
        for model in (patched, strict):
            model.detach()
    assert status_text(run_of(patched)).startswith("VSA is OFF: another node has put a Cached in the model's place")


def test_what_the_hook_puts_into_transformer_options_can_be_copied_compared_and_listed(wan, vsa, run_of, draw):
    seen = []

    def upstream(func, *args, **kwargs):
        options = kwargs["transformer_options"]
        ours = {key: value for key, value in options.items() if str(key).startswith("video_sparse_attention")}
        assert copy.deepcopy(ours) == ours and sorted(map(str, ours.values())) and all(
            isinstance(value, (str, int)) or callable(value) or value is None for value in ours.values())
        seen.append(ours)
        return func(*args, **{**kwargs, "transformer_options": copy.deepcopy(
            {key: value for key, value in options.items() if key not in ("wrappers", "callbacks", "patches")})})
    clone = wan.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = upstream
    patched = vsa(clone, 0.9, dense_blocks="0")
    draw(patched, SIZE)
    assert seen and all(seen) and run_of(patched).sparse_calls == 2


def test_options_that_were_copied_between_two_calls_still_find_their_step(wan, vsa, run_of, draw):
    from comfy.ldm.wan.model import WanModel
    patched = vsa(wan, 0.9)
    wanted = draw(patched, SIZE)
    forward = wan.model.diffusion_model.forward_orig

    def copying(*args, transformer_options=None, **kwargs):
        return forward(*args, transformer_options=copy.copy(dict(transformer_options)), **kwargs)
    assert isinstance(wan.model.diffusion_model, WanModel)
    patched.add_object_patch("diffusion_model.forward_orig", copying)
    assert torch.equal(draw(patched, SIZE), wanted) and run_of(patched).sparse_calls == 4


def test_no_step_is_left_behind_even_after_an_error(wan, vsa, draw):
    from pack.nodes.hook.hook import SparseAttentionHook
    patched = vsa(wan, 0.9)
    draw(patched, SIZE)

    def broken(*args, **kwargs):
        raise RuntimeError("in the model")
    failing = patched.clone()
    failing.add_object_patch("diffusion_model.forward_orig", broken)
    with pytest.raises(RuntimeError, match="in the model"):
        draw(failing, SIZE)
    assert not SparseAttentionHook.of(patched)[0]._steps
