"""The settings of VMoBA by FastVideo's names, as its JSON configurations hold them (--moba-config-path)."""
from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class ChunkSettings:
    """What `VideoMobaAttentionMetadataBuilder.build` takes besides the clip. Defaults: FastVideo's file for Wan 1.3B at
    77 frames of 480 x 832."""

    temporal_chunk_size: float = 2
    temporal_topk: int = 3
    spatial_chunk_size: tuple[int, int] = (3, 4)
    spatial_topk: int = 20
    st_chunk_size: tuple[int, int, int] = (4, 6, 4)
    st_topk: int = 15
    moba_select_mode: str = "threshold"
    moba_threshold: float = 0.25
    moba_threshold_type: str = "query_head"
    first_full_layer: int = 0
    first_full_step: int = 12
    temporal_layer: int = 1
    spatial_layer: int = 1
    st_layer: int = 1

    def build_arguments(self) -> dict[str, Any]:
        """By name, for the builder."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


NAMES = tuple(field.name for field in fields(ChunkSettings))


def parse_config(text: str) -> dict[str, Any]:
    """The settings that a JSON configuration names, lists as tuples. Raises ValueError for anything else in it."""
    try:
        data = json.loads(text, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON at line {error.lineno}, column {error.colno} ({error.msg}): wanted settings such as "
                         "{\"st_chunk_size\": [4, 6, 4]}") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply: wanted settings of VMoBA") from error
    if not isinstance(data, dict):
        raise ValueError(f"found a JSON {type(data).__name__}: wanted an object with settings of VMoBA")
    unknown = [name for name in data if name not in NAMES]
    if unknown or not data:
        raise ValueError(f"found {', '.join(unknown) or 'no setting'}: wanted some of {', '.join(NAMES)}")
    for name, value in data.items():
        wanted = str if name in ("moba_select_mode", "moba_threshold_type") else (int, float)
        wanted = (int, list) if name in ("spatial_chunk_size", "st_chunk_size") else wanted
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise ValueError(f"{name} {json.dumps(value)}: wanted "
                             + ("a word" if wanted is str else "a list of numbers" if list in wanted else "a number"))
    return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}


def parse_box(text: str, name: str, sides: int) -> tuple[int, ...]:
    """The sides that "4x6x4" names. Raises ValueError for another number of them, or one that is not above 0."""
    parts = re.split(r"\s*[x×,]\s*", str(text).strip())
    if len(parts) != sides or not all(re.fullmatch(r"[0-9]{1,6}", part) and int(part) for part in parts):
        wanted = "height x width, such as 3x4" if sides == 2 else "time x height x width, such as 4x6x4"
        raise ValueError(f"{name} {text!r}: wanted {wanted}")
    return tuple(map(int, parts))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice: wanted it once")
    return data
