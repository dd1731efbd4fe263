"""The kernels on a real GPU: the contract's case table, and the same bits a thousand times. Rehearsed without one."""
from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernel_oracle import block_sparse_attention_oracle, worst_block_error
from on_gpu import HERE, REHEARSED, by_kernel, cases, need, to_device
from pack.kernels import block_sparse_attention
from test_kernel_contract import BASE, CASES, GATES, HALVES, LAYOUTS, operands

pytestmark = pytest.mark.gpu


def attend(spec, tensors, scale):
    need(spec, tensors[0].dtype, tensors[0].shape[-1])
    return block_sparse_attention(*tensors, scale=scale, backend=spec.name, return_lse=True)


@by_kernel
@pytest.mark.parametrize("dtype", cases(HALVES), ids=str)
@pytest.mark.parametrize("dim", cases([64, 128]))
@pytest.mark.parametrize("case", cases(CASES), ids=lambda case: case.why)
def test_a_kernel_agrees_with_the_oracle_in_every_query_block(spec, case, dtype, dim):
    tensors, scale = operands(replace(case, dim=dim), dtype), dim ** -0.5
    out, lse = (x.cpu() for x in attend(spec, [to_device(x) for x in tensors], scale))
    expected, expected_lse = block_sparse_attention_oracle(*tensors, scale)
    assert worst_block_error(out, expected) <= GATES[dtype]
    seen = expected_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert (lse.double() - expected_lse)[seen].abs().max().item() <= 1e-3


@by_kernel
@pytest.mark.parametrize("layout", cases(LAYOUTS.values()), ids=cases(LAYOUTS))
def test_strides_do_not_change_a_bit(spec, layout):
    tensors = [to_device(x) for x in operands(BASE, torch.float16)]
    wanted = attend(spec, tensors, 0.125)
    got = attend(spec, layout(*tensors), 0.125)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@by_kernel
@pytest.mark.parametrize("dim", cases([64, 128]))
def test_a_thousand_runs_give_the_same_bits(spec, dim):
    generator = torch.Generator(HERE).manual_seed(3)
    rows, heads, runs = (9, 2, 3) if REHEARSED else (61, 8, 1000)
    q, k, v = (torch.randn(1, rows * 64, heads, dim, generator=generator, device=HERE).bfloat16() for _ in range(3))
    scores = torch.rand(1, heads, rows, rows, generator=generator, device=HERE)
    indices = scores.topk(min(rows, 17), -1).indices.sort(-1).values.int()
    indices[:, :, 1::4] = indices[:, :, :-1:4]                      # equal neighbours share their keys and values
    counts = torch.randint(0, indices.shape[3] + 1, (1, heads, rows), generator=generator, device=HERE,
                           dtype=torch.int32)
    counts[:, :, 1::4] = counts[:, :, :-1:4]
    sizes = torch.randint(1, 65, (rows,), generator=generator, device=HERE, dtype=torch.int32)
    tensors = q, k, v, indices, counts, sizes
    first = attend(spec, tensors, dim ** -0.5)
    expected, _ = block_sparse_attention_oracle(*(x.cpu() for x in tensors), dim ** -0.5)
    assert worst_block_error(first[0].cpu(), expected) <= GATES[torch.bfloat16]
    differing = torch.zeros((), dtype=torch.int64, device=HERE)
    for _ in range(runs):
        for got, wanted in zip(attend(spec, tensors, dim ** -0.5), first):
            differing += (got != wanted).any()
    assert differing.item() == 0
