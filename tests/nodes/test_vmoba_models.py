"""Video Mixture of Block Attention in a real ComfyUI's sampling: both forms, what is said of them, configurations."""
import json
import os

import pytest
import torch

GRID = (9, 20, 24)
"""9 x 10 x 12 tokens: 5 temporal chunks of 2 frames, 4 x 3 columns, 3 x 2 x 3 boxes, none of which divide it all."""
PUBLISHED = {
    "temporal_chunk_size": 2, "temporal_topk": 3, "spatial_chunk_size": [3, 4], "spatial_topk": 20,
    "st_chunk_size": [4, 6, 4], "st_topk": 15, "moba_select_mode": "threshold", "moba_threshold": 0.25,
    "moba_threshold_type": "query_head", "first_full_layer": 0, "first_full_step": 12, "temporal_layer": 1,
    "spatial_layer": 1, "st_layer": 1}
"""FastVideo's file for Wan 1.3B at 77 x 480 x 832."""
FORMS = ("exact", "pooled")


def relative_l2(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["tiny_wan_t2v", "tiny_wan_vace", "tiny_wan_ref"])
def test_a_share_of_one_equals_dense(load_tiny, vmoba, run_of, draw, name, form):
    model = load_tiny(name)
    dense, patched = draw(model, GRID), vmoba(model, threshold=1.0, form=form)
    assert relative_l2(draw(patched, GRID), dense) <= 1e-5 and run_of(patched).sparse_calls > 0
    assert torch.equal(draw(model, GRID), dense)


@pytest.mark.parametrize("form", FORMS)
def test_a_lower_share_computes_less_and_moves_further_from_dense(wan, vmoba, run_of, draw, form):
    dense, errors, densities = draw(wan, GRID), [], []
    for share in (1.0, 0.6, 0.25, 0.0):
        patched = vmoba(wan, threshold=share, form=form)
        errors.append(relative_l2(draw(patched, GRID), dense))
        densities.append(run_of(patched).summary()[0]["density"])
    assert densities == sorted(densities, reverse=True) and densities[0] == pytest.approx(1.0) and densities[-1] < 0.45
    assert errors == sorted(errors) and errors[-1] > 1e-2


def test_layers_take_turns_and_the_report_says_in_what(wan, vmoba, run_of, draw):
    from pack.nodes.hook.status import status_text
    patched = vmoba(wan)
    draw(patched, GRID)
    run = run_of(patched)
    assert run.summary()[0]["chunks"] == {"temporal": 5, "spatial": 12, "st": 18}
    text = status_text(run)
    assert text.startswith("VMoBA is ")
    assert ("every token looks at its own chunk and others, by a share of 0.25 (query_head); chunks in turn: "
            "5 temporal of 2 frames, 12 spatial of 3x4, 18 space-time of 4x6x4 (") in text
    assert "clip of 9x10x12 tokens (time x height x width)\n" in text
    draw(other := vmoba(wan, turns="0, 0, 1", form="pooled", select="topk", st_topk=2), GRID)
    text = status_text(run_of(other))
    assert text.startswith("Pooled chunks is ") and (
        "every block of 64 tokens looks at its own chunk and others, the best 2 (query_head); chunks in turn: "
        "18 space-time of") in text


def test_which_layer_has_which_chunks_changes_the_clip(wan, vmoba, draw):
    clips = [draw(vmoba(wan, **widgets), GRID) for widgets in (
        {}, {"first_layer": 1}, {"turns": "1, 0, 0"}, {"turns": "0, 1, 0"}, {"compete": "overall"},
        {"select": "topk", "spatial_topk": 2}, {"st_chunk": "2x2x2", "turns": "0,0,1"}, {"form": "pooled"})]
    assert all(relative_l2(a, b) > 1e-4 for i, a in enumerate(clips) for b in clips[:i])


def test_the_density_is_that_of_what_was_chosen(wan, vmoba, run_of, draw):
    """Temporal chunks of 1 frame and top-k 2 on 9 frames are two ninths, top-k 1 is one."""
    for form in FORMS:
        patched = vmoba(wan, select="topk", temporal_chunk=1, temporal_topk=2, turns="1, 0, 0", form=form)
        draw(patched, GRID)
        run = run_of(patched)
        assert run.density == pytest.approx(2 / 9)
        tile_map = next(iter(run.records.values())).tile_map
        assert tile_map.shape == (9, 10, 12) and tile_map.sum().item() == pytest.approx(240)
        assert (tile_map[4] == 1).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_picture_shows_all_kinds_of_chunks_together(wan, vmoba, run_of, draw, form):
    from pack.nodes.evidence.report import SparseAttentionReport
    patched = vmoba(wan, select="topk", temporal_topk=1, spatial_topk=1, st_topk=1, form=form)
    latent = draw(patched, GRID)
    tile_map = next(iter(run_of(patched).records.values())).tile_map
    own = torch.zeros(9, 10, 12)
    own[4:6] += 0.5                                              # layer 0 is temporal, layer 1 spatial
    own[:, 3:6, 4:8] += 0.5
    assert torch.equal(tile_map, own)
    assert SparseAttentionReport.execute({"samples": latent}, patched)[2].shape[-1] == 3
    assert any("a top-k of 1 (temporal, spatial, space-time) is the own chunk alone" in text
               for text in run_of(patched).warnings)


def test_a_batch_and_cfg_choose_for_themselves(wan, vmoba, draw):
    patched = vmoba(wan, compete="overall")
    assert torch.isfinite(draw(patched, GRID, batch=2)).all()


def test_the_middle_and_the_counters_hold_where_text_is_in_the_sequence(load_tiny, vmoba, run_of, draw):
    model = load_tiny("tiny_hunyuan_video15")
    for form in FORMS:
        patched = vmoba(model, threshold=1.0, form=form)
        assert relative_l2(draw(patched, (5, 10, 12)), draw(model, (5, 10, 12))) <= 1e-5
        assert run_of(patched).density == pytest.approx(1.0)


def test_the_settings_keep_everything_is_told_with_its_cure(wan, vmoba, run_of, draw, kernel_table):
    from pack import kernels
    kernel_table(kernels.KERNELS[-1])
    patched = vmoba(wan, threshold=1.0, backend="auto")
    draw(patched, (5, 10, 12))
    from pack.nodes.hook.verdict import verdict
    assert "VMoBA is OFF: with these settings every tile looks at the whole clip" in verdict(run_of(patched))
    assert "lower ratio or threshold" in verdict(run_of(patched))


def test_a_layer_that_is_not_known_stays_dense_with_that_reason(wan, vmoba, run_of, draw, monkeypatch):
    from pack.nodes.families.wan import Wan
    monkeypatch.setattr(Wan, "layer", lambda *_: (None, 2))
    patched = vmoba(wan)
    draw(patched, (5, 10, 12))
    assert run_of(patched).dense == {"chunks go by layer, and the layer of this call is not known": 4}


@pytest.fixture
def config_folder(comfyui):
    import folder_paths

    from pack.nodes.methods.moba_config import FOLDER, register_folder
    register_folder()
    folder = os.path.join(folder_paths.models_dir, FOLDER)
    yield folder
    for name in os.listdir(folder):
        os.remove(os.path.join(folder, name))
    folder_paths.filename_list_cache.clear()


def write(folder, name, text):
    import folder_paths
    with open(os.path.join(folder, name), "w", encoding="utf-8-sig") as file:
        file.write(text if isinstance(text, str) else json.dumps(text))
    folder_paths.filename_list_cache.clear()


@pytest.mark.parametrize("how", ["pasted", "pasted in one line", "a file"])
def test_fastvideos_configuration_replaces_the_widgets_that_it_names(wan, vmoba, run_of, draw, config_folder, how):
    changed = {**PUBLISHED, "st_chunk_size": [3, 5, 4], "temporal_layer": 0, "spatial_layer": 0}
    text = json.dumps(changed, indent=4 if how == "pasted" else None)
    if how == "a file":
        write(config_folder, "wan_1.3B_77_480_832.json", changed)
        text = "wan_1.3B_77_480_832.json"
    patched = vmoba(wan, config=text, st_chunk="1x1x1", threshold=0.9)
    assert torch.equal(draw(patched, GRID), draw(vmoba(wan, st_chunk="3x5x4", turns="0, 0, 1"), GRID))
    draw(patched := vmoba(wan, config='{"moba_threshold": 0.5}', st_chunk="3x5x4"), GRID)
    entry = run_of(patched).summary()[0]
    assert entry["chunks"]["st"] == 3 * 2 * 3 and "share of 0.5" in entry["label"]


def test_a_file_that_changed_is_read_again(config_folder):
    from pack.nodes.methods.video_mixture_of_block_attention import VideoMixtureOfBlockAttentionPatch as Node
    write(config_folder, "mine.json", PUBLISHED)
    before = Node.fingerprint_inputs(config="mine.json", form="exact")
    os.utime(os.path.join(config_folder, "mine.json"), (1, 1))
    assert before != Node.fingerprint_inputs(config="mine.json", form="exact")
    assert Node.fingerprint_inputs(config=json.dumps(PUBLISHED)) is None
    assert Node.validate_inputs(config="mine.json") is True and Node.validate_inputs(config=None) is True


@pytest.mark.parametrize(("config", "sentence"), [
    ("{", "config: no JSON at line 1, column 2"), ("{}", "config: found no setting: wanted some of temporal_chunk"),
    ('{"temporal_chunk": 2}', "config: found temporal_chunk: wanted some of temporal_chunk_size"),
    ('{"st_topk": "15"}', 'config: st_topk "15": wanted a number'), ('{"st_topk": true}', "st_topk true: wanted a"),
    ('{"moba_select_mode": 1}', "moba_select_mode 1: wanted a word"),
    ('{"st_chunk_size": "4x6x4"}', "wanted a list of numbers"), ('{"st_topk": 1, "st_topk": 2}', "st_topk is there tw"),
    ("nothing.json", r"config 'nothing.json': wanted JSON that begins with \{, or the name of a file in "
                     r"models/vmoba_configs \(broken.json\)"),
    ("../../broken.json", "wanted JSON that begins with"), ("broken.json", "config broken.json: no JSON at line 1")])
def test_a_configuration_that_is_none_is_refused_before_the_prompt_runs(config_folder, wan, vmoba, config, sentence):
    import re

    from pack.nodes.methods.video_mixture_of_block_attention import VideoMixtureOfBlockAttentionPatch as Node
    write(config_folder, "broken.json", "[1, 2")
    assert re.search(sentence, Node.validate_inputs(config=config))
    with pytest.raises(ValueError, match=sentence):
        vmoba(wan, config=config)


@pytest.mark.parametrize(("widgets", "sentence"), [
    ({"spatial_chunk": "3x4x5"}, "spatial_chunk '3x4x5': wanted height x width, such as 3x4"),
    ({"st_chunk": "4x0x4"}, "st_chunk '4x0x4': wanted time x height x width, such as 4x6x4"),
    ({"st_chunk": "4x-6x4"}, "st_chunk"), ({"turns": "1, 1"}, "turns '1, 1': wanted three whole numbers"),
    ({"turns": "0, 0, 0"}, "layers per turn .* wanted whole numbers of 0 or more, and one above 0"),
    ({"temporal_chunk": 0}, "temporal_chunk_size 0: wanted numbers above 0"), ({"st_topk": 0}, "topk 0: wanted"),
    ({"select": "top"}, "moba_select_mode 'top': wanted threshold or topk"), ({"form": "VSA"}, "form 'VSA': wanted ex"),
    ({"select": "topk", "compete": "block"}, "'block' with topk: wanted query_head, overall, head_global"),
    ({"threshold": -1}, "moba_threshold -1: wanted 0 or more"),
    ({"config": '{"spatial_chunk_size": [3, 4, 5]}'}, "spatial_chunk_size .*: wanted height and width")])
def test_a_setting_that_is_none_is_refused_with_what_was_wanted(wan, vmoba, widgets, sentence):
    with pytest.raises(ValueError, match=sentence):
        vmoba(wan, **widgets)


def test_a_model_trained_with_vsa_or_sla_is_told_to_take_its_own_node(load, write_sla, gated, vmoba, caplog):
    for model, method in ((load(write_sla("native"))[0], "SLA"), (gated, "VSA")):
        caplog.clear()
        vmoba(model)
        assert f"this model was trained with {method} and its {method}" in caplog.text
