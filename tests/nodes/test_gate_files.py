"""Gates from files of every kind, LoRAs among them, and files that hold none or another model's."""
import pytest
import safetensors.torch
import torch

GRID = (5, 10, 12)


def gate_weights(model):
    """layer -> (weight, bias) as they are applied, patches included."""
    from pack.nodes.trained.gates import KEY
    patcher = model.get_additional_models_with_key(KEY)[0]
    patcher.patch_model(torch.device("cpu"))
    try:
        return {n: (layer.weight.detach().clone(), None if layer.bias is None else layer.bias.detach().clone())
                for n, layer in enumerate(patcher.model.layers)}
    finally:
        patcher.unpatch_model(torch.device("cpu"))


@pytest.fixture
def write(tmp_path):
    def file(state, name="gates.safetensors", **metadata):
        state = {key: tensor.contiguous() for key, tensor in state.items()}
        safetensors.torch.save_file(state, tmp_path / name, metadata)
        return tmp_path / name
    return file


@pytest.fixture
def gates(gate_file):
    """The gates of gate_file: name -> tensor."""
    return {name: value for name, value in safetensors.torch.load_file(gate_file).items() if "to_gate" in name}


def refused(error, message):
    return pytest.raises(error, match=message)


@pytest.mark.parametrize("prefix", ["blocks.", "diffusion_model.blocks.", "model.diffusion_model.blocks.",
                                    "transformer_blocks.", "transformer.blocks."])
def test_gates_are_found_under_every_prefix(wan, gates, with_gates, write, prefix):
    file = write({name.replace("blocks.", prefix, 1): value for name, value in gates.items()})
    for n, (weight, bias) in gate_weights(with_gates(wan, file)).items():
        assert torch.equal(weight, gates[f"blocks.{n}.to_gate_compress.weight"])
        assert torch.equal(bias, gates[f"blocks.{n}.to_gate_compress.bias"])


def test_only_the_gates_of_a_file_are_read(wan, gate_file, with_gates, monkeypatch):
    from pack.nodes.trained import gate_files
    read, original = [], gate_files.read_tensors
    monkeypatch.setattr(gate_files, "read_tensors",
                        lambda checkpoint, names: original(checkpoint, read.extend(names) or read))
    with_gates(wan, gate_file)
    assert len(read) == 4 and all("to_gate_compress" in name for name in read)


def test_scaled_fp8_gates_are_multiplied_out(wan, gates, with_gates, write):
    state = {}
    for name, value in gates.items():
        if name.endswith("weight"):
            scale = value.abs().max() / 448
            state[name] = (value / scale).to(torch.float8_e4m3fn)
            state[name.replace(".weight", ".scale_weight")] = scale
        else:
            state[name] = value
    for n, (weight, _) in gate_weights(with_gates(wan, write(state))).items():
        wanted = gates[f"blocks.{n}.to_gate_compress.weight"]
        assert ((weight - wanted).norm() / wanted.norm()).item() < 0.04


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gates_come_in_the_models_dtype(wan, gates, with_gates, write, dtype):
    file = write({name: value.to(dtype) for name, value in gates.items()})
    for n, (weight, _) in gate_weights(with_gates(wan, file)).items():
        assert weight.dtype == wan.model.get_dtype()
        assert torch.equal(weight, gates[f"blocks.{n}.to_gate_compress.weight"].to(dtype).to(weight.dtype))




def test_set_weight_and_diff_make_gates_for_a_model_without(wan, gates, with_gates, write, gated):
    names = {"weight": "set_weight", "bias": "diff_b"}
    state = {f"diffusion_model.{name.rpartition('.')[0]}.{names[name.rpartition('.')[2]]}": value
             for name, value in gates.items()}
    state["diffusion_model.blocks.0.self_attn.q.lora_A.weight"] = torch.ones(4, 256)
    made, wanted = gate_weights(with_gates(wan, write(state))), gate_weights(gated)
    for n in wanted:
        assert torch.equal(made[n][0], wanted[n][0]) and torch.equal(made[n][1], wanted[n][1])


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_differences_are_added_to_the_gates_there_are(gated, gates, with_gates, write, strength):
    delta = {name: torch.randn(value.shape, generator=torch.Generator().manual_seed(4)) * 0.1
             for name, value in gates.items()}
    state = {("diffusion_model." + name).replace(".weight", ".diff").replace(".bias", ".diff_b"): value
             for name, value in delta.items()}
    patched = gate_weights(with_gates(gated, write(state), strength))
    for n, (weight, bias) in patched.items():
        for part, found in (("weight", weight), ("bias", bias)):
            name = f"blocks.{n}.to_gate_compress.{part}"
            assert torch.allclose(found, gates[name] + strength * delta[name], atol=1e-6)
    for n, (weight, _) in gate_weights(gated).items():      # the model it came from is as it was
        assert torch.equal(weight, gates[f"blocks.{n}.to_gate_compress.weight"])


def test_set_weight_replaces_the_gates_there_are(gated, gates, with_gates, write):
    state = {name.replace(".weight", ".set_weight"): -2 * value for name, value in gates.items()
             if name.endswith("weight")}
    for n, (weight, bias) in gate_weights(with_gates(gated, write(state))).items():
        assert torch.equal(weight, -2 * gates[f"blocks.{n}.to_gate_compress.weight"])
        assert torch.equal(bias, gates[f"blocks.{n}.to_gate_compress.bias"])


def test_low_rank_differences_are_added_with_their_alpha(gated, gates, with_gates, write):
    generator = torch.Generator().manual_seed(6)
    a, b = torch.randn(4, 256, generator=generator) * 0.1, torch.randn(256, 4, generator=generator) * 0.1
    state = {"diffusion_model.blocks.1.to_gate_compress.lora_A.weight": a,
             "diffusion_model.blocks.1.to_gate_compress.lora_B.weight": b,
             "diffusion_model.blocks.1.to_gate_compress.alpha": torch.tensor(8.0)}
    patched, name = gate_weights(with_gates(gated, write(state))), "blocks.1.to_gate_compress.weight"
    assert torch.allclose(patched[1][0], gates[name] + 2 * b @ a, atol=1e-5)
    assert torch.equal(patched[0][0], gates["blocks.0.to_gate_compress.weight"])


def test_a_gate_lora_changes_the_clip_and_survives_clones(gated, gates, with_gates, write, vsa, draw):
    state = {name.replace(".weight", ".diff"): value for name, value in gates.items() if name.endswith("weight")}
    patched = vsa(with_gates(gated, write(state)), 0.5)
    before, after = draw(vsa(gated, 0.5), GRID), draw(patched, GRID)
    assert ((after - before).norm() / before.norm()).item() > 0.01
    assert torch.equal(draw(patched.clone(), GRID), after) and torch.equal(draw(vsa(gated, 0.5), GRID), before)


def test_low_rank_differences_without_gates_are_refused(wan, with_gates, write):
    state = {f"blocks.{n}.to_gate_compress.lora_{part}.weight": torch.ones(4, 4) for n in range(2) for part in "AB"}
    with refused(ValueError, "low-rank differences to gates .*but the model has no gates: attach"):
        with_gates(wan, write(state))


def test_a_lora_for_a_bias_that_the_gates_lack_is_refused(wan, gates, with_gates, write):
    bare = with_gates(wan, write({n: v for n, v in gates.items() if n.endswith("weight")}, "bare.safetensors"))
    with refused(ValueError, "changes the gate of layer 0.bias, which the gates of this model do not have"):
        with_gates(bare, write({"blocks.0.to_gate_compress.diff_b": torch.ones(256)}))


def test_a_lora_of_another_model_is_refused(gated, with_gates, write):
    with refused(ValueError, r"found \[8, 8\] for a gate of \[256, 256\]: it belongs to another model"):
        with_gates(gated, write({"blocks.0.to_gate_compress.diff": torch.ones(8, 8)}))


def test_a_lora_without_gates_is_refused(wan, with_gates, write):
    state = {f"diffusion_model.blocks.{n}.self_attn.q.lora_{part}.weight": torch.ones(4, 4)
             for n in range(2) for part in "AB"}
    with refused(ValueError, "is a LoRA without VSA gates. Choose the file of a VSA-trained model .* bypass this node"):
        with_gates(wan, write(state))


def test_a_model_file_without_gates_is_refused(wan, tiny, with_gates):
    with refused(ValueError, "is a model without VSA gates. Choose the file of a VSA-trained .* bypass this node"):
        with_gates(wan, tiny("tiny_wan_t2v"))


def test_gates_for_some_layers_only_are_refused(wan, gates, with_gates, write):
    with refused(ValueError, "gates for 1 of 2 layers, none for layer 0: wanted all"):
        with_gates(wan, write({name: value for name, value in gates.items() if "blocks.1." in name}))


def test_gates_of_a_longer_model_are_refused(wan, gates, with_gates, write):
    more = {name.replace("blocks.1", "blocks.9"): value for name, value in gates.items()}
    with refused(ValueError, "gates for 10 layers, this model has 2: they belong to another model"):
        with_gates(wan, write(more))


def test_gates_of_another_width_are_refused(wan, with_gates, write):
    state = {f"blocks.{n}.to_gate_compress.weight": torch.ones(384, 384) for n in range(2)}
    with refused(ValueError, r"gate of shape \[384, 384\] in layer 0, this model takes \[256, 256\]: they b"):
        with_gates(wan, write(state))


def test_gates_per_head_as_in_ltx_are_refused(wan, with_gates, write):
    state = {f"transformer_blocks.{n}.attn1.to_gate_compress.weight": torch.ones(2, 256) for n in range(2)}
    with refused(ValueError, "a gate per head as in LTX-2.3; VSA has one per channel"):
        with_gates(wan, write(state))


def test_a_model_of_a_family_without_gates_is_refused(load_tiny, gate_file, with_gates):
    with refused(ValueError, "found HunyuanVideo: there are no VSA gates for it, wanted Wan or MiniMax H3"):
        with_gates(load_tiny("tiny_hunyuan_video"), gate_file)


def test_a_gate_without_a_weight_is_refused(wan, gates, with_gates, write):
    state = {name: value for name, value in gates.items() if name != "blocks.1.to_gate_compress.weight"}
    with refused(ValueError, "the gate of layer 1 has bias and no weight"):
        with_gates(wan, write(state))


def test_a_file_that_is_none_is_refused(wan, with_gates, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"GGUF" + b"\0" * 64)
    with refused(ValueError, "is no safetensors file: found a GGUF file"):
        with_gates(wan, tmp_path / "x.safetensors")
