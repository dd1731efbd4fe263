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


@pytest.fixture
def untraced():
    """Compiled modules stand where they stand, and run what they wrap without tracing it, which takes 10 s a model."""
    with torch.compiler.set_stance("force_eager"):
        yield


def facts(run):
    return dict(run.layers), dict(run.dense), dict(run.other), [
        (entry["grid"], entry["prefix"], entry["suffix"], entry["sparse_calls"]) for entry in run.summary()
        if entry["grid"]]


def the_same_compiled(model, case, node, steps, run_of, compiled, order):
    """Samples a model with and without torch.compile; asserts that result, grid, layers and reasons are the same."""
    plain = node(model)
    wanted = steps(plain, case)
    patched = node(compiled(model)) if order == "before" else compiled(node(model))
    with witnessed(patched) as seen:
        assert relative_l2(steps(patched, case), wanted) < 1e-5
    assert facts(run_of(patched)) == facts(run_of(plain)) and run_of(plain).sparse_calls
    assert all(told == running for told, running in seen)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_compiled_model_runs_what_the_model_runs(load_tiny, vsa, steps, untraced, run_of, case, order):
    the_same_compiled(load_tiny(case.checkpoint), case, lambda model: vsa(model, 0.9, dense_blocks="-1"), steps, run_of,
                      whole_model, order)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["Wan VACE", "HunyuanVideo", "LTX-2", "MiniMax H3", "Cosmos 1"])
def test_compiled_blocks_run_what_the_blocks_run(load_tiny, vsa, steps, untraced, run_of, name, order):
    case = next(case for case in CASES if case.name == name)
    the_same_compiled(load_tiny(case.checkpoint), case, lambda model: vsa(model, 0.9, dense_blocks="-1"), steps, run_of,
                      every_block, order)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("name", ["Wan S2V", "Wan HuMo", "Wan SCAIL", "LTXV"])
def test_a_model_that_an_object_patch_compiles_runs_what_the_model_runs(load_tiny, sta, steps, untraced, run_of, name,
                                                                       order):
    case = next(case for case in CASES if case.name == name)
    the_same_compiled(load_tiny(case.checkpoint), case, lambda model: sta(model, "1x1x1"), steps, run_of, object_patch,
                      order)


def test_a_node_finds_the_family_of_a_model_that_is_compiled_right_now(load_tiny, vsa, run_of, steps, untraced):
    """Installed while the compiled module stands in the model's place, as an object patch leaves it after a run."""
    case = next(case for case in CASES if case.name == "Wan S2V")
    model = load_tiny(case.checkpoint)
    wanted, compiled = steps(vsa(model, 0.9), case), object_patch(model)
    steps(compiled, case)
    assert type(compiled.model.diffusion_model).__name__ == "OptimizedModule"
    patched = vsa(compiled, 0.9)
    assert relative_l2(steps(patched, case), wanted) < 1e-5 and run_of(patched).sparse_calls
    steps(model, case)
    assert type(model.model.diffusion_model).__name__ == "WanModel_S2V"


def test_layers_are_known_in_a_traced_model_too(load_tiny, vsa, steps, run_of):
    case = next(case for case in CASES if case.name == "LTXV")
    the_same_compiled(load_tiny(case.checkpoint), case, lambda model: vsa(model, 0.9, dense_blocks="-1"), steps, run_of,
                      whole_model, "before")
