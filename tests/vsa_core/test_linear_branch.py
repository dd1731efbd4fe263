"""The linear branch by itself: what it adds up, and how little memory it takes for that."""
import pytest
import torch

from pack.vsa_core import linear_branch
from pack.vsa_core.linear_branch import add_linear, linear_state
from sla_oracle import linear_oracle, worst_run


def tensors(tokens=300, dtype=torch.float32):
    q, k, v = torch.randn(3, 2, tokens, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) / 8
    bias = torch.randn(64, generator=torch.Generator().manual_seed(2)) / 8
    return q, k, v, weight.to(dtype), bias.to(dtype)


def projecting(weight, bias):
    return lambda x: x @ weight.to(x.dtype).T + bias.to(x.dtype)


@pytest.mark.parametrize("feature", ["softmax", "elu", "relu"])
def test_the_projection_folded_into_the_sum_is_the_projection_of_every_token(feature):
    q, k, v, weight, bias = tensors(dtype=torch.float64)
    out = torch.zeros_like(q)
    add_linear(out, q, linear_state(k, v, projecting(weight, bias), feature), feature)
    assert worst_run(out, linear_oracle(q, k, v, weight, bias, feature)) <= 1e-12


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_the_size_of_a_chunk_changes_nothing(rows, monkeypatch):
    q, k, v, weight, bias = tensors()
    whole, cut = torch.zeros_like(q), torch.zeros_like(q)
    add_linear(whole, q, linear_state(k, v, projecting(weight, bias)))
    monkeypatch.setattr(linear_branch, "_CHUNK_BYTES", {"cpu": rows * 2 * 2 * 64 * 4})
    add_linear(cut, q, linear_state(k, v, projecting(weight, bias)))
    assert worst_run(cut, whole) <= 1e-5


def test_only_visible_keys_count():
    q, k, v, weight, bias = tensors()
    seen = torch.tensor([*range(5, 200), 250])
    out, wanted = torch.zeros_like(q), linear_oracle(q, k, v, weight, bias, "softmax", seen.tolist())
    k[:, 0] = torch.nan
    add_linear(out, q, linear_state(k, v, projecting(weight, bias), visible=seen))
    assert worst_run(out, wanted) <= 1e-5


def test_an_unknown_feature_map_is_named():
    q, k, v, weight, bias = tensors(8)
    with pytest.raises(ValueError, match="Unknown feature map: hedgehog; wanted one of softmax, elu, relu"):
        linear_state(k, v, projecting(weight, bias), "hedgehog")
