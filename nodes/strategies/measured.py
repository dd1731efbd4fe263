"""Finished measurements on disk, so that a search that was done is never done again."""
from __future__ import annotations

import json
import logging
import os
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ...vsa_core.grid import TokenGrid
from ...vsa_core.search import ErrorTable

log = logging.getLogger(__name__)

FACTS = "sta_search"
"""The metadata of such a file that makes its numbers a table again: grid, tile, windows, and the strategies saved."""


def write_measured(path: str, table: ErrorTable, saved: dict[str, str]) -> None:
    """Keep what a search has measured. saved: what was chosen by -> the name of the strategy file that it gave."""
    grid = table.grid
    facts = {"grid": grid.thw, "prefix": grid.prefix, "suffix": grid.suffix, "hidden": grid.hidden,
             "tile": table.tile_size, "windows": table.candidates, "saved": saved}
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = path + ".part"
    save_file({name: x.contiguous() for name, x in table.state().items()}, part, {FACTS: json.dumps(facts)})
    os.replace(part, path)


def read_measured(path: str) -> tuple[ErrorTable, dict[str, str]] | None:
    """What `write_measured` has kept at `path`, None where there is nothing or it cannot be read."""
    if not Path(path).exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()[FACTS])
            state = {name: file.get_tensor(name) for name in file.keys()}
        grid = TokenGrid(tuple(facts["grid"]), facts["prefix"], facts["suffix"], tuple(facts["hidden"]))
        steps, layers, _, heads = state["squared_errors"].shape
        table = ErrorTable([tuple(window) for window in facts["windows"]], grid, tuple(facts["tile"]), steps, layers,
                           heads)
        table.restore(state)
        table.relative()      # raises where something was not measured
        return table, dict(facts["saved"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        log.warning("[STA] a finished search cannot be read and is done again: %s", error)
        return None
