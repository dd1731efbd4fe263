"""The widget attention_mass: every query tile reads as many tiles as hold this share of its attention."""
from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ...vsa_core.layout import TileLayout
from ...vsa_core.mass import pooled_masses
from ...vsa_core.mass_lists import KeptTiles, keep_mass
from ..hook.method import LayerCall
from ..hook.run import Run

MOST = 0.999
FACT = "attention_mass"


def mass_input() -> io.Float.Input:
    return io.Float.Input(
        "attention_mass", default=0.0, min=0.0, max=MOST, step=0.001, optional=True, advanced=True,
        tooltip="Keep this share of the attention, such as 0.95: heads and tiles that look at little read few tiles, "
                "others more. sparsity stays the upper bound on the average. 0 is off: all read the same number.")


def require_mass(mass: float) -> None:
    """Raise ValueError for a value of the widget that cannot be aimed at."""
    if not 0.0 <= mass <= MOST:
        raise ValueError(f"attention_mass {mass}: wanted 0 (off) to {MOST}")


class MassLists:
    """The lists of one grid in one run, made for a share of the attention."""

    def __init__(self, target: float, sparsity: float):
        self.target, self.sparsity = target, sparsity

    def of(self, q: Tensor, k: Tensor, layout: TileLayout, call: LayerCall) -> KeptTiles:
        """What the query tiles of a call read, q and k [B, S, H, D]; told in `call.record`."""
        most = max(1.0, (1 - self.sparsity) * len(layout.variable_block_sizes))
        masses = pooled_masses(q, k, layout, q.shape[-1] ** -0.5, call.kernel)
        kept = keep_mass(*masses, self.target, most, layout)
        self._tell(kept, layout, call)
        return kept

    def _tell(self, kept: KeptTiles, layout: TileLayout, call: LayerCall) -> None:
        record = call.record
        record.densities.append(torch.tensor(kept.density))
        if call.sampled:
            record.tile_map = _middle_map(kept, layout)
        add_call(record.facts, kept, self.target)


def add_call(facts: dict[str, Any], kept: KeptTiles, target: float) -> None:
    """One call more in the plain numbers of a record: shares are means over its calls."""
    now = {"kept": kept.mass, "read": kept.mean / kept.tiles}
    low, high = (tiles / kept.tiles for tiles in kept.by_head)
    known = facts.setdefault(FACT, {"target": target, "calls": 0, "bounded": 0, "kept": 0.0, "read": 0.0,
                                    "least": low, "most": high})
    known["calls"] += 1
    known["bounded"] += kept.bounded
    known.update({name: known[name] + (value - known[name]) / known["calls"] for name, value in now.items()})
    known.update(least=min(known["least"], low), most=max(known["most"], high))
    facts["label"] = "every tile looks at as many tiles as attention_mass asks for"


def words(known: dict[str, Any]) -> str:
    """What the calls of a record kept, in a clause."""
    return (f"attention_mass {_percent(known)}: kept {known['kept']:.1%}, an estimate from tile means, reads "
            f"{known['read']:.0%} of the tiles on average (heads {known['least']:.0%} to {known['most']:.0%})")


def _percent(known: dict[str, Any]) -> str:
    return f"{100 * known['target']:.4g}%"


def mass_remarks(run: Run, sparsity: float, trained: str | None) -> list[str]:
    """What a user should know of a run with a mass target. trained: name of a model that was trained with VSA."""
    lines = []
    for known in (record.facts[FACT] for record in run.records.values() if FACT in record.facts):
        lines.append(words(known))
        if known["bounded"]:
            often = f"{known['bounded']} of {known['calls']}"
            lines.append(f"in {often} attention calls {_percent(known)} of the attention needs more tiles than the "
                         f"{1 - sparsity:.0%} that sparsity {sparsity:g} allows: less was kept there. Lower "
                         "sparsity or attention_mass")
    if lines and trained:
        lines.append(f"{trained} was trained to read the same number of tiles everywhere. Set attention_mass to 0")
    return lines


def _middle_map(kept: KeptTiles, layout: TileLayout) -> Tensor:
    """[Nt, Nh, Nw], the share of heads that keep each tile, for the query tile in the middle."""
    n_t, n_h, n_w = layout.num_tiles
    middle = (n_t // 2 * n_h + n_h // 2) * n_w + n_w // 2
    rows = torch.tensor([middle], device=kept.bits.device)
    return kept.mask_of(rows).float().mean((0, 1, 2)).view(n_t, n_h, n_w)
