"""What is known of the training of released sparse models, by the name of the file or in its metadata."""
from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from .names import MINIMAX_H3, WAN
from .safetensors_file import CheckpointError

METADATA_KEY = "video_sparse_attention"
VSA, SLA = "VSA", "SLA"
"""Sparse methods that a model can have been trained with."""
LTX = "LTX-Video"


@dataclass(frozen=True)
class Trained:
    """How a sparse model was trained and wants to be sampled; None and () where not known."""

    name: str
    sparsity: float | None = None
    tile: tuple[int, int, int] | None = (4, 4, 4)
    timesteps: tuple[int, ...] = ()
    """Of its distilled schedule, 1000 is pure noise."""
    steps: int | None = None
    shift: float | None = None
    clip: str = ""
    """Width x height x frames."""
    method: str = VSA
    ratio: float | None = None
    """SLA: share of the runs of 64 keys that a run of queries reads."""
    best_ratio: float | None = None
    """SLA: the ratio that its authors recommend for quality."""
    query_run: int | None = None
    """SLA: queries that share a choice."""
    feature: str | None = None
    """SLA: feature map of the linear branch."""
    sigmas: tuple[float, ...] = ()
    """Of its distilled schedule, where it is not given as timesteps."""
    sampler: str = "lcm"
    remark: str = ""
    """A sentence on how to sample it."""
    family: str = ""
    """The video model that it is, "" where not known."""
    bare: bool = False
    """Whether its tensors are those of a model that was not trained sparse: no gates, no projections."""
    dense_serves: bool = False
    """Whether it was trained with dense attention and only published to be sampled sparse."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))


DMD = (1000, 757, 522)


def rcm_sigmas(largest: float, steps: int = 4) -> tuple[float, ...]:
    """The sigmas of rCM distillation, 0 at the end. Fewer steps leave out the last ones and move none.

    TurboDiffusion turbodiffusion/inference at aaecff5: times t on a circle, sigma = tan t / (1 + tan t).
    """
    times = (math.atan(largest), 1.5, 1.4, 1.0)[:steps]
    return (*(round(math.tan(t) / (1 + math.tan(t)), 5) for t in times), 0.0)


def _turbo(name: str, largest: float, **known) -> Trained:
    return Trained(name, tile=None, steps=4, method=SLA, ratio=0.1, best_ratio=0.15, query_run=128, feature="softmax",
                   sigmas=rcm_sigmas(largest), family=WAN, **known)


def _bare(name: str, family: str, ratio: float, **known) -> Trained:
    """SLA without its linear branch: top-k in runs, LightX2V lightx2v/common/ops/attn/sla_attn.py at f8aee98."""
    return Trained(name, tile=None, method=SLA, ratio=ratio, query_run=128, family=family, bare=True, **known)


def _nvfp4_sparse(task: str, shift: float) -> Trained:
    sigmas = tuple(round(shift * t / (1 + (shift - 1) * t), 5) for t in (1.0, 0.75, 0.5, 0.25))
    return _bare(f"Wan2.2-NVFP4-Sparse-{task}", WAN, 0.1, steps=4, shift=shift, sigmas=(*sigmas, 0.0), sampler="euler",
                 clip="832x480x81", remark="The high model makes the first two steps, the low one the other two")

# Name as it appears in paths, then the facts. Most specific first. Source: the models' cards and FastVideo's registry.
RELEASED = tuple((re.compile(pattern, re.IGNORECASE), trained) for pattern, trained in (
    (r"fastwan2\.1[-_]t2v[-_]1\.3b",
     Trained("FastWan2.1-T2V-1.3B", 0.8, timesteps=DMD, steps=3, shift=8.0, clip="832x448x61", family=WAN)),
    (r"fastwan2\.1[-_]t2v[-_]14b[-_]480p",
     Trained("FastWan2.1-T2V-14B-480P", 0.9, timesteps=DMD, steps=3, shift=8.0, clip="832x448x61", family=WAN)),
    (r"fastwan2\.1[-_]t2v[-_]14b", Trained("FastWan2.1-T2V-14B", timesteps=DMD, steps=3, shift=8.0, family=WAN)),
    (r"wan2\.1[-_]vsa[-_]t2v[-_]14b[-_]720p",
     Trained("Wan2.1-VSA-T2V-14B-720P", 0.9, clip="1280x768x77", family=WAN)),
    (r"fast[-_]?h3", Trained("FastH3", 0.9, steps=4, family=MINIMAX_H3)),
    (r"turbowan2\.1[-_]t2v[-_]1\.3b", _turbo("TurboWan2.1-T2V-1.3B-480P", 80)),
    (r"turbowan2\.1[-_]t2v[-_]14b[-_]720p", _turbo("TurboWan2.1-T2V-14B-720P", 80)),
    (r"turbowan2\.1[-_]t2v[-_]14b[-_]480p", _turbo("TurboWan2.1-T2V-14B-480P", 80)),
    (r"turbowan2\.1[-_]t2v[-_]14b", _turbo("TurboWan2.1-T2V-14B", 80)),
    (r"turbowan2\.2[-_]i2v[-_]a14b", _turbo(
        "TurboWan2.2-I2V-A14B-720P", 200,
        remark="The high model makes the first two steps, the low one the other two (boundary 0.9)")),
    (r"(?=.*nvfp4[-_]?sparse)(?=.*i2v)", _nvfp4_sparse("I2V", 7.0)),
    (r"nvfp4[-_]?sparse", _nvfp4_sparse("T2V", 5.0)),
    (r"(?=.*h3)(?=.*turbo)(?=.*[-_]sla)", _bare(
        "MiniMax-H3-Turbo-SLA", MINIMAX_H3, 0.15, steps=4, shift=6.0, sampler="euler",
        remark="It is a LoRA: put a LoRA loader with it behind this node, strength 1. The shift of its sound is 3")),
    (r"turbot2av", _bare("TurboT2AV", LTX, 0.3, dense_serves=True)),
))
CHOICES = {trained.name: trained for _, trained in RELEASED}
"""What a user can say that a file is, by name."""
UNKNOWN = Trained("this model")
UNKNOWN_SLA = Trained("this model", tile=None, method=SLA, query_run=128, feature="softmax")


def trained_facts(metadata: dict[str, str], names: Iterable[str], method: str = VSA) -> Trained:
    """The training behind a checkpoint with what `method` trains: what its metadata says, else a released name.

    names: file and folder names, and names in configs. Raises CheckpointError for metadata that cannot be read or is
    of another method.
    """
    if METADATA_KEY in metadata:
        told = _from_json(metadata[METADATA_KEY])
        if told.method != method:
            raise CheckpointError(f"metadata {METADATA_KEY!r} says trained with {told.method}, but the tensors are "
                                  f"those of {method}: the file was put together from two models")
        return told
    names = list(map(str, names))
    for pattern, trained in RELEASED:
        if trained.method == method and not trained.bare and any(map(pattern.search, names)):
            return trained
    return UNKNOWN if method == VSA else UNKNOWN_SLA


def told_by_metadata(metadata: dict[str, str]) -> Trained | None:
    """What a file says itself of its training, None where it says nothing.

    Raises CheckpointError for metadata that cannot be read.
    """
    return _from_json(metadata[METADATA_KEY]) if METADATA_KEY in metadata else None


def named_as_bare(names: Iterable[str]) -> Trained | None:
    """The model without extra tensors that these names speak of. A name alone shows nothing: it is worth a question."""
    whole = "/".join(map(str, names))
    return next((trained for pattern, trained in RELEASED if trained.bare and pattern.search(whole)), None)


AS_THEY_ARE = ("name", "sparsity", "steps", "shift", "clip", "method", "ratio", "best_ratio", "query_run", "feature",
               "sampler", "remark", "family", "bare", "dense_serves")


def _from_json(text: str) -> Trained:
    try:
        fields = json.loads(text)
        tile, timesteps = fields.get("tile"), fields.get("timesteps") or ()
        known = {key: fields[key] for key in AS_THEY_ARE if key in fields}
        return Trained(**known, tile=tile and tuple(map(int, tile)), timesteps=tuple(map(int, timesteps)),
                       sigmas=tuple(map(float, fields.get("sigmas") or ())))
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"metadata {METADATA_KEY!r} cannot be read: {error}") from None
