"""What the loaders' lists offer, and where a name leads."""
import pytest
import torch

import make_checkpoints
from make_tiny import save


@pytest.fixture
def folders(comfyui, tmp_path, monkeypatch):
    """Empty model folders in place of ComfyUI's own."""
    import folder_paths
    for kind in ("diffusion_models", "diffusers", "loras"):
        (tmp_path / kind).mkdir()
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture
def filled(folders):
    state = {"a": torch.ones(2)}
    for name in ("diffusion_models/wan.safetensors", "diffusion_models/sub/other.safetensors",
                 "diffusion_models/FastWan/diffusion_pytorch_model.safetensors",
                 "diffusers/Pipe/transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
                 "diffusers/Pipe/vae/diffusion_pytorch_model.safetensors",
                 "diffusers/Pipe/text_encoder/model-00001-of-00002.safetensors", "loras/fast.safetensors"):
        (folders / name).parent.mkdir(parents=True, exist_ok=True)
        save(state, folders / name)
    (folders / "diffusion_models" / "quant.gguf").write_bytes(b"GGUF")
    (folders / "diffusion_models" / "old.ckpt").write_bytes(b"PK")
    return folders


def test_files_and_diffusers_folders_are_listed_without_their_parts(filled):
    from pack.nodes.trained.model_files import gate_file_names, model_names
    names = ["FastWan", "Pipe", "sub/other.safetensors", "wan.safetensors"]
    assert sorted(name.replace("\\", "/") for name in model_names()) == names
    assert gate_file_names() == model_names() + ["loras/fast.safetensors"]


def test_every_listed_name_leads_to_a_file_or_folder(filled):
    from pack.nodes.trained.model_files import gate_file_names, model_path
    found = {name: model_path(name) for name in gate_file_names()}
    assert all(path.exists() for path in found.values())
    assert found["FastWan"] == filled / "diffusion_models" / "FastWan"
    assert found["Pipe"] == filled / "diffusers" / "Pipe"
    assert found["loras/fast.safetensors"] == filled / "loras" / "fast.safetensors"


@pytest.mark.parametrize("name", ["gone", "gone.safetensors", "", "../diffusion_models", "../../etc"])
def test_a_name_that_leads_nowhere_or_outside_is_refused(filled, name):
    from pack.nodes.trained.model_files import model_path
    with pytest.raises(ValueError, match="is in none of ComfyUI's folders"):
        model_path(name)


def test_the_node_loads_a_pipeline_folder_by_name_and_describes_it(folders, gate_file, vsa, draw):
    import safetensors.torch

    from pack.nodes.trained.load_sparse_diffusion_model import SparseDiffusionModelLoader
    state = safetensors.torch.load_file(gate_file)
    made = make_checkpoints.write("pipeline folder", state, folders)
    made.rename(folders / "diffusers" / "FastWan2.1-T2V-1.3B-Diffusers")
    schema = SparseDiffusionModelLoader.define_schema()
    assert schema.inputs[0].options == ["FastWan2.1-T2V-1.3B-Diffusers"]
    model, description = SparseDiffusionModelLoader.execute("FastWan2.1-T2V-1.3B-Diffusers").args
    assert "sparsity 0.8" in description and "3 steps" in description and "WARNING" in description
    assert torch.isfinite(draw(vsa(model, 0.8), (5, 10, 12))).all()


def test_the_attach_node_takes_a_lora_by_name(folders, wan, gate_file, vsa, run_of, draw):
    import safetensors.torch

    from pack.nodes.trained.attach_vsa_gates import VSAGatesAttach
    save({name: value for name, value in safetensors.torch.load_file(gate_file).items() if "gate" in name},
         folders / "loras" / "gates.safetensors")
    assert VSAGatesAttach.define_schema().inputs[1].options == ["loras/gates.safetensors"]
    patched = vsa(VSAGatesAttach.execute(wan, "loras/gates.safetensors")[0], 0.5)
    draw(patched, (5, 10, 12))
    assert run_of(patched).gated.total() == 4


@pytest.mark.parametrize("node", ["SparseDiffusionModelLoader", "VSAGatesAttach"])
def test_every_input_has_a_tooltip_and_the_node_a_help_page(comfyui, node):
    from pathlib import Path

    from pack.nodes import NODES
    schema = next(cls.define_schema() for cls in NODES if cls.define_schema().node_id == node)
    assert all(getattr(entry, "tooltip", None) for entry in schema.inputs)
    page = (Path(__file__).resolve().parents[2] / "web" / "docs" / f"{node}.md").read_text()
    assert all(f"`{entry.id}`" in page for entry in schema.inputs)
