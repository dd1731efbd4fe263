"""Tiny checkpoints of random numbers, written the ways models are published; no ComfyUI."""
import pytest
import torch

import make_checkpoints


@pytest.fixture(scope="session")
def state_dict():
    """A Wan of 3 layers and width 256 with gates, native names."""
    generator = torch.Generator().manual_seed(5)
    shapes = make_checkpoints.wan_shapes(layers=3, dim=256, ffn_dim=64, text_dim=64)
    return {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}


@pytest.fixture
def write(state_dict, tmp_path):
    """write(kind) -> the path to open."""
    return lambda kind, state=None: make_checkpoints.write(kind, state or state_dict, tmp_path)
