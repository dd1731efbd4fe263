"""Which layer, and which of its heads, a call belongs to when blocks are skipped or attention comes in parts."""
import sys

import pytest
import torch

from family_cases import CASES
from witness import witnessed

KINDS = {case.name: case for case in CASES}
SKIPPING = ("Wan T2V", "HunyuanVideo", "HunyuanVideo 1.5", "LTXV", "LTX-2", "Mochi", "MiniMax H3")
"""Where core's skip-layer guidance has an effect: it replaces whole blocks, which the others do not let it."""
SPLIT = ("Wan T2V", "LTXV", "LTX-2", "Mochi", "Cosmos 1", "MiniMax H3", "CogVideoX")
"""One of every way to hand over heads, with two heads at least."""


def case_of(names):
    return pytest.mark.parametrize("case", [KINDS[name] for name in names], ids=lambda case: case.name)


def relative_l2(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture
def sampled(comfyui):
    from sampling import sample
    return lambda model, case, **knobs: sample(model, case.kind, **{"steps": 2, **knobs})


@pytest.fixture
def one_head_a_call(comfyui, monkeypatch):
    """From now on models call attention once per head, as nodes for little memory make them do."""
    def split(attention):
        def call(q, k, v, heads, *args, **kwargs):
            q, k, v = (x if isinstance(x, torch.Tensor) else x.take() for x in (q, k, v))
            by_head, out_by_head = kwargs.get("skip_reshape", False), kwargs.get("skip_output_reshape", False)

            def part(x, head):
                return x[:, head:head + 1] if by_head else x.unflatten(-1, (heads, -1))[:, :, head]
            parts = [attention(*(part(x, head) for x in (q, k, v)), 1, *args, **kwargs) for head in range(heads)]
            return torch.cat(parts, 1 if out_by_head else -1)
        return call

    def start():
        import comfy.ldm.modules.attention
        attention = comfy.ldm.modules.attention.optimized_attention
        for name, module in list(sys.modules.items()):
            if name.startswith("comfy.ldm.") and getattr(module, "optimized_attention", None) is attention:
                monkeypatch.setattr(module, "optimized_attention", split(attention))
    return start


@case_of(SKIPPING)
def test_layers_behind_a_block_that_guidance_skips_for_one_condition_are_known(load_tiny, vsa, sampled, run_of, case):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple
    patched = SkipLayerGuidanceDiTSimple.execute(vsa(load_tiny(case.checkpoint)), 0.0, 1.0, "0", "0")[0]
    with witnessed(patched) as seen:
        sampled(patched, case, cfg=4.0)
    assert seen and all(told == running for told, running in seen)
    calls = [told for told, _ in seen]
    assert calls.count(0) < calls.count(1)


@case_of(("LTXV", "LTX-2", "Mochi", "MiniMax H3"))
def test_dense_blocks_hits_its_block_behind_a_skipped_one(load_tiny, vsa, sampled, run_of, case):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple
    patched = vsa(load_tiny(case.checkpoint), dense_blocks="1")
    sampled(SkipLayerGuidanceDiTSimple.execute(patched, 0.0, 1.0, "0", "")[0], case, cfg=4.0)
    layers = run_of(patched).layers
    assert set(layers[1]) == {"dense_blocks"} and set(layers[0]) == {"sparse"}
    assert layers[0].total() < layers[1].total()


def test_blocks_without_attention_under_spatio_temporal_guidance_count_for_nothing(load_tiny, vsa, sampled, run_of):
    import inspect

    import comfy.ldm.lightricks.av_model as av_model
    if "stg_self_attn_blocks" not in inspect.getsource(av_model):
        pytest.skip("this ComfyUI has no spatio-temporal guidance for LTX-2")
    patched = vsa(load_tiny("tiny_ltxav"))
    patched.model_options["transformer_options"]["stg_self_attn_blocks"] = {0}
    with witnessed(patched) as seen:
        sampled(patched, KINDS["LTX-2"])
    assert seen and set(seen) == {(1, 1)}


@pytest.mark.parametrize("patch", ["vsa", "sta"])
@case_of(SPLIT)
def test_attention_in_parts_gives_what_it_gives_whole(load_tiny, request, sampled, run_of, one_head_a_call, case,
                                                       patch):
    from pack.nodes.families import family_of
    model, node = load_tiny(case.checkpoint), request.getfixturevalue(patch)
    whole, parts = node(model, dense_blocks="1"), node(model, dense_blocks="1")
    wanted = sampled(whole, case, latent_thw=case.odd[0])
    one_head_a_call()
    assert relative_l2(sampled(parts, case, latent_thw=case.odd[0]), wanted) < 1e-5
    heads = family_of(model.model).heads(model.model.diffusion_model)[0]
    assert run_of(parts).sparse_calls == heads * run_of(whole).sparse_calls > 0 and heads > 1
    assert set(run_of(parts).layers[0]) == {"sparse"} and set(run_of(parts).layers[1]) == {"dense_blocks"}


@case_of(SPLIT)
def test_parts_of_the_heads_take_their_own_windows_of_a_strategy(load_tiny, sta, sampled, run_of, one_head_a_call,
                                                                 case):
    from pack.nodes.families import family_of
    from pack.vsa_core.strategy import Strategy
    model = load_tiny(case.checkpoint)
    heads = family_of(model.model).heads(model.model.diffusion_model)[0]
    windows = ((1, 1, 1), (3, 1, 1), (1, 3, 1), (1, 1, 3), (3, 3, 1))
    table = [[[windows[(layer * heads + head) % len(windows)] for head in range(heads)]
              for layer in range(case.layers)]]
    strategy = Strategy.of_windows(table, (3, 3, 3))
    whole, parts = (sta(model, tile_size="1x8x8", strategy=strategy) for _ in range(2))
    latent = tuple(9 * side if axis else 3 for axis, side in enumerate((3, 2, 2)))
    wanted = sampled(whole, case, latent_thw=latent, steps=1)
    one_head_a_call()
    assert relative_l2(sampled(parts, case, latent_thw=latent, steps=1), wanted) < 1e-5
    assert run_of(parts).sparse_calls == heads * run_of(whole).sparse_calls > 0


@case_of(("Wan T2V", "MiniMax H3"))
def test_parts_of_the_heads_take_their_own_gates(load_tiny, with_gates, vsa, sampled, run_of, one_head_a_call, case,
                                                 gates_for):
    gated = with_gates(load_tiny(case.checkpoint), gates_for(case))
    whole, parts = (vsa(gated, 0.5, tile_size="4x4x4") for _ in range(2))
    latent = (5, 10, 12)
    wanted = sampled(whole, case, latent_thw=latent)
    assert relative_l2(sampled(vsa(load_tiny(case.checkpoint), 0.5, tile_size="4x4x4"), case, latent_thw=latent),
                       wanted) > 1e-4
    one_head_a_call()
    assert relative_l2(sampled(parts, case, latent_thw=latent), wanted) < 1e-5
    assert run_of(parts).gated.total() == run_of(parts).sparse_calls > run_of(whole).sparse_calls


@pytest.fixture
def gates_for(tmp_path):
    """gates_for(case) -> a file with random gates for that case's tiny model of two layers."""
    import safetensors.torch

    def write(case):
        name, shape = {"Wan T2V": ("blocks.{}.to_gate_compress.weight", (256, 256)),
                       "MiniMax H3": ("blocks.{}.attn.to_gate_compress.weight", (256, 128))}[case.name]
        generator = torch.Generator().manual_seed(2)
        state = {name.format(n): torch.randn(shape, generator=generator) * 0.09 for n in range(2)}
        safetensors.torch.save_file(state, tmp_path / "gates.safetensors")
        return tmp_path / "gates.safetensors"
    return write


@pytest.fixture
def low_memory(comfyui):
    """low_memory(model) -> a clone of a MiniMax H3 model whose attention gets its input in a list, and empties it."""
    import types
    handles = []

    def attention(self, x, **kwargs):
        return type(self).forward(self, x.pop(), **kwargs)

    def patch(model):
        clone = model.clone()
        for n, block in enumerate(model.model.diffusion_model.blocks):
            clone.add_object_patch(f"diffusion_model.blocks.{n}.attn.forward", types.MethodType(attention, block.attn))
            handles.append(block.attn.register_forward_pre_hook(lambda module, args: ([args[0]], *args[1:])))
        return clone
    yield patch
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("order", ["before", "after"])
def test_gates_reach_an_attention_that_gets_its_input_in_a_list(load_tiny, with_gates, vsa, sampled, run_of, low_memory,
                                                               gates_for, one_head_a_call, order):
    case = KINDS["MiniMax H3"]
    gated, settings = with_gates(load_tiny(case.checkpoint), gates_for(case)), dict(sparsity=0.5, tile_size="4x4x4")
    wanted = sampled(vsa(gated, **settings), case)
    patched = vsa(low_memory(gated), **settings) if order == "before" else low_memory(vsa(gated, **settings))
    assert torch.equal(sampled(patched, case), wanted)
    assert run_of(patched).gated.total() == run_of(patched).sparse_calls > 0
    one_head_a_call()
    assert relative_l2(sampled(patched, case), wanted) < 1e-5


def test_gates_of_another_number_of_tokens_leave_the_call_dense(comfyui):
    from pack.nodes.hook.method import StaysDense
    from pack.nodes.trained.gates import FedGate
    x, layer = torch.randn(2, 6, 8), torch.nn.Linear(8, 8)
    query = torch.randn(2, 6, 4, 2)
    assert torch.equal(FedGate(layer, x).of(query, range(4), 4), layer(x).view(2, 6, 4, 2))
    for other, part in ((query[:1], range(4)), (query[:, :3], range(4)), (query, None)):
        with pytest.raises(StaysDense, match="for other heads or tokens"):
            FedGate(layer, x).of(other, part, 4)


@pytest.mark.parametrize(("calls", "wanted"), [
    ((4, 4), ((0, 4), (0, 4))),
    ((1, 3, 2, 2), ((0, 1), (1, 4), (0, 2), (2, 4))),
    ((3, 2), ((0, 3), None)),
    ((8,), (None,)),
], ids=["whole", "uneven parts", "more than the rest", "more than the model has"])
def test_parts_of_a_layer_follow_each_other(comfyui, calls, wanted):
    from pack.nodes.hook.method import Step
    step = Step(None, None, None, True, 1)
    found = [step.heads_of(7, heads, 4) for heads in calls]
    assert found == [None if part is None else range(*part) for part in wanted]


def test_parts_of_two_layers_in_turn_are_kept_apart(comfyui):
    from pack.nodes.hook.method import Step
    step = Step(None, None, None, True, 1)
    assert [step.heads_of(layer, 2, 4).start for layer in (0, 1, 1, 0)] == [0, 0, 2, 2]


def test_a_layer_that_nothing_tells_stays_dense_where_layers_matter(load_tiny, vsa, sta, sampled, run_of, monkeypatch):
    import contextlib

    from pack.nodes.hook import hook
    from pack.vsa_core.strategy import Strategy
    monkeypatch.setattr(hook, "told_apart", lambda blocks: contextlib.nullcontext())
    case, model = KINDS["LTXV"], load_tiny("tiny_ltxv")
    named, strategy = vsa(model, dense_blocks="0"), Strategy.of_windows([[[(1, 1, 1)] * 2] * 2], (3, 3, 3))
    windows, plain = sta(model, strategy=strategy), vsa(model)
    for patched in (named, windows):
        assert torch.equal(sampled(patched, case), sampled(model, case))
    assert dict(run_of(named).dense) == {"layer not known": 4}
    assert [reason for reason in run_of(windows).dense if "are not known" in reason]
    sampled(plain, case)
    assert run_of(plain).sparse_calls == 4


def test_options_handed_on_by_position_are_told_too(comfyui):
    from pack.nodes.families.running_block import running_block, told_apart

    class Block(torch.nn.Module):
        def forward(self, x, options):
            return running_block(options)
    blocks, options = [Block(), Block()], {"optimized_attention_override": None}
    with told_apart(blocks):
        assert [block(0, options) for block in (*blocks, blocks[0])] == [0, 1, 0]
    assert not any(block._forward_pre_hooks for block in blocks)
