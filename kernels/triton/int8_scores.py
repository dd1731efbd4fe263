"""Block-sparse attention whose scores are products of 8-bit integers: `block_sparse.py` on other operands."""
from __future__ import annotations

from ..spec import Call
from . import block_sparse
from .configs import sums_in_half
from .quantise import quantise


def run(q, k, v, indices, counts, block_sizes, scale, return_lse, token_rows=None, gate=None, coarse=None,
        blocks_per_tile=1, tile_grid=None, far=None, far_lse=None, *, out=None, lse=None,
        half_sums: bool | None = None):
    """Contract and shapes: `kernels.block_sparse_attention`, but for the rounding of q and k to 8 bits.

    half_sums: weights times values are summed in float16, 64 at a time. None: where the card is faster with it.
    """
    if half_sums is None:
        half_sums = sums_in_half(Call.of(q).capability)
    int8 = quantise(k, v, block_sizes, token_rows, half_sums) if q.numel() and k.numel() else None
    return block_sparse.run(q, k, v, indices, counts, block_sizes, scale, return_lse, token_rows, gate, coarse,
                            blocks_per_tile, tile_grid, far, far_lse, out=out, lse=lse, int8=int8)
