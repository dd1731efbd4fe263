"""torch.compile in front of the nodes and behind them: every model variant gives what it gives without it."""
import logging

import pytest
import torch

from family_cases import CASES
from witness import witnessed


def relative_l2(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def whole_model(model):
    """As core's TorchCompileModel does it, with a backend that needs no compiler."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
    clone = model.clone()
    set_torch_compile_wrapper(model=clone, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    return clone


def every_block(model):
    """As nodes do it that compile the transformer blocks one by one."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
    clone, net = model.clone(), model.model.diffusion_model
    names = [name for name, module in net.named_children() if name.endswith("blocks") and name != "vace_blocks"]
    keys = [f"diffusion_model.{name}.{n}" for name in names for n, _ in getattr(net, name).named_children()]
    set_torch_compile_wrapper(model=clone, backend="eager", keys=keys,
                              options={"guard_filter_fn": skip_torch_compile_dict})
    return clone


def object_patch(model):
    """As older nodes do it: the compiled model takes the model's place for as long as the clone is loaded."""
    clone = model.clone()
    clone.add_object_patch("diffusion_model", torch.compile(model.model.diffusion_model, backend="eager"))
    return clone


@pytest.fixture
def steps(comfyui):
    """steps(model, case) -> the latent after two steps; compiled graphs of other tests are forgotten before."""
    from sampling import sample
    torch._logging.set_logs(dynamo=logging.ERROR)
    torch._dynamo.reset()
    return lambda model, case: sample(model, case.kind, steps=2)


def facts(run):
    return dict(run.layers), dict(run.dense), dict(run.other), [
        (entry["grid"], entry["prefix"], entry["suffix"], entry["sparse_calls"]) for entry in run.summary()
        if entry["grid"]]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_compiled_model_runs_what_the_model_runs(load_tiny, vsa, steps, run_of, case, order):
    model, widgets = load_tiny(case.checkpoint), dict(sparsity=0.9, dense_blocks="-1")
    plain = vsa(model, **widgets)
    wanted = steps(plain, case)
    patched = vsa(whole_model(model), **widgets) if order == "before" else whole_model(vsa(model, **widgets))
    with witnessed(patched) as seen:
        assert relative_l2(steps(patched, case), wanted) < 1e-5
    assert facts(run_of(patched)) == facts(run_of(plain)) and run_of(plain).sparse_calls
    assert all(told == running for told, running in seen)
