"""Other people's attention on the same problem. Each entry gives a function to time, or says why it cannot run here.

Signatures read in fastvideo-kernel 0.3.5, flashinfer-python 0.7.2 and comfy-kitchen 0.2.40; SageAttention's is the one
that ComfyUI 0.30 calls.
"""
from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from block_problem import BLOCK, Problem, tile_sizes


class Peer(NamedTuple):
    """`prepare(problem)` does what depends on shapes and lists only and returns what is timed, [1, S, H, D]."""

    name: str
    prepare: Callable[[Problem], Callable[[], torch.Tensor]]
    package: str | None = None
    dense: bool = False
    own_selection: bool = False
    """Chooses blocks by itself: its error against the given lists means nothing."""


def absent(peer: Peer) -> str | None:
    if peer.package and importlib.util.find_spec(peer.package) is None:
        return f"{peer.package} is not installed"
    return None


def heads_first(problem: Problem):
    return (x.transpose(1, 2).contiguous() for x in (problem.q, problem.k, problem.v))


def valid_slots(problem: Problem) -> torch.Tensor:
    return (torch.arange(BLOCK, device=problem.q.device) < problem.sizes[:, None]).flatten()


def dense(attend: Callable[..., torch.Tensor]):
    """What prepares an attention of q, k and v [1, H, tokens, D] to all pairs, which needs no padding."""
    def prepare(problem):
        valid = valid_slots(problem)
        q, k, v = (x[:, :, valid].contiguous() for x in heads_first(problem))
        out = torch.zeros_like(problem.q)

        def run():
            return attend(q, k, v)

        run.in_tiles = lambda result: out.index_copy_(1, valid.nonzero().flatten(), result.transpose(1, 2))
        return run
    return prepare


def sdpa(backend: str):
    def attend(q, k, v):
        from torch.nn.attention import SDPBackend, sdpa_kernel
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return dense(attend)


def sage(q, k, v):
    from sageattention import sageattn
    return sageattn(q, k, v, tensor_layout="HND", is_causal=False)


def int8_attention(q, k, v):
    import comfy_kitchen
    return comfy_kitchen.int8_attention(q, k, v)


@lru_cache
def is_valid(grid, device):
    """The function that FlexAttention masks padding with: one per grid, since it compiles anew for another one."""
    sizes = torch.tensor(tile_sizes(grid), dtype=torch.int32, device=device)
    return lambda batch, head, query, key: key % BLOCK < sizes[key // BLOCK]


def flex_attention(problem):
    from torch.nn.attention.flex_attention import BlockMask, flex_attention
    q, k, v = heads_first(problem)
    slots = problem.q.shape[1]
    padded = torch.zeros(*problem.indices.shape[:3], len(problem.sizes), dtype=torch.int32, device=q.device)
    padded[..., :problem.indices.shape[-1]] = problem.indices
    mask = BlockMask.from_kv_blocks(problem.counts, padded, BLOCK_SIZE=BLOCK,
                                    mask_mod=is_valid(problem.shape.grid, q.device), seq_lengths=(slots, slots))
    compiled = torch.compile(flex_attention, dynamic=False)
    options = {"BLOCK_M": BLOCK, "BLOCK_N": BLOCK}           # its own choice does not divide blocks of 64
    return lambda: compiled(q, k, v, block_mask=mask, kernel_options=options).transpose(1, 2)


def fastvideo(operator: str):
    def prepare(problem):
        q, k, v = heads_first(problem)
        # By its full name: the package has a function of the module's name.
        run = getattr(importlib.import_module("fastvideo_kernel.block_sparse_attn"), operator)
        return lambda: run(q, k, v, problem.indices, problem.counts, problem.sizes)[0].transpose(1, 2)
    return prepare


def flashinfer(problem):
    import flashinfer
    q, k, v = (x[0] for x in heads_first(problem))
    heads, blocks = problem.shape.heads, len(problem.sizes)
    chosen = torch.zeros(heads, blocks, blocks, dtype=torch.bool, device=q.device)
    chosen.scatter_(2, problem.indices[0].long(), True)
    valid = valid_slots(problem)
    q, k, v = (x[:, valid].contiguous() for x in (q, k, v))
    sizes = problem.sizes.expand(heads, -1).contiguous()
    wrapper = flashinfer.VariableBlockSparseAttentionWrapper(
        torch.empty(512 << 20, dtype=torch.uint8, device=q.device))
    wrapper.plan(chosen, sizes, sizes, heads, heads, problem.shape.dim, q_data_type=q.dtype)
    out = torch.zeros_like(problem.q)

    def run():
        return wrapper.run(q, k, v)

    run.in_tiles = lambda result: out.index_copy_(1, valid.nonzero().flatten(), result.transpose(0, 1)[None])
    return run


def sol_attn(problem):
    import comfy_kitchen
    ratio = problem.indices.shape[-1] / len(problem.sizes)
    return lambda: comfy_kitchen.sol_attn(problem.q, problem.k, problem.v, topk_ratio=ratio, tail=False,
                                          block_len=problem.sizes)


PEERS = (
    Peer("dense SDPA, cuDNN", sdpa("CUDNN_ATTENTION"), dense=True),
    Peer("dense SDPA, FlashAttention", sdpa("FLASH_ATTENTION"), dense=True),
    Peer("SageAttention", dense(sage), "sageattention", dense=True),
    Peer("comfy-kitchen int8_attention", dense(int8_attention), "comfy_kitchen", dense=True),
    Peer("FlexAttention, same lists", flex_attention),
    Peer("fastvideo-kernel, Triton", fastvideo("block_sparse_attn_triton"), "fastvideo_kernel"),
    Peer("fastvideo-kernel, ThunderKittens", fastvideo("block_sparse_attn_sm90"), "fastvideo_kernel"),
    Peer("FlashInfer, block-sparse", flashinfer, "flashinfer"),
    Peer("comfy-kitchen sol_attn, INT8", sol_attn, "comfy_kitchen", own_selection=True),
)
