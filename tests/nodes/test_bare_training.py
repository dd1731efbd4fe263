"""Models that were trained sparse and have nothing extra in them, in a real ComfyUI: told by metadata or their user."""
import pytest
import safetensors.torch
import torch

from make_tiny import save

GRID = (5, 10, 12)
"""150 tokens: three runs of 64 keys."""
T2V = "Wan2.2-NVFP4-Sparse-T2V"


@pytest.fixture
def load_as(comfyui):
    """load_as(path, trained_as) -> (model, description), as the node loads it."""
    from pack.nodes.trained.sparse_model import load_sparse_model
    return torch.inference_mode()(lambda path, name=None: load_sparse_model(path, {}, trained_as=name))


@pytest.fixture
def bare(load_as, tiny):
    return load_as(tiny("tiny_wan_t2v"), T2V)[0]


def test_the_node_takes_its_runs_and_samples_what_top_k_samples(bare, wan, sla, run_of, draw):
    patched = sla(bare, 0.4)
    assert torch.equal(draw(patched, GRID), draw(sla(wan, 0.4, query_run="128"), GRID))
    run = run_of(patched)
    assert run.summary()[0]["runs"] == [128, 64] and not run.gated
    assert f"top-k as {T2V} has it" in run.summary()[0]["label"]
    assert not any("plain top-k" in text or "had no projection" in text for text in (*run.warnings, run.said))
    assert f"ratio 0.4 is far from the 0.1 that {T2V} was trained with" in run.said


def test_what_leaves_its_training_is_told(bare, vsa, sta, sla, run_of, draw, caplog):
    draw(bare, GRID)
    assert f"{T2V} was trained with sparse attention alone and is about to run without it" in caplog.text
    caplog.clear()
    for patch in (vsa, sta):
        draw(patched := patch(bare), GRID)
        assert any(f"{T2V} was trained with SLA, which this is not: use the node Sparse Linear" in text
                   for text in run_of(patched).warnings)
    caplog.clear()
    draw(patched := sla(bare, 0.1, start_percent=0.2), GRID)
    assert "about to run" not in caplog.text
    assert "tokens that it learned to do without: start_percent 0.2" in caplog.text
    assert any("ran dense, which it was not trained for" in text for text in run_of(patched).warnings)
    caplog.clear()
    draw(sla(bare, 0.1), GRID)
    assert "[SLA]" not in caplog.text


def test_it_is_saved_with_its_training_and_known_when_it_is_loaded_again(bare, load_as, sla, tmp_path, monkeypatch):
    import folder_paths
    from comfy_extras.nodes_model_merging import ModelSave
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    with torch.inference_mode():
        ModelSave().save(sla(bare).clone(), filename_prefix="models/saved", prompt={"1": {}})
    saved = next((tmp_path / "models").glob("saved_*.safetensors"))
    save(safetensors.torch.load_file(saved), tmp_path / "again.safetensors", {"text_dim": 64})
    model, description = load_as(tmp_path / "again.safetensors")
    assert f"Trained as {T2V}" in description and "told by its metadata" in description
    from pack.nodes.trained.training import bare_training_of
    assert bare_training_of(model).trained.name == T2V


def test_gates_are_refused_on_it(bare, gate_file, with_gates):
    with pytest.raises(ValueError, match="was trained with SLA and has no extra layers: VSA gates are not for it"):
        with_gates(bare, gate_file)


def test_where_it_was_trained_dense_nothing_is_warned_of(load_as, tiny, vsa, sla, run_of, draw, caplog):
    model, description = load_as(tiny("tiny_ltxav"), "TurboT2AV")
    assert "dense attention is harmless" in description
    draw(model, (5, 4, 6))
    draw(patched := vsa(model), (5, 4, 6))
    assert "TurboT2AV" not in caplog.text and not any("TurboT2AV" in text for text in run_of(patched).warnings)
    draw(patched := sla(model, 0.3), (5, 8, 8))
    assert run_of(patched).summary()[0]["runs"] == [128, 64]
    with pytest.raises(ValueError, match="TurboT2AV is a LTX-Video, this file is HunyuanVideo"):
        load_as(tiny("tiny_hunyuan_video"), "TurboT2AV")


def test_the_lora_of_minimax_h3_goes_behind_it(load_as, tiny, sla, run_of, draw, caplog):
    """minimax_h3_fl2v_turbo_..._sla_comfyui: a plain LoRA, which ComfyUI's loader applies whole."""
    import comfy.lora
    import comfy.sd
    model, description = load_as(tiny("tiny_minimax_h3"), "MiniMax-H3-Turbo-SLA")
    assert "put a LoRA loader with it behind this node" in description and "4 steps with euler, shift 6" in description
    weight = model.model.state_dict()["diffusion_model.blocks.0.attn.qkv_proj.weight"]
    lora = {"diffusion_model.blocks.0.attn.qkv_proj.lora_A.weight": torch.randn(4, weight.shape[1]) * 0.1,
            "diffusion_model.blocks.0.attn.qkv_proj.lora_B.weight": torch.randn(weight.shape[0], 4) * 0.1}
    changed, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
    assert "not loaded" not in caplog.text
    draw(patched := sla(changed, 0.15), (5, 8, 8))
    run = run_of(patched)
    assert run.summary()[0]["runs"] == [128, 64] and run.sparse_calls
    assert not any("was trained" in text and "so it stays" not in text for text in run.warnings)
    assert not any("Far from exact" in text for text in run.warnings), "dense is not what it was trained for"


def test_what_comfyuis_lora_loader_leaves_out_attach_vsa_gates_takes(wan, state, with_gates, tmp_path, caplog, vsa,
                                                                      run_of, draw):
    """FastH3's forms: low rank, .diff and .set_weight on the model, .set_weight on gates."""
    import comfy.sd
    width = state["blocks.0.to_gate_compress.weight"].shape
    lora = {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.randn(4, 256) * 0.1,
            "diffusion_model.blocks.0.self_attn.q.lora_B.weight": torch.randn(256, 4) * 0.1,
            "diffusion_model.blocks.1.self_attn.k.diff": torch.randn(256, 256) * 0.1,
            "diffusion_model.blocks.1.self_attn.k.diff_b": torch.randn(256) * 0.1,
            "diffusion_model.blocks.0.norm3.set_weight": torch.ones(256) * 0.5,
            **{f"blocks.{n}.to_gate_compress.set_weight": torch.randn(*width) * 0.1 for n in range(2)}}
    changed, _ = comfy.sd.load_lora_for_models(wan, None, lora, 1.0, 0.0)
    left = [line.split(": ", 1)[1] for line in caplog.messages if line.startswith("lora key not loaded")]
    assert left == [name for name in lora if "to_gate_compress" in name]
    assert len(changed.patches) == 4
    safetensors.torch.save_file(lora, tmp_path / "lora.safetensors")
    draw(patched := vsa(with_gates(changed, tmp_path / "lora.safetensors")), GRID)
    assert run_of(patched).gated == {0: 2, 1: 2}


def test_nvfp4_weights_as_comfyui_has_them_load_and_are_sampled(wan, load_as, sla, run_of, draw, tmp_path):
    ck = pytest.importorskip("comfy_kitchen")
    if not hasattr(ck, "quantize_nvfp4"):
        pytest.skip("this ComfyUI has no NVFP4")
    state = {name.removeprefix("diffusion_model."): tensor for name, tensor in wan.model.state_dict().items()
             if name.startswith("diffusion_model.")}
    for n in range(2):
        name = f"blocks.{n}.self_attn.q"
        whole = state.pop(f"{name}.weight").float()
        scale = whole.abs().max() / (448 * 6)
        numbers, scales = ck.quantize_nvfp4(whole, scale)
        state |= {f"{name}.weight": numbers, f"{name}.weight_scale": scales, f"{name}.weight_scale_2": scale,
                  f"{name}.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
    save(state, tmp_path / "high_nvfp4.safetensors", {"text_dim": 64})
    model, description = load_as(tmp_path / "high_nvfp4.safetensors", T2V)
    patched = sla(model, 0.4)
    found, wanted = draw(patched, GRID), draw(sla(wan, 0.4, query_run="128"), GRID)
    assert 0 < ((found - wanted).norm() / wanted.norm()).item() < 0.3 and f"Trained as {T2V}" in description
