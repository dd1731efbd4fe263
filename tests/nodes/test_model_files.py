"""What the loaders' lists offer, and where a name leads."""
import json
import shutil

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
def put(folders):
    """put("diffusion_models/x.safetensors", tensors) writes a file below the model folders."""
    def write(name, tensors, metadata=None):
        path = folders / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save(tensors, path, metadata)
        return path
    return write


PART = {"conv_in.weight": torch.ones(4, 4), "conv_out.weight": torch.ones(4, 4)}


@pytest.fixture
def filled(folders, put, state):
    put("diffusion_models/wan.safetensors", state)
    put("diffusion_models/sub/other.safetensors", state)
    put("diffusion_models/FastWan/diffusion_pytorch_model.safetensors", state)
    put("diffusers/Pipe/transformer/diffusion_pytorch_model-00001-of-00002.safetensors", state)
    put("diffusers/Pipe/vae/diffusion_pytorch_model.safetensors", PART)
    put("diffusers/Pipe/text_encoder/model-00001-of-00002.safetensors", PART)
    put("loras/fast.safetensors", PART)
    (folders / "diffusion_models" / "quant.gguf").write_bytes(b"GGUF")
    (folders / "diffusion_models" / "old.ckpt").write_bytes(b"PK")
    return folders


def listed():
    from pack.nodes.trained.model_files import model_names
    return sorted(name.replace("\\", "/") for name in model_names())


def test_files_and_diffusers_folders_are_listed_without_their_parts(filled):
    from pack.nodes.trained.model_files import gate_file_names, model_names
    assert listed() == ["FastWan", "Pipe", "sub/other.safetensors", "wan.safetensors"]
    assert gate_file_names() == model_names() + ["loras/fast.safetensors"]


def test_every_listed_name_leads_to_a_file_or_folder(filled):
    from pack.nodes.trained.model_files import gate_file_names, gate_file_path, model_names, model_path
    found = {name: gate_file_path(name) for name in gate_file_names()}
    assert all(path.exists() for path in found.values())
    assert {name: model_path(name) for name in model_names()}.items() <= found.items()
    assert found["FastWan"] == filled / "diffusion_models" / "FastWan"
    assert found["Pipe"] == filled / "diffusers" / "Pipe"
    assert found["loras/fast.safetensors"] == filled / "loras" / "fast.safetensors"


class TestAFolderNamedAsAPrefix:
    @pytest.fixture
    def both(self, put, state):
        """A model and a LoRA under one name, and models whose folders are called as the prefixes are."""
        return {"model": put("diffusion_models/loras/same.safetensors", state),
                "lora": put("loras/same.safetensors", PART),
                "nested": put("diffusion_models/diffusion_models/loras/same.safetensors", state),
                "deep": put("diffusion_models/diffusion_models/deep.safetensors", state)}

    def test_the_loader_opens_the_model_and_never_the_lora(self, both):
        from pack.nodes.trained.model_files import model_path
        assert listed() == ["diffusion_models/deep.safetensors", "diffusion_models/loras/same.safetensors",
                            "loras/same.safetensors"]
        assert model_path("loras/same.safetensors") == both["model"]
        assert model_path("diffusion_models/loras/same.safetensors") == both["nested"]

    def test_the_list_of_gate_files_has_a_name_of_its_own_for_each(self, both):
        from pack.nodes.trained.model_files import gate_file_names, gate_file_path
        names = gate_file_names()
        assert len(names) == len(set(names)) == 4
        assert {gate_file_path(name) for name in names} == set(both.values())
        assert gate_file_path("loras/same.safetensors") == both["lora"]
        assert gate_file_path("diffusion_models/loras/same.safetensors") == both["model"]

    def test_names_of_earlier_versions_lead_where_nothing_else_is_meant(self, put, state):
        from pack.nodes.trained.model_files import gate_file_path
        model, deep = (put(f"diffusion_models/{name}.safetensors", state)
                       for name in ("loras/alone", "diffusion_models/deep"))
        assert gate_file_path("loras/alone.safetensors") == model
        assert gate_file_path("diffusion_models/deep.safetensors") == deep
        with pytest.raises(ValueError, match="none.safetensors is not in ComfyUI's folder loras"):
            gate_file_path("loras/none.safetensors")

    def test_of_two_folders_of_one_name_the_one_with_a_model_is_opened(self, put, state, folders):
        from pack.nodes.trained.model_files import model_path
        put("diffusion_models/Same/notes/other.safetensors", state)
        put("diffusers/Same/transformer/diffusion_pytorch_model.safetensors", state)
        assert "Same" in listed() and model_path("Same") == folders / "diffusers" / "Same"

    def test_a_folder_with_weights_and_a_transformer_in_it_names_both(self, put, state, folders):
        from pack.checkpoints.source import open_checkpoint
        from pack.nodes.trained.model_files import model_path
        own = put("diffusion_models/X/diffusion_pytorch_model.safetensors", state)
        inner = put("diffusion_models/X/transformer/diffusion_pytorch_model.safetensors", state)
        assert listed() == ["X", "X/diffusion_pytorch_model.safetensors"]
        assert open_checkpoint(model_path("X")).files == (inner,)
        assert open_checkpoint(model_path("X/diffusion_pytorch_model.safetensors")).files == (own,)


class TestWhatIsOffered:
    def test_extensions_in_capitals(self, put, state):
        put("diffusion_models/A.SAFETENSORS", state)
        put("diffusion_models/sub/b.SafeTensors", state)
        put("loras/c.SFT", PART)
        from pack.nodes.trained.model_files import gate_file_names
        assert listed() == ["A.SAFETENSORS", "sub/b.SafeTensors"] and "loras/c.SFT" in gate_file_names()

    @pytest.mark.parametrize("kind", ["diffusion_models", "diffusers"])
    def test_weights_in_the_root_of_a_model_folder(self, folders, state, kind):
        from pack.checkpoints.source import open_checkpoint
        from pack.nodes.trained.model_files import model_path
        (folders / "made").mkdir()
        make_checkpoints.write_shards(state, folders / "made", index=False)
        for path in (folders / "made").iterdir():
            path.rename(folders / kind / path.name)
        save(state, folders / kind / "diffusion_pytorch_model.safetensors")
        names = ["diffusion_pytorch_model-00001-of-00003.safetensors", "diffusion_pytorch_model.safetensors"]
        assert listed() == names
        for name in names:
            assert open_checkpoint(model_path(name)).tensors.keys() == state.keys()

    def test_two_sharded_sets_in_one_folder(self, folders, state):
        from pack.nodes.trained.model_files import model_path
        from pack.nodes.trained.sparse_model import load_sparse_model
        for stem in ("high", "low"):
            (folders / stem).mkdir()
            make_checkpoints.write_shards(make_checkpoints.diffusers_state(state), folders / stem, index=False)
            for path in (folders / stem).iterdir():
                target = folders / "diffusion_models" / "Wan" / path.name.replace("diffusion_pytorch_model", stem)
                target.parent.mkdir(exist_ok=True)
                path.rename(target)
        assert listed() == ["Wan/high-00001-of-00003.safetensors", "Wan/low-00001-of-00003.safetensors"]
        for name in listed():
            assert "VSA gates in 2 of 2 layers" in load_sparse_model(model_path(name), {})[1]

    @pytest.mark.parametrize("root", ["diffusion_models", "diffusers"])
    @pytest.mark.parametrize("part", ["vocoder", "audio_vae", "connectors", "latent_upsampler", "controlnet", "vae",
                                      "renamed_by_somebody"])
    def test_parts_of_a_pipeline_that_are_no_video_models_are_not(self, put, state, root, part):
        put(f"{root}/LTX/{part}/diffusion_pytorch_model.safetensors", PART)
        put(f"{root}/Shards/{part}/model-00001-of-00001.safetensors", PART)
        put(f"{root}/Wan/transformer/diffusion_pytorch_model.safetensors", state)
        put(f"{root}/Wan/transformer_2/diffusion_pytorch_model.safetensors", state)
        put(f"{root}/Wan/{part}/model.safetensors", PART)
        (put(f"{root}/Wan/{part}/also.safetensors", PART).parent / "config.json").write_text("{}")
        assert listed() == ["Wan", "Wan/transformer_2"]

    def test_a_video_model_in_a_folder_named_as_such_a_part_is(self, put, state):
        put("diffusion_models/vae_free_wan/diffusion_pytorch_model.safetensors", state)
        put("diffusers/audio_driven/transformer/diffusion_pytorch_model.safetensors", state)
        assert listed() == ["audio_driven", "vae_free_wan"]

    def test_half_a_download_is_and_says_what_is_missing(self, put, state, folders):
        from pack.checkpoints.source import open_checkpoint
        from pack.nodes.trained.model_files import model_path
        path = put("diffusion_models/Wan/diffusion_pytorch_model-00002-of-00002.safetensors", state)
        put("diffusers/Pipe/vocoder/model-00002-of-00002.safetensors", PART)
        assert listed() == ["Wan"]
        with pytest.raises(ValueError, match="lacks diffusion_pytorch_model-00001-of-00002.safetensors: found 1 of 2"):
            open_checkpoint(model_path("Wan"))
        path.rename(path.with_name("diffusion_pytorch_model-00001-of-00001.safetensors"))
        assert listed() == ["Wan"] and open_checkpoint(model_path("Wan")).tensors.keys() == state.keys()

    def test_a_folder_is_looked_into_again_when_its_files_change(self, put, state):
        put("diffusers/New/diffusion_pytorch_model.safetensors", PART)
        assert listed() == []
        put("diffusers/New/diffusion_pytorch_model.safetensors", state)
        assert listed() == ["New"]

    def test_gates_alone_in_a_published_folder_are_for_the_attach_node(self, put, state):
        from pack.nodes.trained.model_files import gate_file_names
        put("diffusers/Gates/diffusion_pytorch_model.safetensors",
            {name: value for name, value in state.items() if "to_gate_compress" in name})
        assert listed() == [] and gate_file_names() == ["Gates"]

    @pytest.mark.parametrize("name", ["tiny_hunyuan_video", "tiny_hunyuan_video15", "tiny_ltxv", "tiny_ltxav",
                                      "tiny_kandinsky5", "tiny_cogvideox", "tiny_minimax_h3", "tiny_wan_vace",
                                      "tiny_wan_i2v", "tiny_wan_s2v"])
    def test_every_kind_of_video_model_is_where_its_folder_was_downloaded_whole(self, folders, tiny, name):
        """Native names and a config.json, as HunyuanVideo 1.5 and CogVideoX are published."""
        folder = folders / "diffusion_models" / "Published"
        folder.mkdir()
        shutil.copy(tiny(name), folder / "diffusion_pytorch_model.safetensors")
        (folder / "config.json").write_text(json.dumps({"_class_name": "Transformer3DModel"}))
        assert listed() == ["Published"]


@pytest.mark.parametrize("name", ["gone", "gone.safetensors", "", ".", "../diffusion_models", "../../etc"])
def test_a_name_that_leads_nowhere_or_outside_is_refused(filled, name):
    from pack.nodes.trained.model_files import model_path
    with pytest.raises(ValueError, match="is in none of ComfyUI's folders"):
        model_path(name)


def test_the_node_loads_a_pipeline_folder_by_name_and_describes_it(folders, state, vsa, draw):
    from pack.nodes.trained.load_sparse_diffusion_model import SparseDiffusionModelLoader
    made = make_checkpoints.write("pipeline folder", state, folders)
    made.rename(folders / "diffusers" / "FastWan2.1-T2V-1.3B-Diffusers")
    schema = SparseDiffusionModelLoader.define_schema()
    assert schema.inputs[0].options == ["FastWan2.1-T2V-1.3B-Diffusers"]
    model, description = SparseDiffusionModelLoader.execute("FastWan2.1-T2V-1.3B-Diffusers").args
    assert "sparsity 0.8" in description and "3 steps" in description and "WARNING" in description
    assert torch.isfinite(draw(vsa(model, 0.8), (5, 10, 12))).all()


def test_the_attach_node_takes_a_lora_by_name(folders, wan, state, vsa, run_of, draw):
    from pack.nodes.trained.attach_vsa_gates import VSAGatesAttach
    save({name: value for name, value in state.items() if "gate" in name}, folders / "loras" / "gates.safetensors")
    assert VSAGatesAttach.define_schema().inputs[1].options[1:] == ["loras/gates.safetensors"]
    patched = vsa(VSAGatesAttach.execute(wan, "loras/gates.safetensors")[0], 0.5)
    draw(patched, (5, 10, 12))
    assert run_of(patched).gated.total() == 4


def test_no_file_is_taken_for_gates_that_nobody_has_chosen(folders, wan):
    from pack.nodes.trained.attach_vsa_gates import VSAGatesAttach
    first = VSAGatesAttach.define_schema().inputs[1].options[0]
    assert "no file is chosen" in VSAGatesAttach.validate_inputs(gates=first)
    assert "is in none of ComfyUI's folders" in VSAGatesAttach.validate_inputs(gates="gone.safetensors")
    assert VSAGatesAttach.validate_inputs(gates=None) is True, "fed by a link"
    with pytest.raises(ValueError, match="no file is chosen: choose the one that holds the VSA gates"):
        VSAGatesAttach.execute(wan, first)


def test_an_error_of_a_file_leaves_the_nodes_without_the_path_of_a_class(folders, wan):
    from pack.nodes.trained.attach_vsa_gates import VSAGatesAttach
    from pack.nodes.trained.load_sparse_diffusion_model import SparseDiffusionModelLoader
    (folders / "diffusion_models" / "x.safetensors").write_bytes(b"GGUF" + bytes(64))
    for run in (lambda: SparseDiffusionModelLoader.execute("x.safetensors"),
                lambda: VSAGatesAttach.execute(wan, "x.safetensors")):
        with pytest.raises(ValueError, match="is no safetensors file: found a GGUF file") as error:
            run()
        assert type(error.value) is ValueError


@pytest.mark.parametrize("node", ["SparseDiffusionModelLoader", "VSAGatesAttach"])
def test_every_input_has_a_tooltip_and_the_node_a_help_page(comfyui, node):
    from pathlib import Path

    from pack.nodes import NODES
    schema = next(cls.define_schema() for cls in NODES if cls.define_schema().node_id == node)
    assert all(getattr(entry, "tooltip", None) for entry in schema.inputs)
    page = (Path(__file__).resolve().parents[2] / "web" / "docs" / f"{node}.md").read_text()
    assert all(f"`{entry.id}`" in page for entry in schema.inputs)


def test_a_pytorch_file_is_listed_and_choosing_it_says_how_to_convert_it(folders, state):
    from pack.nodes.trained.load_sparse_diffusion_model import SparseDiffusionModelLoader
    from pack.nodes.trained.model_files import gate_file_names
    path = folders / "diffusion_models" / "TurboWan2.1-T2V-1.3B-480P.pth"
    torch.save(state, path)
    assert listed() == [path.name] and path.name not in gate_file_names()
    with pytest.raises(ValueError, match="found a PyTorch file .* Convert it: .* python -m checkpoints.convert"):
        SparseDiffusionModelLoader.execute(path.name)
