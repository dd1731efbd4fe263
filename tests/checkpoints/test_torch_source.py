"""The converter's own sources: PyTorch files and int8 weights become what the plain files are."""
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from make_sla_checkpoints import flat_patch, quantised, with_projections, wrapped
from pack.checkpoints.convert import convert
from pack.checkpoints.describe import describe
from pack.checkpoints.plan import plan_of
from pack.checkpoints.safetensors_file import CheckpointError
from pack.checkpoints.source import open_checkpoint
from pack.checkpoints.torch_source import open_for_conversion

ROOT = Path(__file__).resolve().parents[2]
NAME = "TurboWan2.1-T2V-1.3B-480P"


@pytest.fixture(scope="module")
def turbo(state_dict):
    """A Wan with projections, as TurboDiffusion keeps one: a flat patch embedding, bf16 beside fp32 norms."""
    state = flat_patch(with_projections(state_dict))
    return {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in state.items()}


@pytest.fixture
def plain(turbo, tmp_path):
    """What the same weights come to from a safetensors file."""
    source = tmp_path / "plain" / f"{NAME}.safetensors"
    source.parent.mkdir()
    safetensors.torch.save_file(turbo, source)
    convert(source, tmp_path / "plain" / "out.safetensors")
    return tmp_path / "plain" / "out.safetensors"


WRAPPINGS = {
    "as it is": lambda state: state, "state_dict": lambda state: {"state_dict": state, "step": 7},
    "model in it": lambda state: {"iteration": 3, "model": {"module": state}},
    "net.": lambda state: {f"net.{name}": tensor for name, tensor in state.items()},
    "checkpoint wrapped": wrapped,
    "with other things": lambda state: {**state, "_extra_state": None, "version": "1"},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_pytorch_file_converts_to_the_bits_of_the_safetensors_file(turbo, plain, tmp_path, wrapping):
    source = tmp_path / f"{NAME}.pth"
    torch.save(WRAPPINGS[wrapping](turbo), source)
    convert(source, tmp_path / "out.safetensors")
    found, wanted = (safetensors.torch.load_file(path) for path in (tmp_path / "out.safetensors", plain))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
               for name, tensor in wanted.items())
    told = [describe(plan_of(open_checkpoint(path))).split("\n", 1)[1]
            for path in (tmp_path / "out.safetensors", plain)]
    assert told[0] == told[1] and "TurboWan" in told[0]


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_int8_weights_become_the_weights_they_stand_for(turbo, tmp_path, kind):
    source = tmp_path / f"{NAME}-quant.{kind}"
    state, wanted = quantised(turbo)
    assert any(tensor.shape[0] % 128 or tensor.shape[1] % 128 for name, tensor in wanted.items()
               if name.startswith("blocks.") and tensor.ndim == 2), "a block that is cut"
    (torch.save if kind == "pth" else safetensors.torch.save_file)(state, source)
    convert(source, tmp_path / "out.safetensors")
    found = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name].reshape(tensor.shape), tensor) and found[name].dtype == tensor.dtype, name
    plan = plan_of(open_checkpoint(tmp_path / "out.safetensors"))
    assert plan.trained.name.startswith("TurboWan2.1-T2V-1.3B") and len(plan.projections) == 3


def test_the_loader_says_how_to_convert_what_it_does_not_read(turbo, tmp_path):
    torch.save(turbo, tmp_path / "turbo.pth")
    safetensors.torch.save_file(quantised(turbo)[0], tmp_path / "turbo-quant.safetensors")
    for name in ("turbo.pth", "turbo-quant.safetensors"):
        path = tmp_path / name
        with pytest.raises(CheckpointError) as error:
            plan_of(open_checkpoint(path))
        command = f"python -m checkpoints.convert {path} {path.with_suffix('')}"
        assert command in str(error.value), str(error.value)


class Harmful:
    def __reduce__(self):
        return print, ("this must not run",)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2000])


def without(name):
    def harm(state):
        del state[name]
    return harm


@pytest.mark.parametrize(("write", "message"), [
    (lambda path: torch.save({"a": Harmful()}, path), "holds more than tensors, which could run code"),
    (lambda path: path.write_bytes(pickle.dumps({"a": 1})), "may be cut short. Download it again|more than tensors"),
    (lambda path: path.write_bytes(b"no model"), "may be cut short. Download it again|more than tensors"),
    (lambda path: torch.save([torch.ones(2)], path), "found list, wanted a state dict"),
    (lambda path: torch.save({"step": 3}, path), "holds no"),
    (lambda path: torch.save({"freqs": torch.ones(2, dtype=torch.complex64)}, path), "complex64, which safetensors"),
    (lambda path: torch.save({"weight": torch.ones(2)}, path), "neither Wan nor MiniMax H3"),
])
def test_a_pytorch_file_that_is_no_model_is_refused_in_a_sentence(tmp_path, capsys, write, message):
    write(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "x.pth", tmp_path / "out.safetensors")
    assert "must not run" not in capsys.readouterr().out and not list(tmp_path.glob("out*"))


def test_a_pytorch_file_that_was_cut_is_refused(turbo, tmp_path):
    torch.save(turbo, tmp_path / "x.pth")
    cut(tmp_path / "x.pth")
    assert not zipfile.is_zipfile(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="may be cut short. Download it again"):
        convert(tmp_path / "x.pth", tmp_path / "out.safetensors")


@pytest.mark.parametrize(("harm", "message"), [
    (without("blocks.0.ffn.0.scale"), r"int8_weight is \[64, 256\] I8 with no scale: wanted \[N, K\] I8 with scale"),
    (lambda state: state.update({"blocks.0.ffn.0.scale": torch.ones(3, 2)}), r"scale \[3, 2\] F32: wanted"),
    (lambda state: state.update({"blocks.0.ffn.0.scale": torch.ones(1, 2).half()}), r"scale \[1, 2\] F16: wanted"),
    (lambda state: state.update({"blocks.0.ffn.0.weight": torch.ones(64, 256)}), "wanted one of both"),
])
def test_int8_weights_without_scales_that_fit_are_refused(turbo, tmp_path, harm, message):
    state = quantised(turbo)[0]
    harm(state)
    torch.save(state, tmp_path / "x-quant.pth")
    with pytest.raises(CheckpointError, match=message):
        open_for_conversion(tmp_path / "x-quant.pth")


def test_the_command_takes_a_pytorch_file(turbo, tmp_path):
    torch.save(turbo, tmp_path / f"{NAME}.pth")
    done = subprocess.run([sys.executable, "-m", "checkpoints.convert", tmp_path / f"{NAME}.pth",
                           tmp_path / "out.safetensors"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "TurboWan2.1-T2V-1.3B" in done.stdout and "100%" in done.stderr
