"""What a kernel should answer, in float64 and one query at a time, and how far an answer is from it.

Shares no code with the pack.
"""
from __future__ import annotations

import torch


def block_sparse_attention_oracle(q, k, v, indices, counts, block_sizes, scale):
    """out [B, Sq, H, D] and natural-log LSE [B, H, Sq], both float64. Operands as `kernels.block_sparse_attention`."""
    batch, slots, heads, dim = q.shape
    out = torch.zeros(batch, slots, heads, dim, dtype=torch.float64)
    lse = torch.full((batch, heads, slots), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for query in range(slots):
                row = query // 64
                blocks = indices[b, h, row, :int(counts[b, h, row])].tolist()
                keys = [block * 64 + slot for block in blocks for slot in range(int(block_sizes[block]))]
                if not keys:
                    continue
                logits = k[b, keys, h].double() @ q[b, query, h].double() * scale
                lse[b, h, query] = torch.logsumexp(logits, 0)
                out[b, query, h] = torch.softmax(logits, 0) @ v[b, keys, h].double()
    return out, lse


def worst_block_error(out, expected):
    """The largest relative L2 error of any (batch, head, query block); inf where a NaN is, or where 0 was wanted."""
    def blocks(x):
        return x.double().unflatten(1, (-1, 64)).permute(0, 3, 1, 2, 4).flatten(3)

    wanted = blocks(expected).norm(dim=-1)
    missed = (blocks(out) - blocks(expected)).norm(dim=-1)
    relative = torch.where(wanted > 0, missed / wanted, torch.where(missed == 0, 0.0, torch.inf))
    return relative.nan_to_num(nan=torch.inf, posinf=torch.inf).max().item()
