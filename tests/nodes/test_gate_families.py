"""Gates on models other than plain Wan: VACE, whose own blocks have none, and MiniMax H3 with FastH3's files."""
import safetensors.torch
import torch


def relative_l2(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


def test_blocks_that_the_gates_were_not_trained_for_are_counted(load_tiny, gate_file, vsa, run_of, draw, with_gates,
                                                               tmp_path):
    """VACE's own blocks have no gates; the model's blocks keep theirs."""
    model = load_tiny("tiny_wan_vace")
    net = model.model.diffusion_model
    state = {}
    for n in range(len(net.blocks)):
        state[f"blocks.{n}.to_gate_compress.weight"] = torch.randn(net.dim, net.dim) * 0.02
    safetensors.torch.save_file(state, tmp_path / "gates.safetensors")
    patched = vsa(with_gates(model, tmp_path / "gates.safetensors"), 0.5)
    draw(patched, (5, 8, 12))
    run = run_of(patched)
    assert set(run.gated) == set(range(len(net.blocks)))
    assert any(note.startswith(f"WARNING: {run.sparse_calls - run.gated.total()} sparse attention calls had no gate")
               for note in run.said)


def test_minimax_h3_takes_gates_of_its_own_shape(load_tiny, with_gates, vsa, run_of, draw, tmp_path):
    model = load_tiny("tiny_minimax_h3")
    generator = torch.Generator().manual_seed(2)
    state = {f"blocks.{n}.attn.to_gate_compress.weight": torch.randn(256, 128, generator=generator) * 0.09
             for n in range(2)}
    safetensors.torch.save_file(state, tmp_path / "FastH3.safetensors")
    grid = (3, 8, 12)
    plain, patched = vsa(model, 0.5, tile_size="4x4x4"), vsa(with_gates(model, tmp_path / "FastH3.safetensors"), 0.5)
    assert relative_l2(draw(patched, grid), draw(plain, grid)) > 1e-3
    run = run_of(patched)
    assert set(run.gated) == {0, 1} and run.gated.total() == run.sparse_calls > 0
    assert "sparsity 0.5 differs from the 0.9 that FastH3 was trained with" in run.said


def test_the_gates_of_a_fasth3_lora_equal_those_of_a_whole_model(load_tiny, with_gates, vsa, draw, tmp_path):
    model, generator = load_tiny("tiny_minimax_h3"), torch.Generator().manual_seed(2)
    gates = [torch.randn(256, 128, generator=generator) * 0.09 for _ in range(2)]
    whole = {f"blocks.{n}.attn.to_gate_compress.weight": gate for n, gate in enumerate(gates)}
    lora = {f"transformer_blocks.{n}.attn.to_gate_compress.set_weight": gate for n, gate in enumerate(gates)}
    lora["proj_in.diff"], lora["transformer_blocks.0.attn.to_q.lora_A.weight"] = torch.ones(4), torch.ones(4, 4)
    safetensors.torch.save_file(whole, tmp_path / "whole.safetensors")
    safetensors.torch.save_file(lora, tmp_path / "lora.safetensors",
                                {"finetuned_model": "FastVideo/FastVideo-FastH3-4-step-v1"})
    from_lora = with_gates(model, tmp_path / "lora.safetensors")
    from pack.nodes.trained.gates import gates_of
    assert gates_of(from_lora).trained.name == "FastH3"
    found = draw(vsa(from_lora, 0.9), (3, 8, 12))
    assert torch.equal(found, draw(vsa(with_gates(model, tmp_path / "whole.safetensors"), 0.9), (3, 8, 12)))
