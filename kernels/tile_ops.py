"""What comes before the attention: means of tiles, and the lists of the tiles that score highest.

Two ops over a table of kernels each, like `block_sparse_attention`, but these always run: the last kernel of a table
is torch and takes every call, so an unproven or absent GPU kernel only costs time.
"""
from __future__ import annotations

import torch
from torch import Tensor

from . import cuda_sm90, reference, reference_tiles, self_test, triton
from .spec import BLOCK, Call, KernelSpec, KernelUnusable, NoKernel

ATTENTION: tuple[KernelSpec, ...] = (cuda_sm90.SPEC, triton.SPEC)
"""The attention kernels that those below may have to keep up with."""
MEANS_KERNELS: tuple[KernelSpec, ...] = (triton.MEANS_SPEC, reference_tiles.MEANS_SPEC)
SELECT_KERNELS: tuple[KernelSpec, ...] = (triton.SELECT_SPEC, reference_tiles.SELECT_SPEC)


def tile_means(parts: tuple[Tensor, ...], token_rows: Tensor, tiles: int, blocks_per_tile: int = 1,
               backend: str = "auto") -> tuple[Tensor, ...]:
    """The mean of every tile's tokens, of one to three tensors in one pass, accumulated in float32.

    parts: [B, S, H, D] each, one shape, dtype and device, any strides with D contiguous.
    token_rows: int32 [slots], as in `block_sparse_attention`; tile n owns the slots of its `blocks_per_tile` blocks
    and its tokens are the rows there that are not -1.   -> float32 [B, H, tiles, D] each (float64 for float64)
    backend: that of the attention, or the name of a kernel in MEANS_KERNELS: see `choose`.
    Raises ValueError for operands that break this contract, NoKernel where `choose` does.
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


def choose(table: tuple[KernelSpec, ...], call: Call, backend: str = "auto",
           exclude: dict[str, str] | None = None) -> KernelSpec:
    """The first kernel that "auto" may take; around an attention kernel that is unproven itself, so that somebody must
    have named it, also an unproven one; with "reference" torch's. A name in the table means that very kernel.

    Raises NoKernel when a kernel of the table that is named cannot run.
    """
    exclude = exclude or {}
    if backend == reference.SPEC.name:
        return table[-1]
    named = [spec for spec in table if spec.name == backend]
    auto = not named and not any(spec.name == backend and spec.unproven() for spec in ATTENTION)
    for spec in named or table:
        reason = exclude.get(spec.name) or self_test.refusal(spec, call) or spec.refusal(call, auto)
        if reason is None:
            return spec
    raise NoKernel(f"{spec.name}: {reason}")


def _run(table, call, device, backend, exclude, problem, operands):
    while True:
        spec = choose(table, call, backend, exclude)
        try:
            return self_test.ready(spec, call, device, table[-1].load(), problem)(*operands)
        except KernelUnusable as error:
            exclude = {**exclude, spec.name: str(error)}


@torch.library.custom_op("video_sparse_attention::tile_means", mutates_args=(), schema=(
    "(Tensor[] parts, Tensor token_rows, SymInt tiles, SymInt blocks_per_tile, str backend) -> Tensor"))
def _tile_means(parts: list[Tensor], token_rows: Tensor, tiles: int, blocks_per_tile: int, backend: str) -> Tensor:
    return _run(MEANS_KERNELS, Call.of(parts[0]), token_rows.device, backend, {}, _means_differ,
                (parts, token_rows, tiles, blocks_per_tile))


@_tile_means.register_fake
def _(parts, token_rows, tiles, blocks_per_tile, backend):
    batch, _, heads, dim = parts[0].shape
    dtype = torch.promote_types(parts[0].dtype, torch.float32)
    return parts[0].new_empty((len(parts), batch, heads, tiles, dim), dtype=dtype)


@torch.library.custom_op("video_sparse_attention::select_tiles", mutates_args=(), schema=(
    "(Tensor query_means, Tensor key_means, SymInt k, float scale, SymInt blocks_per_tile, SymInt always, str backend) "
    "-> Tensor"))
def _select_tiles(query_means: Tensor, key_means: Tensor, k: int, scale: float, blocks_per_tile: int, always: int,
                  backend: str) -> Tensor:
    keys = key_means.shape[2]
    too_long = {triton.SELECT_SPEC.name: f"{keys} tiles, at most {triton.MAX_TILES}"} if keys > triton.MAX_TILES else {}
    return _run(SELECT_KERNELS, Call.of(query_means), query_means.device, backend, too_long, _selections_differ,
                (query_means, key_means, k, scale, blocks_per_tile, always))


@_select_tiles.register_fake
def _(query_means, key_means, k, scale, blocks_per_tile, always, backend):
    batch, heads, queries, _ = query_means.shape
    return query_means.new_empty((batch, heads, queries * blocks_per_tile, k * blocks_per_tile + always),
                                 dtype=torch.int32)


def _means_differ(run, call, device, reference) -> str | None:
    """A self-test's verdict: a sentence when the kernel's means of a cut tile and a full one are off."""
    generator = torch.Generator().manual_seed(1234)
    parts = [torch.randn(1, 200, 2, call.head_dim, generator=generator).to(call.dtype) for _ in range(3)]
    parts[1][:, 0] = torch.nan                                              # row 0 lies in no tile
    rows = torch.full((4 * BLOCK,), -1, dtype=torch.int32)
    rows[:150] = torch.randperm(199, generator=generator)[:150].int() + 1
    wanted = reference([x.double() for x in parts], rows, 2, 2)
    found = run([x.to(device) for x in parts], rows.to(device), 2, 2).double().cpu()
    worst = (found - wanted).abs().max().item()
    return None if worst <= 1e-5 else f"self-test on {device} failed: tile means are off by {worst:.1e}, wanted 1e-5"


def _selections_differ(run, call, device, reference) -> str | None:
    """A self-test's verdict: a sentence when the lists for scores with many ties are not the reference's."""
    generator = torch.Generator().manual_seed(1234)
    means = torch.randint(-2, 3, (2, 1, 2, 300, call.head_dim), generator=generator).to(call.dtype)
    means[..., 8:] = 0
    means[1, :, 1, 7] = torch.nan
    queries, keys, operands = means[0, :, :, :40], means[1], (40, 0.5, 2, 3)
    wanted = reference(queries, keys, *operands)
    found = run(queries.to(device), keys.to(device), *operands).cpu()
    rows = int((found != wanted).any(-1).sum())
    return None if rows == 0 else f"self-test on {device} failed: {rows} of {wanted[..., 0].numel()} lists differ"
