"""The kernels on a real GPU: the contract's case table, and the same bits a thousand times. Skipped without one."""
from __future__ import annotations

import pytest
import torch

from kernel_oracle import block_sparse_attention_oracle, worst_block_error
from pack.kernels import KERNELS, Call, block_sparse_attention, explain_kernels
from test_kernel_contract import BASE, CASES, GATES, HALVES, LAYOUTS, operands

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

COMPILED = [spec for spec in KERNELS if spec.files]
by_kernel = pytest.mark.parametrize("spec", COMPILED, ids=lambda spec: spec.name)


def on_gpu(tensors):
    """The same values, strides and poison on the GPU."""
    return tuple(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda").copy_(x) for x in tensors)


def attend(spec, tensors, scale):
    if reason := explain_kernels(Call.of(tensors[0]))[spec.name]:
        pytest.skip(f"{spec.name}: {reason}")
    return block_sparse_attention(*tensors, scale=scale, backend=spec.name, return_lse=True)


@by_kernel
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_a_kernel_agrees_with_the_oracle_in_every_query_block(spec, case, dtype, dim):
    from dataclasses import replace
    tensors, scale = operands(replace(case, dim=dim), dtype), dim ** -0.5
    out, lse = (x.cpu() for x in attend(spec, on_gpu(tensors), scale))
    expected, expected_lse = block_sparse_attention_oracle(*tensors, scale)
    assert worst_block_error(out, expected) <= GATES[dtype]
    seen = expected_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert (lse.double() - expected_lse)[seen].abs().max().item() <= 1e-3


@by_kernel
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_strides_do_not_change_a_bit(spec, layout):
    tensors = operands(BASE, torch.float16)
    wanted = attend(spec, on_gpu(tensors), 0.125)
    got = attend(spec, layout(*on_gpu(tensors)), 0.125)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@by_kernel
@pytest.mark.parametrize("dim", [64, 128])
def test_a_thousand_runs_give_the_same_bits(spec, dim):
    generator = torch.Generator("cuda").manual_seed(3)
    rows, heads = 61, 8
    q, k, v = (torch.randn(1, rows * 64, heads, dim, generator=generator, device="cuda").bfloat16() for _ in range(3))
    scores = torch.rand(1, heads, rows, rows, generator=generator, device="cuda")
    indices = scores.topk(17, -1).indices.sort(-1).values.int()
    indices[:, :, 1::4] = indices[:, :, :-1:4]                      # equal neighbours share their keys and values
    counts = torch.randint(0, 18, (1, heads, rows), generator=generator, device="cuda", dtype=torch.int32)
    counts[:, :, 1::4] = counts[:, :, :-1:4]
    sizes = torch.randint(1, 65, (rows,), generator=generator, device="cuda", dtype=torch.int32)
    tensors = q, k, v, indices, counts, sizes
    first = attend(spec, tensors, dim ** -0.5)
    expected, _ = block_sparse_attention_oracle(*(x.cpu() for x in tensors), dim ** -0.5)
    assert worst_block_error(first[0].cpu(), expected) <= GATES[torch.bfloat16]
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for got, wanted in zip(attend(spec, tensors, dim ** -0.5), first):
            differing += (got != wanted).any()
    assert differing.item() == 0
