"""FastWan's example workflow in a real, running ComfyUI server, on tiny weights published as FastWan is."""
import json
from pathlib import Path

import pytest

from workflow_prompt import shrink, to_prompt

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = ROOT / "workflows" / "fastwan_vsa_3step.json"
NODES = {node["type"]: str(node["id"]) for node in json.loads(WORKFLOW.read_text(encoding="utf-8"))["nodes"]}
LOADER, SHIFT, SAMPLER, VSA, REPORT = (NODES[kind] for kind in (
    "SparseDiffusionModelLoader", "ModelSamplingSD3", "SamplerCustomAdvanced", "VideoSparseAttentionPatch",
    "SparseAttentionReport"))


@pytest.fixture(scope="module")
def models(comfyui, tiny, tmp_path_factory):
    """A diffusion_models folder: a diffusers folder, shards, the native file, the gates alone, and a broken file."""
    import safetensors.torch

    import make_checkpoints
    folder = tmp_path_factory.mktemp("models")
    state = safetensors.torch.load_file(tiny("tiny_wan_vsa"))
    made = make_checkpoints.write("pipeline folder", state, folder)
    made.rename(folder / "FastWan2.1-T2V-1.3B-Diffusers")
    for kind in ("native file", "sharded without index"):
        make_checkpoints.write(kind, state, folder)
    safetensors.torch.save_file({k: v for k, v in state.items() if "gate" in k}, folder / "gates.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "native.safetensors").read_bytes()[:-999])
    return folder


@pytest.fixture(scope="module")
def server(comfyui, models, tmp_path_factory):
    from comfy_server import Server
    with Server(comfyui, models=models, timeout=300, log=tmp_path_factory.mktemp("server") / "log") as running:
        yield running


@pytest.fixture
def prompt(server):
    """The workflow as the page would queue it, on a tiny clip; the latent is saved."""
    graph = to_prompt(json.loads(WORKFLOW.read_text(encoding="utf-8")), server.get("/object_info")[1])

    def small(model, **changes):
        made = shrink(graph, model)
        made["latent"] = {"class_type": "SaveLatent", "inputs": {"samples": [SAMPLER, 0], "filename_prefix": "fastwan"}}
        for node_id, inputs in changes.items():
            made[node_id.strip("_")]["inputs"].update(inputs)
        return made
    return small


def latent(server, entry):
    import safetensors.torch
    return safetensors.torch.load(server.view(entry["outputs"]["latent"]["latents"][0]))["latent_tensor"]


def test_the_workflow_names_the_schedule_and_the_settings_that_fastwan_was_trained_with():
    nodes = {node["type"]: node["widgets_values"] for node in json.loads(WORKFLOW.read_text(encoding="utf-8"))["nodes"]}
    assert nodes["ManualSigmas"] == ["1.0, 0.757, 0.522, 0.0"] and nodes["ModelSamplingSD3"] == [8.0]
    assert nodes["KSamplerSelect"] == ["lcm"]
    assert nodes["VideoSparseAttentionPatch"][:2] == [0.8, "auto"] and 0.2 not in nodes["VideoSparseAttentionPatch"]
    assert nodes["EmptyHunyuanLatentVideo"][:3] == [832, 448, 61]


def test_the_workflow_samples_three_gated_steps_on_every_published_form(server, prompt):
    import torch
    found = {}
    for model in ("FastWan2.1-T2V-1.3B-Diffusers", "sharded_without_index", "native.safetensors"):
        entry = server.run(prompt(model))
        run = entry["outputs"][REPORT]["sparse_attention"][0]
        assert (run["steps"], run["sparse_calls"], run["gated_calls"], run["dense_calls"]) == (3, 6, 6, {})
        assert run["tile"] == [4, 4, 4] and run["sparsity"] == 0.8
        found[model] = latent(server, entry)
    first, *others = found.values()
    assert torch.isfinite(first).all() and all(torch.equal(first, other) for other in others)


def test_the_status_names_the_gates_and_the_model(server, prompt):
    report = server.run(prompt("FastWan2.1-T2V-1.3B-Diffusers"))["outputs"][REPORT]["text"][0]
    assert "VSA gates of FastWan2.1-T2V-1.3B used in 2 layers" in report and "WARNING" not in report


def test_a_vsa_trained_model_that_runs_partly_dense_is_warned_about(server, prompt):
    changed = prompt("FastWan2.1-T2V-1.3B-Diffusers", **{VSA: {"start_percent": 0.5, "sparsity": 0.5}})
    report = server.run(changed)["outputs"][REPORT]["text"][0]
    assert "ran dense, without its gates" in report and "differs from the 0.8" in report


def test_gates_attached_to_comfyuis_own_loader_give_the_same_clip(server, prompt):
    import torch
    wanted = latent(server, server.run(prompt("native.safetensors")))
    graph = prompt("native.safetensors")
    graph[LOADER] = {"class_type": "UNETLoader",
                     "inputs": {"unet_name": "native.safetensors", "weight_dtype": "default"}}
    graph["attach"] = {"class_type": "VSAGatesAttach",
                       "inputs": {"model": [LOADER, 0], "gates": "gates.safetensors", "strength": 1.0}}
    graph[SHIFT]["inputs"]["model"] = ["attach", 0]
    assert torch.equal(latent(server, server.run(graph)), wanted)


def test_a_cut_file_is_an_error_at_the_loader_that_says_what_to_do(server, prompt):
    from comfy_server import PromptError
    with pytest.raises(PromptError, match="SparseDiffusionModelLoader.*is cut short: .*Download it again"):
        server.run(prompt("cut.safetensors"))


def test_a_model_that_is_not_there_is_refused_when_the_prompt_is_queued(server, prompt):
    status, answer = server.get("/prompt", {"prompt": prompt("nowhere")})
    assert status == 400 and "Value not in list" in json.dumps(answer["node_errors"][LOADER])
