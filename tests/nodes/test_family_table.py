"""The table of families against ComfyUI's own list of models and against the documentation."""
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from family_cases import CASES

DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"


@pytest.fixture(scope="session")
def host_models(comfyui):
    """{class in comfy.supported_models: (BaseModel class, diffusion model class)} of all with a video latent."""
    import comfy.model_base
    import comfy.supported_models

    class Found(Exception):
        pass

    def remember(self, model_config, model_type=None, device=None, unet_model=None):
        raise Found(type(self), unet_model)

    found, original = {}, comfy.model_base.BaseModel.__init__
    comfy.model_base.BaseModel.__init__ = remember
    try:
        for config in comfy.supported_models.models:
            if getattr(config.latent_format, "latent_dimensions", 2) == 3:
                try:
                    config({**config.unet_config}).get_model({}, "", device="cpu")
                except Found as classes:
                    found[config.__name__] = classes.args
    finally:
        comfy.model_base.BaseModel.__init__ = original
    return found


def shell(net_class):
    """A diffusion model of that class without weights: enough to be judged by its class."""
    return net_class.__new__(net_class)


@pytest.fixture
def newest(comfyui):
    """Skips in a ComfyUI that lacks models of which the tables speak."""
    import comfy_boot
    if comfy_boot.version(comfyui).split(".")[:2] < ["0", "30"]:
        pytest.skip("a ComfyUI from before some of the models in the tables")


def test_every_video_model_of_this_comfyui_has_exactly_one_family_or_a_reason(host_models):
    import comfy.supported_models

    from pack.nodes.families import FAMILIES
    from pack.nodes.families.refused import refusal
    listed = [m.__name__ for m in comfy.supported_models.models
              if getattr(m.latent_format, "latent_dimensions", 2) == 3]
    assert set(host_models) == set(listed) and len(host_models) >= 20
    for name, (_, net_class) in host_models.items():
        families = [family.name for family in FAMILIES if family.matches(shell(net_class))]
        assert len(families) == 1 or (refusal(shell(net_class)) and len(families) <= 1), (name, families)


def test_every_family_and_every_refusal_stands_for_a_model_of_this_comfyui(host_models, newest):
    from pack.nodes.families import FAMILIES, REFUSED
    from pack.nodes.families.abstract import built_on
    nets = [shell(net_class) for _, net_class in host_models.values()]
    assert all(any(family.matches(net) for net in nets) for family in FAMILIES)
    assert all(any(built_on(net, *row[:2]) for net in nets) for row in REFUSED)


@pytest.mark.parametrize(("name", "reason"), [
    ("WAN21_CausalAR_T2V", "piece by piece, and ComfyUI lets no node"), ("SeedVR2", "ComfyUI lets no node"),
    ("QwenImage", "it makes images"), ("Anima", "it makes images"), ("Krea2", "it makes images"),
    ("JoyImage", "it makes images"),
])
def test_a_model_that_is_refused_says_why(host_models, name, reason):
    from pack.nodes.families import family_of
    if name not in host_models:
        pytest.skip(f"this ComfyUI has no {name}")
    base_class, net_class = host_models[name]
    base = SimpleNamespace(diffusion_model=shell(net_class), latent_format=SimpleNamespace(latent_dimensions=3))
    with pytest.raises(ValueError, match=rf"\({net_class.__name__}\): .*{reason}.*Remove this node"):
        family_of(base)


def test_the_node_refuses_a_causal_checkpoint_by_name(newest, load_tiny, vsa):
    with pytest.raises(ValueError, match=r"WAN21_CausalAR \(CausalWanModel\): it makes a clip piece by piece"):
        vsa(load_tiny("tiny_wan_causal"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_heads_of_the_table_are_the_heads_of_the_model(load_tiny, case):
    from pack.nodes.families import family_of
    from sampling import Recorder, sample, with_override
    model, recorder = load_tiny(case.checkpoint), Recorder()
    sample(with_override(model, recorder), case.kind, steps=1)
    heads, head_dim = family_of(model.model).heads(model.model.diffusion_model)
    tokens = torch.Size(case.grid).numel() + case.prefix + case.suffix
    found = {(n, q[-1] if by_head else q[-1] // n) for (q, k, n, by_head, _), _ in recorder.shapes.items()
             if q[-2] == k[-2] == tokens}
    assert found == {(heads, head_dim)}


def first_queries(model, case, cell=None):
    """The queries [B, ..., L, D] of the first self-attention over that many tokens, the latent changed at `cell`."""
    from comfy.patcher_extension import WrappersMP

    from sampling import sample, with_override
    tokens, kept = torch.Size(case.grid).numel() + case.prefix + case.suffix, []

    def keep(func, q, k, v, *args, **kwargs):
        if q.shape[-2] == k.shape[-2] == tokens:
            kept.append(q.clone())
        return func(q, k, v, *args, **kwargs)

    def change(executor, x, *args, **kwargs):
        x = x.clone()
        shapes = kwargs.get("latent_shapes")
        video = x.view(len(x), -1)[:, :torch.Size(shapes[0][1:]).numel()].view(len(x), *shapes[0][1:]) if shapes else x
        video[:, :, cell[0], cell[1], cell[2]] += 1
        return executor(x, *args, **kwargs)

    clone = with_override(model, keep)
    if cell:
        clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "change", change)
    sample(clone, case.kind, steps=1)
    return kept[0]


@pytest.mark.parametrize("case", [case for case in CASES if case.kind != "wan_animate2_pose"], ids=lambda c: c.name)
def test_a_change_in_one_cell_of_the_latent_reaches_the_token_that_the_family_says_it_is(load_tiny, case):
    from pack.nodes.families import family_of
    model = load_tiny(case.checkpoint)
    net = model.model.diffusion_model
    patch = family_of(model.model).observe(net, (1, 1, 2, 2, 2), None, {}).patch_size
    t, h, w = 1, 2, 3
    slot = case.kind == "wan_animate2"      # its latent begins with the reference image
    cell = ((t + slot) * patch[0], h * patch[1], w * patch[2])
    before, after = first_queries(model, case), first_queries(model, case, cell)
    moved = (before != after).transpose(-2, -1).flatten(0, -2).any(0).nonzero().flatten().tolist()
    assert moved == [case.prefix + (t * case.grid[1] + h) * case.grid[2] + w]


def rows():
    """{family: its row} of the documentation's table."""
    table = re.findall(r"^\| (?!-|family)([^|]+) \|(.*)\|$", DOCS.read_text(), re.MULTILINE)
    return {name.strip(" *"): row for name, row in table}


def test_the_documentation_names_every_model_of_this_comfyui_in_the_row_of_its_family(host_models):
    from pack.nodes.families import FAMILIES
    from pack.nodes.families.refused import refusal
    found = rows()
    assert set(found) == {family.name for family in FAMILIES} | {"not served"}
    for name, (_, net_class) in host_models.items():
        net = shell(net_class)
        row = "not served" if refusal(net) else next(f.name for f in FAMILIES if f.matches(net))
        assert f"`{name}`" in found[row], f"{name} is missing in the row {row}"
        assert sum(f"`{name}`" in other for other in found.values()) == 1


def test_the_documentation_names_every_reason_for_which_calls_are_left_alone():
    text = DOCS.read_text()
    for reason in frozenset().union(*(case.other for case in CASES)):
        assert f"`{reason}`" in text


def test_audio_with_the_videos_heads_and_length_leaves_both_dense(comfyui):
    from pack.nodes.families.ltx_video import LtxVideo
    net = SimpleNamespace(num_attention_heads=2, attention_head_dim=32, audio_num_attention_heads=2,
                          audio_attention_head_dim=32)
    call = LtxVideo().observe(net, (1, 1, 999), torch.zeros(1, 7, 8), {
        "latent_shapes": [(1, 128, 3, 4, 6), (1, 8, 72, 16)]})
    assert call.thw == (3, 4, 6) and 72 in call.context_lengths


class Blocks:
    """What HunyuanVideo asks of a model: its blocks, and whether they put the clip first."""

    def __init__(self, **attributes):
        self.double_blocks = [SimpleNamespace(**attributes)] * 2


HUNYUAN_ORDERS = {
    "text first": (Blocks(), {}, True),
    "text first, told": (Blocks(flipped_img_txt=False), {"img_slice": [7, 31]}, True),
    "text and reference first, told": (Blocks(), {"img_slice": [3, 31], "ref_latent": True}, True),
    "clip first, of old blocks": (Blocks(flipped_img_txt=True), {}, False),
    "clip first, told": (Blocks(), {"img_slice": [0, 24]}, False),
    "text cut short, told": (Blocks(), {"img_slice": [5, 31]}, False),
}


@pytest.mark.parametrize(("net", "told", "known"), HUNYUAN_ORDERS.values(), ids=HUNYUAN_ORDERS)
def test_hunyuan_video_runs_dense_where_the_host_shows_another_order_of_tokens(comfyui, net, told, known):
    from pack.nodes.families.abstract import UNKNOWN_TOKENS, ModelCall
    from pack.nodes.families.hunyuan_video import HunyuanVideo
    from pack.vsa_core.grid import TokenGrid
    conds = frozenset({"ref_latent"} & set(told))
    options = {"block_type": "single", **{key: value for key, value in told.items() if key != "ref_latent"}}
    place = HunyuanVideo().locate(net, ModelCall((2, 3, 4), (1, 1, 1), frozenset(), conds, prefix=7), options, 31,
                                  (2, 64))
    assert place == (TokenGrid((2, 3, 4), prefix=7) if known else UNKNOWN_TOKENS)
