"""What is known of the training of released VSA models, by the name of the file or in its metadata."""
from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from .safetensors_file import CheckpointError

METADATA_KEY = "video_sparse_attention"


@dataclass(frozen=True)
class Trained:
    """How a VSA model was trained and wants to be sampled; None and () where not known."""

    name: str
    sparsity: float | None = None
    tile: tuple[int, int, int] | None = (4, 4, 4)
    timesteps: tuple[int, ...] = ()
    """Of its distilled schedule, 1000 is pure noise."""
    steps: int | None = None
    shift: float | None = None
    clip: str = ""
    """Width x height x frames."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


DMD = (1000, 757, 522)

# Name as it appears in paths, then the facts. Most specific first. Source: the models' cards and FastVideo's registry.
RELEASED = tuple((re.compile(pattern, re.IGNORECASE), trained) for pattern, trained in (
    (r"fastwan2\.1[-_]t2v[-_]1\.3b",
     Trained("FastWan2.1-T2V-1.3B", 0.8, timesteps=DMD, steps=3, shift=8.0, clip="832x448x61")),
    (r"fastwan2\.1[-_]t2v[-_]14b[-_]480p",
     Trained("FastWan2.1-T2V-14B-480P", 0.9, timesteps=DMD, steps=3, shift=8.0, clip="832x448x61")),
    (r"fastwan2\.1[-_]t2v[-_]14b", Trained("FastWan2.1-T2V-14B", timesteps=DMD, steps=3, shift=8.0)),
    (r"wan2\.1[-_]vsa[-_]t2v[-_]14b[-_]720p", Trained("Wan2.1-VSA-T2V-14B-720P", 0.9, clip="1280x768x77")),
    (r"fast[-_]?h3", Trained("FastH3", 0.9, steps=4)),
))
UNKNOWN = Trained("this model")


def trained_facts(metadata: dict[str, str], names: Iterable[str]) -> Trained:
    """The training behind a checkpoint with gates: what its metadata says, else what a released name says.

    names: file and folder names, and names in configs. Raises CheckpointError for metadata that cannot be read.
    """
    if METADATA_KEY in metadata:
        return _from_json(metadata[METADATA_KEY])
    for pattern, trained in RELEASED:
        if any(pattern.search(str(name)) for name in names):
            return trained
    return UNKNOWN


def _from_json(text: str) -> Trained:
    try:
        fields = json.loads(text)
        tile, timesteps = fields.get("tile"), fields.get("timesteps") or ()
        known = {key: fields[key] for key in ("name", "sparsity", "steps", "shift", "clip") if key in fields}
        return Trained(**known, tile=tile and tuple(map(int, tile)), timesteps=tuple(map(int, timesteps)))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"metadata {METADATA_KEY!r} cannot be read: {error}") from None
