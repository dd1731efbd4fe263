"""ComfyUI's attention masks, as tokens that nobody sees."""
from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...vsa_core.grid import TokenGrid

DENSE_MASK = "attention mask"
"""The mask differs between queries, heads or clips, or it weighs keys instead of hiding them."""
CLIP_MASK = "attention mask over the clip"


def hide_masked(grid: TokenGrid, mask: Tensor, known: list[tuple[Tensor, Tensor | None]]) -> TokenGrid | str:
    """The grid with the other tokens hidden that `mask` hides, or why the call has to run dense.

    mask: bool, True for keys that are seen, or added to the scores, 0 for those; [..., L], one row for all queries.
    known: the masks that this forward pass has met, each with the keys that it hides.
    """
    keys = _hidden_keys(mask, grid.num_tokens, known)
    if keys is None:
        return DENSE_MASK
    last_video = grid.prefix + grid.num_video_tokens
    if ((keys >= grid.prefix) & (keys < last_video)).any():
        return CLIP_MASK
    others = [key if key < grid.prefix else key - grid.num_video_tokens for key in keys.tolist()]
    return replace(grid, hidden=tuple(others))


def _hidden_keys(mask: Tensor, tokens: int, known: list[tuple[Tensor, Tensor | None]]) -> Tensor | None:
    """The keys that the mask hides from every query, ascending int64 on the CPU; None where it does anything else.

    All layers of a pass get one mask, so the device is waited for once per pass. The mask is kept with its answer,
    as another one could later lie at the same address.
    """
    for seen, keys in known:
        if seen is mask:
            return keys
    keys = _read(mask, tokens)
    known.append((mask, keys))
    return keys


def _read(mask: Tensor, tokens: int) -> Tensor | None:
    rows = mask.shape[:-1]
    batch = rows[0] if mask.ndim > 2 else 1
    if mask.shape[-1] != tokens or rows.numel() != batch:
        return None
    values = mask.detach().reshape(batch, tokens).cpu()
    if values.dtype == torch.bool:
        hidden = ~values
    else:
        hidden = values < torch.finfo(values.dtype).min / 2     # the host writes the lowest number, others -inf
        if not (hidden | (values == 0)).all():
            return None
    return hidden[0].nonzero().flatten() if (hidden == hidden[0]).all() else None
