"""Sparse-linear attention with 8-bit scores: the integers, the scores of them, and what they cost."""
import math

import pytest
import torch

from pack.vsa_core.backends.sla import SageSLAAttentionImpl, SLAAttentionImpl, SLAAttentionMetadata
from pack.vsa_core.grid import TokenGrid
from pack.vsa_core.int8_scores import int8_per_run, through_fp8, through_int8
from pack.vsa_core.runs import run_rows
from sla_oracle import kept_lists, linear_oracle, runs_of, sla_oracle, worst_run


def integers_oracle(x, run):
    """(integers, scales) of one head [S, D], run after run, half away from zero."""
    integers, scales = torch.empty(x.shape, dtype=torch.float64), torch.empty(len(x), 1, dtype=torch.float64)
    for rows in runs_of(len(x), run):
        scale = float(x[rows].abs().max()) / 127 + 1e-7
        quotient = x[rows] / scale
        integers[rows] = torch.sign(quotient) * (quotient.abs() + 0.5).floor()
        scales[rows] = scale
    return integers, scales


def sage_oracle(q, k, v, ratio, query_run=128):
    """The sparse branch with integer scores, from its definition, for tensors without other tokens."""
    lists, keys, out = kept_lists(q, k, ratio, query_run)[0], runs_of(q.shape[1], 64), torch.empty(q.shape).double()
    for (b, h, i), kept in lists.items():
        rows, seen = runs_of(q.shape[1], query_run)[i], [token for j in kept for token in keys[j]]
        (q_int, q_scale), (k_int, k_scale) = (integers_oracle(x, run) for x, run in (
            (q[b, :, h].double(), query_run), (k[b, :, h].double() - k[b, :, h].double().mean(0), 64)))
        scores = (q_int[rows] @ k_int[seen].T) * q_scale[rows] * k_scale[seen].T * q.shape[-1] ** -0.5
        out[b, rows, h] = scores.softmax(-1) @ v[b, seen, h].double()
    return out


def noise(tokens, heads=2, dim=64, dtype=torch.float32, seed=0):
    return torch.randn(3, 1, tokens, heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def smooth(tokens, heads=2, dim=64):
    """Channels that change slowly from token to token, as in a clip."""
    generator = torch.Generator().manual_seed(3)
    places = torch.arange(tokens)[:, None, None] * torch.rand(heads, dim, generator=generator) * 0.02
    phases = torch.rand(3, heads, dim, generator=generator) * 6
    return torch.stack([(places + phase).sin() for phase in phases])[:, None]


def sage(q, k, v, ratio=0.3, **options):
    impl = SageSLAAttentionImpl(q.shape[2], q.shape[3], projects=False, **options)
    return impl.attend(q, k, v, SLAAttentionMetadata(0, ratio))


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("run", [64, 128])
@pytest.mark.parametrize("tokens", [1, 64, 130, 400])
def test_integers_and_scales_are_the_definitions(tokens, run):
    x = noise(tokens)[0]
    integers, scales = int8_per_run(x, run_rows(tokens, run), run)
    for h in range(2):
        wanted, wanted_scales = integers_oracle(x[0, :, h].double(), run)
        # A quotient that float32 rounds across a half differs by one.
        differs = (integers[0, :, h] - wanted).abs()
        assert differs.max() <= 1 and differs.sum() <= 2 and integers.abs().max() <= 127
        assert relative(scales[0, :, 0, h, 0].repeat_interleave(run)[:tokens], wanted_scales[:, 0]) <= 1e-6


def test_halves_round_away_from_zero():
    x = torch.zeros(1, 64, 1, 64)
    x[0, 0, 0, :6] = torch.tensor([127.0, 2.5, -2.5, 0.5, -0.5, 1.49])
    x *= 1 + 127e-7 / 127            # the scale is then 1 to the last digit
    x[0, 0, 0, 0] = 127 * (1 - 1e-7)
    found = int8_per_run(x, run_rows(64, 64), 64)[0][0, 0, 0, :6]
    assert found.tolist() == [127, 3, -3, 1, -1, 1]


@pytest.mark.parametrize("content", ["zeros", "constant", "one outlier", "a short run"])
def test_the_integers_give_every_kind_of_block_back_within_half_a_step(content):
    x = noise(70 if content == "a short run" else 128)[0]
    if content == "zeros":
        x[:, :64] = 0
    elif content == "constant":
        x[:] = -3.25
    elif content == "one outlier":
        x[0, 5, 0, 7] = 900.0
    back = through_int8(x, run_rows(x.shape[1], 64), 64)
    for h in range(2):
        for rows in runs_of(x.shape[1], 64):
            step = float(x[0, rows, h].abs().max()) / 127 + 1e-7
            assert float((back - x)[0, rows, h].abs().max()) <= step / 2 * (1 + 1e-5)


def test_fp8_values_keep_three_bits_behind_the_first():
    x = noise(300)[0]
    back = through_fp8(x)
    big = x.abs() > 0.02 * x.abs().amax(1, keepdim=True)
    assert float(((back - x).abs() / x.abs())[big].max()) <= 2 ** -4 * (1 + 1e-5) and not through_fp8(x * 0).any()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-3), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize(("tokens", "dim"), [(64, 64), (700, 64), (600, 128)])
def test_it_is_the_integers_attention(tokens, dim, dtype, bound):
    """In float32 a quotient beside a half may become the other integer, which moves a run by some 1e-4."""
    q, k, v = noise(tokens, dim=dim, dtype=dtype)
    assert worst_run(sage(q, k, v), sage_oracle(q, k, v, 0.3)) <= bound


@pytest.mark.parametrize(("make", "bound", "with_values"), [(noise, 2e-2, 5e-2), (smooth, 5e-3, 2e-2)])
def test_8_bits_cost_about_what_they_should(make, bound, with_values):
    q, k, v = make(1024)
    exact = SLAAttentionImpl(2, 64, projects=False).attend(q, k, v, SLAAttentionMetadata(0, 0.3))
    assert 1e-4 < relative(sage(q, k, v), exact) <= bound
    assert relative(sage(q, k, v), exact) < relative(sage(q, k, v, fp8_values=True), exact) <= with_values


def test_an_offset_that_all_keys_share_costs_nothing():
    q, k, v = noise(700)
    assert relative(sage(q, k + 30, v), sage(q, k, v)) <= 1e-2


def test_the_linear_branch_and_the_lists_are_those_of_sla():
    q, k, v = noise(500)
    impl = SageSLAAttentionImpl(2, 64)
    torch.nn.init.normal_(impl.proj_l.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = impl.attend(q, k, v, SLAAttentionMetadata(0, 0.3)) - sage(q, k, v)
    weight, bias = impl.proj_l.weight.detach(), impl.proj_l.bias.detach()
    assert worst_run(found, linear_oracle(q, k, v, weight, bias, "softmax")) <= 1e-4


def test_hidden_tokens_touch_no_scale_and_no_mean():
    q, k, v = noise(406)
    k[:, 401] = math.nan
    grid = TokenGrid((4, 10, 10), suffix=6, hidden=(1,))
    found = SageSLAAttentionImpl(2, 64, projects=False).attend(q, k, v, SLAAttentionMetadata(0, 1.0, grid))
    k[:, 401] = 0
    wanted = sla_oracle(q, k, v, 1.0, 128, video=400, hidden=[401])
    assert relative(found, wanted) <= 2e-2


def test_a_kernel_that_has_no_8_bit_scores_is_refused():
    with pytest.raises(ValueError, match="found backend 'triton' for 8-bit scores: wanted auto or reference"):
        SageSLAAttentionImpl(2, 64, backend="triton")


@pytest.mark.parametrize("dim", [64, 80, 128])
def test_any_head_size_runs_without_spargeattn(dim):
    q, k, v = noise(130, dim=dim)
    assert torch.isfinite(sage(q, k, v)).all() and SageSLAAttentionImpl(2, dim).topk_ratio == 0.5
