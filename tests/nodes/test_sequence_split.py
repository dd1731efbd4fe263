"""The node Multi-GPU Sequence Split in a real ComfyUI: several cards give what one gives. All cards are the CPU."""
import gc
import threading

import pytest
import torch

from family_cases import CASES
from neighbours import NEIGHBOURS
from split_cards import cpu_cards, relative_l2, split_of

pytestmark = pytest.mark.host
GRID = (5, 10, 12)
SHARED = [case for case in CASES if not case.checkpoint.startswith("bare_")
          and case.name not in ("Wan S2V", "WanDancer", "LTX-2") and not case.name.startswith("Wan Animate 2")]
NOT_SHARED = [case for case in CASES if case.name in (
    "Wan S2V", "WanDancer", "LTX-2", "Wan Animate 2 without a pose", "Mochi", "Cosmos Predict2")]


@pytest.fixture
def split(comfyui, monkeypatch):
    """split(model, cards, ...) -> the clone that the node returns."""
    from comfy.model_patcher import ModelPatcher
    if not hasattr(ModelPatcher, "deepclone_multigpu"):
        pytest.skip("this ComfyUI cannot load a model on a second card")
    from pack.nodes.split.sequence_split import MultiGPUSequenceSplit

    def patch(model, cards=2, **widgets):
        cpu_cards(monkeypatch, cards)
        return MultiGPUSequenceSplit.execute(model, **widgets)[0]
    return patch


@pytest.fixture
def wide(load_tiny):
    """A Wan model with three heads."""
    return load_tiny("tiny_wan_t2v_wide")


@pytest.fixture
def fresh(tiny):
    """The same, not shared with other tests: what object patches leave behind is not on it."""
    from sampling import load
    return load(tiny("tiny_wan_t2v_wide"))


def require_all_split(model):
    evidence = split_of(model).evidence
    assert evidence.passes and not evidence.whole, evidence.text()
    return evidence


@pytest.mark.parametrize("case", SHARED, ids=lambda case: case.name)
def test_two_cards_give_what_one_gives_in_every_family(load_tiny, vsa, split, run_of, case):
    from sampling import sample
    model = vsa(load_tiny(f"{case.checkpoint}_wide"))
    alone, wanted = sample(model, case.kind), run_of(model)
    two = split(model)
    assert relative_l2(sample(two, case.kind), alone) <= 1e-5
    evidence, run = require_all_split(two), run_of(two)
    assert evidence.heads == (2, 1) and run.sparse_calls == wanted.sparse_calls and run.dense == wanted.dense
    assert sum(evidence.tokens) == sum(shape[0].num_tokens for shape in run.records)
    assert abs(evidence.tokens[0] - evidence.tokens[1]) <= (1 if case.name != "LTXV with guides" else 2)


@pytest.mark.parametrize("case", NOT_SHARED, ids=lambda case: case.name)
def test_a_family_that_was_not_tried_is_refused_by_name(load_tiny, split, case):
    with pytest.raises(ValueError, match=r"cannot be split over several cards: .*not tried.*Remove this node"):
        split(load_tiny(case.checkpoint))


METHODS = {
    "dense": lambda model, request: model,
    "VSA by noise": lambda model, request: request.getfixturevalue("vsa")(model, 0.6, spread="by noise",
                                                                          far_field="on", tile_size="4x4x4"),
    "VSA by mass": lambda model, request: request.getfixturevalue("vsa")(model, 0.3, attention_mass=0.8,
                                                                         tile_size="4x4x4"),
    "VSA from the second step": lambda model, request: request.getfixturevalue("vsa")(model, 0.6, start_percent=0.5),
    "STA": lambda model, request: request.getfixturevalue("sta")(model, "1x1x1", tile_size="4x4x4"),
    "SLA": lambda model, request: request.getfixturevalue("sla")(model, 0.3),
    "VMoBA": lambda model, request: request.getfixturevalue("vmoba")(model, threshold=0.0, temporal_chunk=1),
}


@pytest.mark.parametrize("name", METHODS)
def test_three_cards_give_what_one_gives_with_every_method_before_and_after(wide, split, draw, request, name):
    patch = METHODS[name]
    alone = draw(patch(wide, request), GRID)
    for several in (split(patch(wide, request), 3), patch(split(wide, 3, exchange="torch.distributed"), request)):
        assert relative_l2(draw(several, GRID), alone) <= 1e-5
        assert require_all_split(several).heads == (1, 1, 1)
    assert name == "dense" or relative_l2(alone, draw(wide, GRID)) > 1e-3


def test_a_strategy_and_budgets_are_those_of_each_cards_own_heads(wide, vsa, sta, split, draw):
    from pack.vsa_core.budgets import Budgets
    from pack.vsa_core.strategy import Strategy
    places = (((0, 1, 2), (2, 0, 1)),)
    budgets, windows = Budgets((0.1, 0.5, 0.9), places), Strategy(
        ((0.2, 0.5, 1.0), (1.0, 0.3, 0.3), (1.0, 1.0, 0.4)), places)
    for patch in (lambda model: vsa(model, strategy=budgets, tile_size="4x4x4"),
                  lambda model: sta(model, strategy=windows, tile_size="4x4x4")):
        alone = draw(patch(wide), GRID)
        assert relative_l2(draw(split(patch(wide)), GRID), alone) <= 1e-5
        assert relative_l2(alone, draw(wide, GRID)) > 1e-3


@pytest.mark.parametrize("order", ["gates before", "gates after"])
def test_trained_gates_reach_every_cards_heads(tiny, load_tiny, with_gates, vsa, split, draw, run_of, order):
    model, file = load_tiny("tiny_wan_t2v_wide"), tiny("tiny_wan_vsa_wide")
    alone = vsa(with_gates(model, file), tile_size="4x4x4")
    several = vsa(split(with_gates(model, file)) if order == "gates before" else with_gates(split(model), file),
                  tile_size="4x4x4")
    wanted = draw(alone, GRID)
    assert relative_l2(draw(several, GRID), wanted) <= 1e-5
    assert run_of(several).gated == run_of(alone).gated and run_of(several).gated.total()
    assert relative_l2(draw(vsa(model, tile_size="4x4x4"), GRID), wanted) > 1e-3
    require_all_split(several)


def test_trained_projections_reach_every_card(tiny, load, sla, split, draw):
    model = load(str(tiny("tiny_wan_sla_wide")))[0]
    alone = draw(sla(model, start_percent=0.5), GRID)
    several = sla(split(model), start_percent=0.5)
    assert relative_l2(draw(several, GRID), alone) <= 1e-5
    require_all_split(several)


@pytest.mark.parametrize("neighbour", NEIGHBOURS, ids=lambda neighbour: neighbour.name)
def test_beside_every_neighbour_the_result_is_that_of_one_card_and_what_is_not_split_is_said(
        fresh, vsa, split, draw, neighbour):
    whole = {"NAG", "EnhanceAVideo", "FFN chunking", "GGUF", "block swap", "skip-layer guidance"}

    def drawn(model):
        return draw(model, neighbour.latent, steps=neighbour.steps)

    alone = drawn(neighbour.patch(vsa(fresh)))
    several = neighbour.patch(vsa(split(fresh)))
    assert relative_l2(drawn(several), alone) <= 1e-5
    evidence = split_of(several).evidence
    assert bool(evidence.whole) == (neighbour.name in whole) and (evidence.passes or evidence.whole)
    assert ("NOT SPLIT" in evidence.text()) == (not evidence.passes)


@pytest.mark.parametrize("knobs", [
    {"cfg": 1.0}, {"batch": 2}, {"sampler_name": "dpmpp_2m_sde", "steps": 3}, {"cfg": 1.0, "sampler_name":
                                                                               "euler_ancestral", "steps": 3}], ids=str)
def test_every_way_of_sampling_gives_what_one_card_gives(wide, vsa, split, draw, knobs):
    model = vsa(wide)
    assert relative_l2(draw(split(model), GRID, **knobs), draw(model, GRID, **knobs)) <= 1e-5


def test_a_lora_after_the_split_reaches_every_card(wide, split, draw):
    key = "diffusion_model.blocks.1.ffn.0.weight"
    shape = wide.model.diffusion_model.blocks[1].ffn[0].weight.shape
    patch = {key: (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.2,)}

    def with_lora(model):
        clone = model.clone()
        assert clone.add_patches(patch, 1.0)
        return clone

    alone = draw(with_lora(wide), GRID)
    assert relative_l2(alone, draw(wide, GRID)) > 1e-3
    for several in (with_lora(split(wide)), split(with_lora(wide))):
        assert relative_l2(draw(several, GRID), alone) <= 1e-5
        require_all_split(several)


def test_timesteps_per_frame_are_cut_at_frames(load_tiny, split, draw):
    model = load_tiny("tiny_wan22_ti2v_wide")

    def per_frame(executor, x, t, *args, **kwargs):
        return executor(x, t[:, None] * torch.linspace(0.2, 1.0, x.shape[2])[None], *args, **kwargs)

    def patched(model):
        from comfy.patcher_extension import WrappersMP
        clone = model.clone()
        clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "per_frame", per_frame)
        return clone

    alone = draw(patched(model), GRID)
    assert relative_l2(alone, draw(model, GRID)) > 1e-3
    several = patched(split(model))
    assert relative_l2(draw(several, GRID), alone) <= 1e-5
    assert require_all_split(several).tokens == (90, 60)
    more = patched(split(model, 3))
    assert relative_l2(draw(more, (2, 10, 12)), draw(patched(model), (2, 10, 12))) <= 1e-5
    assert dict(split_of(more).evidence.whole) == {"2 timesteps for 60 tokens on 3 cards": 2}


@pytest.mark.parametrize("card", [0, 1, 2])
def test_a_card_that_fails_is_named_and_the_next_run_is_right(fresh, vsa, split, draw, monkeypatch, card):
    from comfy.ldm.wan.model import WanT2VCrossAttention
    wide = fresh
    several = split(vsa(wide), 3, exchange="torch.distributed" if card == 1 else "auto")
    wanted, forward, calls = draw(several, GRID), WanT2VCrossAttention.forward, []
    threads = threading.active_count()

    def failing(self, *args, **kwargs):
        from pack.vsa_core.sequence_parallel import get_sp_parallel_rank
        if get_sp_parallel_rank() == card and len(calls) == 2:
            raise MemoryError("planted")
        calls.extend([card] * (get_sp_parallel_rank() == card))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(WanT2VCrossAttention, "forward", failing)
    with pytest.raises(RuntimeError, match="Multi-GPU Sequence Split: cpu failed: planted"):
        draw(several, GRID)
    monkeypatch.undo()
    assert threading.active_count() == threads
    cpu_cards(monkeypatch, 3)
    assert torch.equal(draw(several, GRID), wanted)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in wide.model.modules())


def test_an_interrupt_on_a_card_reaches_the_user_as_an_interrupt(fresh, split, draw, monkeypatch):
    import comfy.model_management
    from comfy.ldm.wan.model import WanT2VCrossAttention
    several, stop = split(fresh), comfy.model_management.InterruptProcessingException

    def interrupted(self, *args, **kwargs):
        raise stop()

    monkeypatch.setattr(WanT2VCrossAttention, "forward", interrupted)
    with pytest.raises(stop):
        draw(several, GRID)


def test_the_model_is_bit_equal_before_and_after_and_nothing_grows(wide, vsa, split, draw):
    before, model = draw(wide, GRID), vsa(wide)
    several = split(model)
    counts = []
    for runs in (2, 12):
        for _ in range(runs):
            draw(several, (2, 4, 6), steps=1)
        gc.collect()
        counts.append(sum(type(found) is torch.Tensor for found in gc.get_objects()))
    assert counts[1] <= counts[0] and not split_of(several)._passes
    assert torch.equal(draw(wide, GRID), before)


def test_the_node_says_what_each_card_has_and_the_check_how_far_it_is_from_one(wide, vsa, split, draw, run_of):
    several = split(vsa(wide), check=True)
    draw(several, GRID, steps=3)
    evidence = require_all_split(several)
    text = evidence.text()
    assert "2 cards: cpu 75 tokens and 2 heads, cpu 75 tokens and 1 head\n" in text
    assert evidence.error <= 1e-5 and "the first pass is" in text and "ms in exchange" in text
    layers, width, batch = 2, 3 * 128 * 4, 2
    qkv = 75 * width * batch
    wanted = layers * (3 * qkv * 1 / 3 + 75 * width * 2 / 3 * batch) + qkv      # out of the first card, and its rows
    assert evidence.sent_bytes[0] / evidence.passes == wanted
    run = run_of(several)
    assert run.sparse_calls == 2 * 3 and run.steps == 3 and f"split over {evidence.each()}" in run.notes


def test_sampling_on_one_card_is_said_with_the_reason(wide, split, draw):
    several = split(wide)
    several.set_model_attn1_patch(lambda *args, **kwargs: args[0]["x"])
    draw(several, GRID)
    assert "NOT SPLIT: every pass ran on cpu alone (2 passes: a node that patches the blocks (attn1_patch))" in (
        split_of(several).evidence.text())


def test_as_many_tokens_on_a_card_as_the_text_has_run_on_one(wide, split, draw):
    several = split(wide)
    assert torch.equal(draw(several, (1, 4, 14)), draw(wide, (1, 4, 14)))
    assert "as many tokens on a card as the text has" in split_of(several).evidence.text()


def test_a_second_split_replaces_the_first_and_cores_split_is_refused(wide, split, draw, monkeypatch):
    import comfy.multigpu
    again = split(split(wide), 3)
    draw(again, GRID)
    assert require_all_split(again).heads == (1, 1, 1)
    several = split(wide)
    monkeypatch.setattr("comfy.model_management.get_all_torch_devices",
                        lambda exclude_current=False: [torch.device("cpu"), torch.device("cpu:0")])
    with pytest.raises(ValueError, match="MultiGPU CFG Split are on one model"):
        draw(comfy.multigpu.create_multigpu_deepclones(several, 2), GRID)
    with pytest.raises(ValueError, match="is split by MultiGPU CFG Split already"):
        split(comfy.multigpu.create_multigpu_deepclones(wide, 2))


def test_cores_split_of_conditions_loses_no_call(wan, vsa, run_of, draw, split, monkeypatch):
    import comfy.multigpu
    monkeypatch.setattr("comfy.model_management.get_all_torch_devices",
                        lambda exclude_current=False: [torch.device("cpu"), torch.device("cpu:0")])
    model = vsa(wan)
    alone, several = draw(model, GRID, steps=4), comfy.multigpu.create_multigpu_deepclones(model, 2)
    for _ in range(3):
        assert relative_l2(draw(several, GRID, steps=4), alone) <= 1e-5
        run = run_of(several)
        assert (run.sparse_calls, run.steps, run.other.total(), run.seen) == (16, 8, 16, 32)
        assert sum(run.layers[0].values()) == 8 and run.density == pytest.approx(run_of(model).density)


def test_one_card_passes_the_model_through_and_says_so(wide, split, caplog):
    assert split(wide, 1) is wide
    assert "NOT SPLIT: cpu is the only card here" in caplog.text


@pytest.mark.parametrize(("devices", "match"), [
    ("cuda:0, cuda:1", "there is no cuda:0 here, wanted all or a list of cpu"),
    ("cpu, cpu", "cpu is named twice"), ("cpu, gpu", "'gpu' is no device"), ("", "wanted all or a list"),
    ("cpu:0", "the model is loaded for cpu, which is not among them"), ("3", "there is no 3 here|is no device")])
def test_devices_that_are_none_are_refused_with_those_there_are(wide, split, devices, match):
    with pytest.raises(ValueError, match=match):
        split(wide, devices=devices)


def test_a_model_that_cannot_be_copied_or_has_too_few_heads_is_refused(load_tiny, wide, split):
    with pytest.raises(ValueError, match="has 3 heads, 4 cards are too many"):
        split(wide, 4)
    clone = wide.clone()
    clone.cached_patcher_init = None
    with pytest.raises(ValueError, match="the loader of this model cannot load it a second time"):
        split(clone)
    with pytest.raises(ValueError, match="exchange 'ring': wanted auto, device copies, torch.distributed"):
        split(wide, exchange="ring")


def test_a_comfyui_that_loads_no_second_copy_is_named_with_the_cure(load_tiny, monkeypatch):
    from comfy.model_patcher import ModelPatcher

    from pack.nodes.split.sequence_split import MultiGPUSequenceSplit
    monkeypatch.delattr(ModelPatcher, "deepclone_multigpu", raising=False)
    with pytest.raises(ValueError, match="this ComfyUI cannot load a model on a second card: update it"):
        MultiGPUSequenceSplit.execute(load_tiny("tiny_wan_t2v"))


def test_named_devices_split_too_and_copies_are_used_again(wide, split, draw, monkeypatch):
    alone = draw(wide, GRID)
    several = split(wide, devices="cpu, cpu:0")
    assert relative_l2(draw(several, GRID), alone) <= 1e-5
    copy = several.get_additional_models_with_key(split_of_key())[0]
    again = split(wide, devices="cpu, cpu:0")
    assert again.get_additional_models_with_key(split_of_key())[0].model is copy.model
    assert relative_l2(draw(again, GRID), alone) <= 1e-5


def split_of_key():
    from pack.nodes.split.cards import KEY
    return KEY
