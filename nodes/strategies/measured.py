"""Finished measurements on disk, so that a search that was done is never done again."""
from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...vsa_core.budget_search import BudgetTable
from ...vsa_core.choosing import Measurements
from ...vsa_core.grid import TokenGrid
from ...vsa_core.search import ErrorTable

log = logging.getLogger(__name__)

FACTS = "sta_search"
"""The metadata of such a file that makes its numbers a table again: grid, tile, windows or shares, and what was made
of them."""


LATENT = "dense_latent"


@dataclass
class Measured:
    """A finished measurement, and what was made of it."""

    table: Measurements
    saved: dict[str, str] = field(default_factory=dict)
    """What was chosen by -> the name of the strategy file that it gave."""
    checked: dict[str, float] = field(default_factory=dict)
    """The same -> how far the clip sampled with that strategy is from the dense one."""
    latent: Tensor | None = None
    """Of the dense sampling, where it is one tensor."""


def write_measured(path: str, measured: Measured) -> None:
    """Keep what a search has measured."""
    table = measured.table
    grid = table.grid
    facts = {"grid": grid.thw, "prefix": grid.prefix, "suffix": grid.suffix, "hidden": grid.hidden,
             "tile": table.tile_size, "saved": measured.saved, "checked": measured.checked}
    if isinstance(table, BudgetTable):
        facts |= {"shares": table.candidates, "tiles": table.tiles, "far_field": table.far_field}
    else:
        facts["windows"] = table.candidates
    tensors = dict(table.state())
    if measured.latent is not None:
        tensors[LATENT] = measured.latent.cpu()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = path + ".part"
    save_file({name: x.contiguous() for name, x in tensors.items()}, part, {FACTS: json.dumps(facts)})
    os.replace(part, path)


def read_measured(path: str) -> Measured | None:
    """What `write_measured` has kept at `path`, None where there is nothing or it cannot be read."""
    if not Path(path).exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()[FACTS])
            state = {name: file.get_tensor(name) for name in file.keys()}
        latent = state.pop(LATENT, None)
        table = _table(facts, state)
        table.restore(state)
        table.require_whole()
        return Measured(table, dict(facts["saved"]), dict(facts.get("checked", {})), latent)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        log.warning("[sparse attention] a finished search cannot be read and is done again: %s", error)
        return None


def _table(facts: dict, state: dict[str, Tensor]) -> Measurements:
    grid = TokenGrid(tuple(facts["grid"]), facts["prefix"], facts["suffix"], tuple(facts["hidden"]))
    steps, layers, _, heads = state["squared_errors"].shape
    if "shares" in facts:
        return BudgetTable(facts["shares"], grid, tuple(facts["tile"]), facts["tiles"], facts["far_field"], steps,
                           layers, heads)
    return ErrorTable([tuple(window) for window in facts["windows"]], grid, tuple(facts["tile"]), steps, layers, heads)
