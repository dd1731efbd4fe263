"""The loader in a real ComfyUI: one model however it is published, as ComfyUI itself would load it, with its gates."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import make_checkpoints
from make_checkpoints import KINDS, diffusers_state, wan_shapes, write_hollow
from make_tiny import TEXT_DIM, save

GRID = (5, 10, 12)
ROOT = Path(__file__).resolve().parents[2]


def relative_l2(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@pytest.fixture
def load_by_core(comfyui):
    import sampling
    return torch.inference_mode()(sampling.load)


@pytest.fixture(scope="session")
def reference(comfyui, wan_loaded_by_core, gate_file):
    """Two steps of ComfyUI's own loader plus attached gates."""
    from pack.nodes.trained.gate_files import with_gates
    return with_gates(wan_loaded_by_core, gate_file)


@pytest.fixture(scope="session")
def wan_loaded_by_core(load_tiny):
    return load_tiny("tiny_wan_t2v")


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_publishing_samples_the_same(load, write, reference, vsa, run_of, draw, kind):
    model, _ = load(write(kind))
    patched = vsa(model, 0.5)
    found, wanted = draw(patched, GRID), draw(vsa(reference, 0.5), GRID)
    assert relative_l2(found, wanted) <= 1e-6
    assert run_of(patched).gated == {0: 2, 1: 2}


def test_nothing_is_missing_and_nothing_unexpected(load, write, caplog):
    for kind in KINDS:
        load(write(kind))
    assert "unet missing" not in caplog.text and "unet unexpected" not in caplog.text


def test_a_model_without_gates_loads_as_comfyui_loads_it(load, tiny, wan, draw):
    model, description = load(tiny("tiny_wan_t2v"))
    assert torch.equal(draw(model, GRID), draw(wan, GRID))
    assert "No VSA gates" in description and not model.additional_models


@pytest.mark.parametrize("name", ["tiny_hunyuan_video", "tiny_ltxv", "tiny_wan_i2v", "tiny_wan_vace",
                                  "tiny_minimax_h3"])
def test_other_models_load_as_comfyui_loads_them(load, load_tiny, tiny, draw, name):
    from sampling import KINDS as SAMPLED
    from sampling import kind_of
    model, _ = load(tiny(name))
    grid = SAMPLED[kind_of(model)][1]
    assert torch.equal(draw(model, grid), draw(load_tiny(name), grid))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_of_any_float_dtype_load_as_comfyui_loads_them(load, load_by_core, state, tmp_path, draw, dtype):
    path = tmp_path / "half.safetensors"
    save({name: value.to(dtype) for name, value in state.items() if "gate" not in name}, path, {"text_dim": TEXT_DIM})
    model, core = load(path)[0], load_by_core(path)
    assert model.model.get_dtype() == core.model.get_dtype()
    assert torch.equal(draw(model, GRID), draw(core, GRID))


def scaled(state):
    """The linear weights of the blocks as fp8 with a scale each, in the form ComfyUI's own fp8 files have."""
    out = {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for name, value in state.items():
        if name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2:
            scale = value.abs().max() / 448
            out[name] = (value / scale).to(torch.float8_e4m3fn)
            out[name.replace(".weight", ".scale_weight")] = scale.view(1)
        else:
            out[name] = value
    return out


def test_scaled_fp8_weights_load_as_comfyui_loads_them_gates_included(load, load_by_core, state, tmp_path, draw, vsa,
                                                                      reference):
    path = tmp_path / "fp8.safetensors"
    save(scaled(state), path, {"text_dim": TEXT_DIM})
    plain = tmp_path / "plain.safetensors"
    save(scaled({name: value for name, value in state.items() if "gate" not in name}), plain, {"text_dim": TEXT_DIM})
    model, core = load(path)[0], load_by_core(plain)
    assert torch.equal(draw(model, GRID), draw(core, GRID))
    exact = draw(vsa(reference, 0.5), GRID)
    ungated = relative_l2(draw(vsa(core, 0.5, tile_size="4x4x4"), GRID), exact)
    assert relative_l2(draw(vsa(model, 0.5), GRID), exact) < 0.1 < ungated


def test_scaled_fp8_weights_under_diffusers_names_are_the_same(load, state, write, tmp_path, draw, vsa):
    native, converted = scaled(state), write("diffusers file", scaled(state))
    save(native, tmp_path / "fp8.safetensors", {"text_dim": TEXT_DIM})
    one, two = load(tmp_path / "fp8.safetensors")[0], load(converted)[0]
    assert torch.equal(draw(vsa(one, 0.5), GRID), draw(vsa(two, 0.5), GRID))


@pytest.mark.parametrize("dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_a_chosen_weight_dtype_holds_for_model_and_gates(load, write, vsa, run_of, draw, reference, dtype):
    from pack.nodes.trained.gates import KEY
    model, _ = load(write("diffusers file"), dtype)
    wanted = getattr(torch, {"fp8_e4m3fn": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}[dtype])
    gates = model.get_additional_models_with_key(KEY)[0].model
    assert model.model.get_dtype() == wanted and gates.layers[0].weight.dtype == wanted
    patched = vsa(model, 0.5)
    out = draw(patched, GRID)
    assert torch.isfinite(out).all() and run_of(patched).gated.total() == 4
    assert relative_l2(out, draw(vsa(reference, 0.5), GRID)) < 0.5


def test_comfyui_can_ask_for_the_model_again(load, write, draw):
    """As it does for torch.compile, for hooks on conditions and for other GPUs."""
    model, _ = load(write("sharded without index"))
    again = model.cached_patcher_init[0](*model.cached_patcher_init[1], disable_dynamic=True)
    assert again.model is not model.model and torch.equal(draw(again, GRID), draw(model, GRID))
    assert again.cached_patcher_init[0] is model.cached_patcher_init[0]


def test_a_deep_clone_for_another_device_has_its_own_gates(load, write, vsa, draw):
    from pack.nodes.trained.gates import KEY
    model = vsa(load(write("native file"))[0], 0.5)
    if not hasattr(model, "deepclone_multigpu"):
        pytest.skip("this ComfyUI clones for no second device")
    wanted = draw(model, GRID)
    other = model.deepclone_multigpu(torch.device("cpu"))
    assert other.get_additional_models_with_key(KEY)[0].model is not model.get_additional_models_with_key(KEY)[0].model
    assert torch.equal(draw(other, GRID), wanted)


def test_the_real_key_list_of_fastwan_1_3b_is_detected_with_nothing_missing_and_nothing_unexpected(comfyui, tmp_path):
    import comfy.ldm.wan.model
    import comfy.model_detection
    import comfy.ops

    from pack.checkpoints.plan import plan_of
    from pack.checkpoints.source import open_checkpoint
    folder = tmp_path / "FastWan2.1-T2V-1.3B-Diffusers" / "transformer"
    write_hollow(diffusers_state(wan_shapes()), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({
        "_class_name": "WanTransformer3DModel", "num_attention_heads": 12, "attention_head_dim": 128, "text_dim": 4096,
        "freq_dim": 256, "eps": 1e-06, "ffn_dim": 8960, "num_layers": 30}))
    plan = plan_of(open_checkpoint(folder.parent))
    state = {target: torch.empty(plan.checkpoint.tensors[name].info.shape, dtype=torch.bfloat16, device="meta")
             for name, target in plan.names.items()}
    config = comfy.model_detection.model_config_from_unet(state, "", metadata=plan.metadata)
    assert type(config).__name__ == "WAN21_T2V"
    wanted = {"dim": 1536, "num_heads": 12, "num_layers": 30, "ffn_dim": 8960, "in_dim": 16, "text_dim": 4096}
    assert {key: config.unet_config[key] for key in wanted} == wanted
    options = {key: value for key, value in config.unet_config.items()
               if key not in ("image_model", "disable_unet_model_creation")}
    net = comfy.ldm.wan.model.WanModel(**options, device="meta", dtype=torch.bfloat16,
                                       operations=comfy.ops.disable_weight_init)
    assert {name: tuple(p.shape) for name, p in net.state_dict().items()} == {
        name: tuple(tensor.shape) for name, tensor in state.items()}


MEASURE = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {dev!r}]
import conftest, comfy_boot, torch
comfy_boot.boot()
from pack.nodes.trained.sparse_model import load_sparse_model
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))
torch.inference_mode().__enter__()
load_sparse_model(Path({small!r}), {{}})
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
model, _ = load_sparse_model(Path({path!r}), {{}})
print((status("VmHWM") - before) / {size})
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a peak of memory")
@pytest.mark.parametrize("kind", ["native file", "sharded without index"])
def test_loading_needs_no_more_memory_than_the_file_and_a_tenth(comfyui, gate_file, tmp_path, kind):
    """All resident memory counts, mapped pages of the file too; float32, which a CPU keeps as it is."""
    shapes = wan_shapes(layers=3, dim=1024, ffn_dim=4096, text_dim=64)
    generator = torch.Generator().manual_seed(0)
    big = make_checkpoints.write(kind, {name: torch.randn(shape, generator=generator) * 0.02
                                        for name, shape in shapes.items()}, tmp_path)
    size = sum(file.stat().st_size for file in ([big] if big.is_file() else big.glob("*.safetensors")))
    assert size > 200e6
    code = MEASURE.format(tests=str(ROOT / "tests"), dev=str(ROOT / "dev"), small=str(gate_file), path=str(big),
                          size=size)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 0.9 < float(done.stdout.split()[-1]) <= 1.1


def test_where_files_must_not_be_mapped_comfyuis_reader_is_used(load, write, vsa, draw, monkeypatch):
    import comfy.utils

    from pack.nodes.trained import weights
    path = write("sharded without index")
    wanted = draw(vsa(load(path)[0], 0.5), GRID)
    monkeypatch.setattr(comfy.utils, "DISABLE_MMAP", True, raising=False)
    monkeypatch.setattr(weights, "MappedFile", None)
    assert torch.equal(draw(vsa(load(path)[0], 0.5), GRID), wanted)


def test_every_byte_of_the_weights_is_mapped_once(load, write, monkeypatch):
    from pack.nodes.trained import weights
    opened = []

    class Counting(weights.MappedFile):
        def tensor(self, info):
            opened.append((self.path.name, info.start))
            return super().tensor(info)
    monkeypatch.setattr(weights, "MappedFile", Counting)
    load(write("sharded with index"))
    assert len(opened) == len(set(opened)) > 50
