"""What comes before the attention: means of tiles, and the lists of the tiles that score highest.

Two ops over a table of kernels each, like `block_sparse_attention`, but these always run: the last kernel of a table
is torch and takes every call, so a GPU kernel that is absent or wrong on this card only costs time.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from . import reference, reference_tiles, triton
from .choice import AUTO, choose
from .namespace import NAMESPACE
from .no_backward import refuse_backward
from .proofs import PROOFS
from .spec import BLOCK, Call, KernelSpec, KernelUnusable

MEANS_KERNELS: tuple[KernelSpec, ...] = (triton.MEANS_SPEC, reference_tiles.MEANS_SPEC)
SELECT_KERNELS: tuple[KernelSpec, ...] = (triton.SELECT_SPEC, reference_tiles.SELECT_SPEC)


def tile_means(parts: tuple[Tensor, ...], token_rows: Tensor, tiles: int, blocks_per_tile: int = 1,
               backend: str = "auto") -> tuple[Tensor, ...]:
    """The mean of every tile's tokens, of one to three tensors in one pass, accumulated in float32.

    parts: [B, S, H, D] each, one shape, dtype and device, any strides with D contiguous.
    token_rows: int32 [slots], as in `block_sparse_attention`; tile n owns the slots of its `blocks_per_tile` blocks
    and its tokens are the rows there that are not -1.   -> float32 [B, H, tiles, D] each (float64 for float64)
    backend: that of the attention, or the name of a kernel in MEANS_KERNELS: see `choose_beside`.
    Raises ValueError for operands that break this contract, NoKernel where `choose_beside` does.
    """
    def fail(found, wanted):
        raise ValueError(f"tile_means: found {found}, wanted {wanted}")

    if not 1 <= len(parts) <= 3:
        fail(f"{len(parts)} tensors", "1 to 3")
    first = parts[0]
    for x in parts:
        if x.ndim != 4 or x.shape != first.shape or x.dtype != first.dtype or x.device != first.device:
            fail(f"{list(x.shape)} in {x.dtype} on {x.device}", "tensors [B, S, H, D] of one shape, dtype and device")
        if x.stride(3) != 1 and x.shape[3] > 1:
            fail(f"head_dim stride {x.stride(3)}", "head_dim contiguous (stride 1)")
    if token_rows.dtype != torch.int32 or token_rows.device != first.device or not token_rows.is_contiguous():
        fail(f"token_rows in {token_rows.dtype} on {token_rows.device}", f"contiguous int32 on {first.device}")
    if tiles < 1 or blocks_per_tile < 1 or token_rows.ndim != 1 or tiles * blocks_per_tile * BLOCK > len(token_rows):
        fail(f"{tiles} tiles of {blocks_per_tile} blocks in {list(token_rows.shape)} slots", "as many slots")
    return _tile_means(list(parts), token_rows, tiles, blocks_per_tile, backend).unbind(0)


def select_tiles(query_means: Tensor, key_means: Tensor, k: int, scale: float, blocks_per_tile: int = 1,
                 always: int = 0, backend: str = "auto") -> Tensor:
    """The lists of the k key tiles with the highest query_mean . key_mean * scale, for every block of a query tile.

    query_means: [B, H, Nq, D], key_means: [B, H, Nk, D]  ->  int32 [B, H, Nq*m, k*m + always], m = blocks_per_tile:
    ascending the m blocks of every kept tile, then the `always` blocks after the last tile.
    Exactly k tiles per row; equal scores go to the lower index; NaN counts as the lowest score. backend: `tile_means`.
    Raises ValueError for operands that break this contract.
    """
    def fail(found, wanted):
        raise ValueError(f"select_tiles: found {found}, wanted {wanted}")

    for name, x in (("query_means", query_means), ("key_means", key_means)):
        if x.ndim != 4 or x.shape[:2] != query_means.shape[:2] or x.shape[3] != query_means.shape[3]:
            fail(f"{name} {list(x.shape)}", "[B, H, tiles, D] with the batch, heads and head_dim of query_means")
        if x.dtype != query_means.dtype or x.device != query_means.device:
            fail(f"{name} in {x.dtype} on {x.device}", f"{query_means.dtype} on {query_means.device}")
    if not 1 <= k <= key_means.shape[2]:
        fail(f"k {k}", f"1 to {key_means.shape[2]}")
    if blocks_per_tile < 1 or always < 0:
        fail(f"{blocks_per_tile} blocks per tile and {always} always", "at least 1 and 0")
    return _select_tiles(query_means, key_means, k, float(scale), blocks_per_tile, always, backend)


def choose_beside(table: tuple[KernelSpec, ...], call: Call, backend: str = AUTO, exclude: dict[str, str] | None = None,
                  announce: Callable[[str], object] | None = None) -> KernelSpec:
    """The first kernel that is right on this card, or the one of the table that `backend` names; beside the
    attention kernel "reference" torch's.

    Raises NoKernel when a kernel of the table that is named cannot run or has failed its proof.
    """
    if backend == reference.SPEC.name:
        return table[-1]
    named = backend if any(spec.name == backend for spec in table) else AUTO
    return choose(table, call, PROOFS, named, exclude, announce)


def prove_beside(backend: str, call: Call, announce: Callable[[str], object] | None = None) -> None:
    """Make the proofs that tile means and selections beside an attention kernel will need for such calls."""
    choose_beside(MEANS_KERNELS, call, backend, announce=announce)
    choose_beside(SELECT_KERNELS, replace(call, dtype=torch.float32), backend, announce=announce)


def _run(table, call, backend, exclude, operands):
    while True:
        spec = choose_beside(table, call, backend, exclude)
        try:
            return spec.load()(*operands)
        except KernelUnusable as error:                    # proven, but it cannot be loaded now
            exclude = {**exclude, spec.name: str(error)}


@torch.library.custom_op(f"{NAMESPACE}::tile_means", mutates_args=(), schema=(
    "(Tensor[] parts, Tensor token_rows, SymInt tiles, SymInt blocks_per_tile, str backend) -> Tensor"))
def _tile_means(parts: list[Tensor], token_rows: Tensor, tiles: int, blocks_per_tile: int, backend: str) -> Tensor:
    return _run(MEANS_KERNELS, Call.of(parts[0]), backend, {}, (parts, token_rows, tiles, blocks_per_tile))


@_tile_means.register_fake
def _(parts, token_rows, tiles, blocks_per_tile, backend):
    batch, _, heads, dim = parts[0].shape
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    return parts[0].new_empty((len(parts), batch, heads, tiles, dim), dtype=dtype)


refuse_backward(_tile_means, "tile_means")


@torch.library.custom_op(f"{NAMESPACE}::select_tiles", mutates_args=(), schema=(
    "(Tensor query_means, Tensor key_means, SymInt k, float scale, SymInt blocks_per_tile, SymInt always, str backend) "
    "-> Tensor"))
def _select_tiles(query_means: Tensor, key_means: Tensor, k: int, scale: float, blocks_per_tile: int, always: int,
                  backend: str) -> Tensor:
    keys = key_means.shape[2]
    too_long = {triton.SELECT_SPEC.name: f"{keys} tiles, at most {triton.MAX_TILES}"} if keys > triton.MAX_TILES else {}
    return _run(SELECT_KERNELS, Call.of(query_means), backend, too_long,
                (query_means, key_means, k, scale, blocks_per_tile, always))


@_select_tiles.register_fake
def _(query_means, key_means, k, scale, blocks_per_tile, always, backend):
    batch, heads, queries, _ = query_means.shape
    return query_means.new_empty((batch, heads, queries * blocks_per_tile, k * blocks_per_tile + always),
                                 dtype=torch.int32)
