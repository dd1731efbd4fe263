"""Executes a selection of key blocks: one public op over a table of kernels, best first.

A selection is, for every block of 64 query slots, an ascending list of key blocks and its length. How the
list came about, and what the tokens are, is not this package's business.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial

import torch

from . import cuda_sm90, far_start, gathered, reference, reference_int8, tile_ops, triton
from .choice import AUTO, choose, refusal
from .contest import Contest, Span
from .namespace import NAMESPACE
from .no_backward import refuse_backward
from .proofs import PROOFS, PROVE_COMMAND, words
from .spec import BLOCK, Call, KernelSpec, KernelUnusable, NoKernel, listed
from .tile_grid import TileGrid
from .tile_ops import select_tiles, tile_means

__all__ = ["BLOCK", "KERNELS", "AUTO", "EXACT", "INT8_KERNELS", "INT8_SCORES", "PRECISIONS", "PROOFS", "PROVE_COMMAND",
           "Call", "Contest", "KernelSpec", "KernelUnusable", "NoKernel", "Span", "TileGrid", "backend_list",
           "block_sparse_attention", "choose_kernel", "explain_kernels", "listed", "proof_words", "prove_kernels",
           "select_tiles", "tile_means"]

KERNELS: tuple[KernelSpec, ...] = (cuda_sm90.SPEC, triton.SPEC, triton.INT8_SPEC, reference_int8.SPEC, reference.SPEC)
INT8_KERNELS = tuple(spec.name for spec in KERNELS if not spec.exact)
PRECISIONS = EXACT, INT8_SCORES = "exact", "int8 scores"
"""What "auto" may take: kernels that are exact up to the rounding of the model's dtype, or those too whose scores are
products of 8-bit integers, which then come first."""


def explain_kernels(call: Call, auto: bool = False) -> dict[str, str | None]:
    """For every kernel in the order of preference: None if it may run `call`, else the reason why not. Runs nothing."""
    return {spec.name: refusal(spec, call, PROOFS, auto) for spec in KERNELS}


def proof_words(name: str, call: Call) -> str:
    """What the kernel of that name has shown on the card of `call`; empty where nothing had to be or has been."""
    spec = next((spec for spec in KERNELS if spec.name == name), None)
    found = PROOFS.known(spec, call) if spec is not None and spec.files else None
    return "" if found is None else f"{words(found)} on this {call.card}, {found.date}"


def backend_list(call: Call, backend: str = AUTO, failed: dict[str, str] | None = None,
                 precision: str = EXACT) -> list[str]:
    """One line per kernel in the order of preference: that it can run `call` or why not, what it has shown on this
    card, and where its code came from.

    backend: what the user chose; a named kernel may run where "auto" passes over it.   failed: as `choose_kernel`'s.
    precision: kernels that are not exact are listed where it asks for them, or one is named.
    """
    lines, rounds = [], precision == INT8_SCORES
    for spec in KERNELS:
        if not (spec.exact or rounds or spec.name == backend):
            continue
        reason = (failed or {}).get(spec.name) or refusal(spec, call, PROOFS, spec.name != backend, rounds)
        facts = [fact for fact in ("" if reason else proof_words(spec.name, call), spec.origin()) if fact]
        known = f" ({'; '.join(facts)})" if facts else ""
        lines.append(f"{spec.name}: {reason or 'can run'}{known}")
    return lines


def choose_kernel(call: Call, backend: str = AUTO, exclude: dict[str, str] | None = None,
                  announce: Callable[[str], object] | None = None, precision: str = EXACT) -> KernelSpec:
    """The first kernel that runs `call` and is right on its card, or the one that `backend` names.

    precision: one of PRECISIONS, for "auto".

    A kernel that has not been proven on the card is proven now. exclude: kernels not to take, with the reason (one
    that failed earlier in this run).   announce: told a sentence before a proof is made.
    Raises ValueError for a name that is not in the table, NoKernel with every reason when none can run.
    """
    names = [spec.name for spec in KERNELS]
    if backend != AUTO and backend not in names:
        raise ValueError(f"unknown kernel {backend!r}: wanted {AUTO!r} or one of {', '.join(names)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: wanted {' or '.join(PRECISIONS)}")
    return choose(KERNELS, call, PROOFS, backend, exclude, announce, precision == INT8_SCORES)


def prove_kernels(call: Call, backend: str = AUTO, announce: Callable[[str], object] | None = None,
                  precision: str = EXACT) -> KernelSpec:
    """`choose_kernel`, and the kernels of tile means and selections that will run beside it are proven as well; so is
    the exact kernel that one which is not will be compared with, where there is one."""
    spec = choose_kernel(call, backend, announce=announce, precision=precision)
    if not spec.exact:
        with contextlib.suppress(NoKernel):
            choose_kernel(call, announce=announce)
    tile_ops.prove_beside(spec.name, call, announce)
    return spec


def block_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    indices: torch.Tensor, counts: torch.Tensor, block_sizes: torch.Tensor,
    scale: float | None = None, backend: str = AUTO, return_lse: bool = False,
    token_rows: torch.Tensor | None = None, gate: torch.Tensor | None = None, coarse: torch.Tensor | None = None,
    blocks_per_tile: int = 1, tile_grid: Sequence[int] | None = None, far: torch.Tensor | None = None,
    far_lse: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of every query block over its own list of key blocks.

    q: [B, Sq, H, D], k and v: [B, Skv, H, D], any strides with D contiguous; Sq = Nq*64 and Skv = Nkv*64.
    indices: int32 [B, H, Nq, K], ascending in the first `counts` entries of a row; the rest is never read.
    counts: int32 [B, H, Nq], 0..K; not checked, a larger one reads past the row.
    block_sizes: int32 [Nkv], valid keys at the start of every block, 0..64.
    scale: softmax scale, D**-0.5 when None.   backend: "auto" or the name of a kernel in KERNELS.
    Returns out [B, Sq, H, D] in q's dtype, contiguous, and with return_lse also the natural log of the sum of
    exponentials, float32 [B, H, Sq]. A row that sees no key gives 0 and -inf. Queries in padding slots are
    computed like any other. A NaN in a query stays in its own row.

    token_rows: int32 [slots], the row of q, k and v that lies in every slot of the blocks, -1 for padding; every row
    in exactly one slot, not checked. Then q, k, v, out and the LSE are in the order of the sequence, any length S;
    Nq = Nkv = slots/64, and indices and counts may stop early: query blocks behind them attend to every block.
    gate: [B, S, H, D], strided like q, and coarse: float32 [B, H, N, D] (float64 for float64), only with token_rows:
    out is the attention plus gate * coarse[block // blocks_per_tile], unchanged where N*blocks_per_tile <= block.
    tile_grid: the seven numbers of a `TileGrid` where token_rows and lists are what it promises, not checked; without
    it a kernel that reads tiles as boxes is given copies.
    far: float32 [B, H, N, D], far_lse: float32 [B, H, N] (float64 for float64): what the queries of block
    // blocks_per_tile have seen besides their lists, as a mean of values and the natural log of their sum of
    exponentials. Their softmax starts there, so both results hold it, also where a list is empty. -inf: nothing, and
    its row of far is not read. Only for blocks that have a list; of calls whose results are merged by their LSE, one.

    A GPU kernel is proven on the card before its first use there (`proofs.py`); "auto" passes over one that fails.
    Raises ValueError for operands that break this contract, NoKernel when no kernel can run them or the one that
    `backend` names has failed its proof, KernelUnusable when it cannot be loaded.
    """
    check_operands(q, k, v, indices, counts, block_sizes, token_rows, gate, coarse, blocks_per_tile, tile_grid, far,
                   far_lse)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    out, lse = _block_sparse_attention(q, k, v, indices, counts, block_sizes, scale, backend, return_lse,
                                       token_rows, gate, coarse, blocks_per_tile,
                                       None if tile_grid is None else list(tile_grid), far, far_lse)
    return (out, lse) if return_lse else out


def check_operands(q, k, v, indices, counts, block_sizes, token_rows=None, gate=None, coarse=None,
                   blocks_per_tile=1, tile_grid=None, far=None, far_lse=None) -> None:
    """Raise ValueError unless shapes, dtypes and devices fit the contract. Looks at no tensor's values."""
    def fail(found: str, wanted: str):
        raise ValueError(f"block_sparse_attention: found {found}, wanted {wanted}")

    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            fail(f"{name} {list(x.shape)}", "[batch, sequence, heads, head_dim]")
        if token_rows is None and x.shape[1] % BLOCK:
            fail(f"{name} of {x.shape[1]} slots", f"a multiple of {BLOCK}")
        if x.dtype != q.dtype or x.device != q.device:
            fail(f"{name} in {x.dtype} on {x.device}", f"q's {q.dtype} on {q.device}")
        if x.stride(3) != 1 and x.shape[3] > 1:
            fail(f"{name} with head_dim stride {x.stride(3)}", "head_dim contiguous (stride 1)")
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2:] != q.shape[2:]:
        fail(f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}",
             "k and v of one shape, with q's batch, heads and head_dim")
    if token_rows is not None:
        if invalid := gathered.why_invalid(q, k, v, indices, counts, block_sizes, token_rows, gate, coarse,
                                           blocks_per_tile, tile_grid, far):
            fail(*invalid)
    elif gate is not None or coarse is not None or tile_grid is not None:
        fail("gate, coarse or tile_grid without token_rows", "token_rows too")
    else:
        batch, slots, heads, _ = q.shape
        rows = (batch, heads, slots // BLOCK)
        if indices.ndim != 4 or tuple(indices.shape[:3]) != rows:
            fail(f"indices {list(indices.shape)}", f"[{', '.join(map(str, rows))}, K]")
        if tuple(counts.shape) != rows:
            fail(f"counts {list(counts.shape)}", f"{list(rows)}")
        if tuple(block_sizes.shape) != (k.shape[1] // BLOCK,):
            fail(f"block_sizes {list(block_sizes.shape)}", f"[{k.shape[1] // BLOCK}]")
    if invalid := far_start.why_invalid(q, indices.shape[2], far, far_lse, blocks_per_tile):
        fail(*invalid)
    integers = (("indices", indices), ("counts", counts), ("block_sizes", block_sizes), ("token_rows", token_rows))
    for name, x in integers:
        if x is not None and (x.dtype != torch.int32 or x.device != q.device):
            fail(f"{name} in {x.dtype} on {x.device}", f"int32 on {q.device}")


@torch.library.custom_op(f"{NAMESPACE}::block_sparse_attention", mutates_args=(), schema=(
    "(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, Tensor block_sizes, float scale, str backend, "
    "bool return_lse, Tensor? token_rows=None, Tensor? gate=None, Tensor? coarse=None, SymInt blocks_per_tile=1, "
    "SymInt[]? tile_grid=None, Tensor? far=None, Tensor? far_lse=None) -> (Tensor, Tensor)"))
def _block_sparse_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, indices: torch.Tensor, counts: torch.Tensor,
    block_sizes: torch.Tensor, scale: float, backend: str, return_lse: bool,
    token_rows: torch.Tensor | None = None, gate: torch.Tensor | None = None, coarse: torch.Tensor | None = None,
    blocks_per_tile: int = 1, tile_grid: Sequence[int] | None = None, far: torch.Tensor | None = None,
    far_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    grid = None if tile_grid is None else TileGrid(*tile_grid)
    # Here, where torch.compile does not look: the choice reads what happened earlier in this process.
    failed: dict[str, str] = {}
    while True:
        spec = choose_kernel(Call.of(q), backend, failed)
        try:
            run = spec.load() if spec.gathers(grid) else partial(gathered.on_copies, spec.load())
            out, lse = run(q, k, v, indices, counts, block_sizes, scale, return_lse, token_rows, gate, coarse,
                           blocks_per_tile, grid, far, far_lse)
            return out, q.new_empty(0, dtype=torch.float32) if lse is None else lse
        except KernelUnusable as error:                    # proven, but it cannot be loaded now
            if backend != AUTO:
                raise
            failed[spec.name] = str(error)


@_block_sparse_attention.register_fake
def _(q, k, v, indices, counts, block_sizes, scale, backend, return_lse,
      token_rows=None, gate=None, coarse=None, blocks_per_tile=1, tile_grid=None, far=None, far_lse=None):
    batch, slots, heads, _ = q.shape
    lse = (batch, heads, slots) if return_lse else (0,)
    return q.new_empty(q.shape), q.new_empty(lse, dtype=torch.float32)


refuse_backward(_block_sparse_attention, "block_sparse_attention")
