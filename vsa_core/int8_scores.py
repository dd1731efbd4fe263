"""What SageSLA makes of q, k and v: 8-bit integers with a scale per block, here multiplied out again.

Integers and their scales: thu-ml/SpargeAttn at bfd980b, spas_sage_attn/utils.py (get_vanilla_qk_quant) and its FP8
values. A score of two such operands is the integer product times both scales, so any kernel that is exact in float32
gives what an INT8 kernel gives, up to float32's rounding.
"""
from __future__ import annotations

import torch
from torch import Tensor

INT8_MAX = 127
SCALE_FLOOR = 1e-7
"""Added to every scale, so that a block of zeros has one."""
FP8_RANGE = 2.25
"""What the largest value of a channel becomes: 64 products with p below 448 then fit into float16."""


def int8_per_run(x: Tensor, rows: Tensor, run: int) -> tuple[Tensor, Tensor]:
    """(integers as float, scales), one scale per batch, head and run of rows.

    x: [B, S, H, D];  rows: `token_rows` of n runs, int32 [n * run]  ->  [B, S, H, D] and [B, n, 1, H, 1]. Rounds half
    away from zero; rows that are in no run give 0.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    is_token = rows >= 0
    slots = torch.where(is_token[:, None, None], x.index_select(1, rows.clamp(min=0)).to(dtype), 0)
    slots = slots.unflatten(1, (-1, run))                                            # [B, n, run, H, D]
    scales = slots.abs().amax((2, 4), keepdim=True) / INT8_MAX + SCALE_FLOOR
    quotient = slots / scales
    integers = (quotient.abs() + 0.5).floor_().clamp_(max=INT8_MAX).copysign_(quotient).flatten(1, 2)
    out = x.new_zeros(x.shape, dtype=dtype)
    out[:, rows[is_token].long()] = integers[:, is_token]
    return out, scales


def through_int8(x: Tensor, rows: Tensor, run: int) -> Tensor:
    """x [B, S, H, D] as INT8 holds it, in float32 (float64 for float64)."""
    integers, scales = int8_per_run(x, rows, run)
    is_token = rows >= 0
    run_of = torch.arange(rows.numel(), device=rows.device)[is_token] // run
    place = run_of.new_zeros(x.shape[1])
    place[rows[is_token].long()] = run_of
    return integers * scales[:, place, 0]


def through_fp8(x: Tensor) -> Tensor:
    """x [B, S, H, D] as float8_e4m3 holds it with one scale per batch, head and channel, in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scales = (wide.abs().amax(1, keepdim=True) / FP8_RANGE).clamp_(min=torch.finfo(torch.float32).tiny)
    return (wide / scales).to(torch.float8_e4m3fn).to(wide.dtype) * scales
