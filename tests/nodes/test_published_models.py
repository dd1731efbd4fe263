"""Models in the shapes in which they lie about: a config beside them, names in capitals, and what is refused."""
import json
import shutil

import pytest
import torch

from make_tiny import TEXT_DIM, save

GRID = (5, 10, 12)


@pytest.mark.parametrize("name", ["tiny_hunyuan_video15", "tiny_cogvideox", "tiny_kandinsky5", "tiny_wan_t2v"])
@pytest.mark.parametrize("config", [{"_class_name": "SomeTransformer3DModel", "num_attention_heads": 7, "text_dim": 1},
                                    {"architectures": ["T5EncoderModel"]}], ids=["its own", "another model's"])
def test_a_config_beside_native_weights_changes_nothing(load, load_tiny, tiny, draw, tmp_path, name, config):
    from sampling import KINDS as SAMPLED
    from sampling import kind_of
    shutil.copy(tiny(name), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    wanted = load_tiny(name)
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        model, description = load(path)
        grid = SAMPLED[kind_of(model)][1]
        assert torch.equal(draw(model, grid), draw(wanted, grid)) and "left out" not in description


def test_capitals_in_the_extension_change_nothing(load, tiny, wan, draw, tmp_path):
    shutil.copy(tiny("tiny_wan_t2v"), tmp_path / "Wan.SAFETENSORS")
    assert torch.equal(draw(load(tmp_path / "Wan.SAFETENSORS")[0], GRID), draw(wan, GRID))


class TestBadInput:
    def test_no_model_of_comfyuis(self, load, tmp_path):
        save({"strange.weight": torch.ones(4, 4)}, tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="holds a model that this ComfyUI does not know: found names such as st"):
            load(tmp_path / "x.safetensors")

    @pytest.mark.parametrize("names", [
        ("transformer_blocks.0.attn1.to_q.weight", "time_embed.emb.timestep_embedder.linear_1.weight"),
        ("transformer_blocks.0.attn.to_q.weight", "context_embedder.weight"),
        ("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"), ("x_embedder.weight", "x_embedder.bias")])
    def test_a_diffusers_model_that_comfyui_does_not_know(self, load, tmp_path, names):
        save({name: torch.ones(8, 8) for name in names}, tmp_path / "diffusion_pytorch_model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "LTXVideoTransformer3DModel"}))
        with pytest.raises(ValueError, match="is a diffusers model .LTXVideoTransformer3DModel.: of those, only Wan"):
            load(tmp_path)

    def test_metadata_that_are_no_object(self, load, tmp_path):
        raw = json.dumps({"__metadata__": [], "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        (tmp_path / "x.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 4)
        with pytest.raises(ValueError, match="__metadata__ is a JSON list, wanted an object of texts"):
            load(tmp_path / "x.safetensors")

    def test_a_truncated_file(self, load, write):
        path = write("native file")
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match="is cut short: .* Download it again"):
            load(path)

    def test_a_missing_shard(self, load, write):
        folder = write("sharded without index")
        next(folder.glob("*-00002-of-*")).unlink()
        with pytest.raises(ValueError, match="lacks diffusion_pytorch_model-00002-of-00003.safetensors"):
            load(folder)

    def test_a_lora(self, load, tmp_path):
        save({f"diffusion_model.blocks.0.self_attn.q.lora_{part}.weight": torch.ones(4, 4) for part in "AB"},
             tmp_path / "x.safetensors")
        with pytest.raises(ValueError, match="is a LoRA: wanted a whole model"):
            load(tmp_path / "x.safetensors")

    def test_gates_for_some_layers(self, load, state, tmp_path):
        save({name: value for name, value in state.items() if "1.to_gate" not in name}, tmp_path / "x.safetensors",
             {"text_dim": TEXT_DIM})
        with pytest.raises(ValueError, match="gates for 1 of 2 layers"):
            load(tmp_path / "x.safetensors")
