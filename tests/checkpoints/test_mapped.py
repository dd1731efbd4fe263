"""Tensors as pages of a file."""
import pytest
import safetensors.torch
import torch

from pack.checkpoints.mapped import MappedFile, ReleasingPages
from pack.checkpoints.safetensors_file import CheckpointError, TensorInfo, read_header


@pytest.fixture
def state(tmp_path):
    generator = torch.Generator().manual_seed(3)
    state = {"f32": torch.randn(300, 70, generator=generator), "odd": torch.ones(3, dtype=torch.uint8),
             "bf16": torch.randn(513, 31, generator=generator).bfloat16(), "scalar": torch.tensor(2.5),
             "u16": torch.arange(9).to(torch.uint16), "u64": torch.arange(3).to(torch.uint64),
             "complex": torch.randn(5, dtype=torch.complex64, generator=generator),
             "fnuz": torch.randn(8, generator=generator).to(torch.float8_e4m3fnuz),
             "fp8": torch.randn(64, 64, generator=generator).to(torch.float8_e4m3fn), "none": torch.empty(0, 4)}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(state, path)
    return path, state


def test_every_dtype_comes_back_bit_for_bit(state):
    path, state = state
    mapped = MappedFile(path)
    for name, info in read_header(path).tensors.items():
        found = mapped.tensor(info)
        assert found.dtype == state[name].dtype and found.shape == state[name].shape
        assert torch.equal(found.reshape(-1).view(torch.uint8), state[name].reshape(-1).view(torch.uint8))


def test_a_dtype_that_torch_does_not_have_is_refused(state):
    with pytest.raises(CheckpointError, match="dtype F4, wanted one of"):
        MappedFile(state[0]).tensor(TensorInfo("F4", (1,), 0, 1))


def test_released_tensors_read_the_same_again_and_the_file_is_never_written(state):
    path, state = state
    before, mapped = path.read_bytes(), MappedFile(path)
    tensors = {name: mapped.tensor(info) for name, info in read_header(path).tensors.items()}
    with ReleasingPages([mapped]):
        copies = {name: torch.empty_like(tensor).copy_(tensor) for name, tensor in tensors.items()}
        clones = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in state:
        for found in (copies[name], clones[name], tensors[name]):
            assert torch.equal(found.reshape(-1).view(torch.uint8), state[name].reshape(-1).view(torch.uint8))
    tensors["f32"].zero_()
    assert path.read_bytes() == before


def test_a_tensor_that_was_written_to_keeps_what_was_written(state):
    path, _ = state
    mapped = MappedFile(path)
    tensor = mapped.tensor(read_header(path).tensors["f32"])
    tensor.fill_(7)
    with ReleasingPages([mapped]):
        copy = torch.empty_like(tensor).copy_(tensor)
    assert (copy == 7).all() and (tensor == 7).all()
