"""SLA's projections in a checkpoint: one linear layer `proj_l` per transformer block, shared by its heads.

TurboDiffusion writes blocks.N.self_attn.attn_op.local_attn.proj_l beside native Wan names, FastVideo
blocks.N.attn1.attn_impl.proj_l, sglang's diffusers folders blocks.N.attn1.attn_op.local_attn.proj_l and, of a running
model, blocks.N.attn1.local_attn.proj_l. All are the same layer.
"""
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping

from .names import without_prefix
from .safetensors_file import CheckpointError, TensorInfo

PROJECTION = re.compile(r"^(?:transformer\.)?blocks\.(?P<layer>\d+)\.(?P<place>self_attn\.attn_op\.local_attn|"
                        r"attn1\.(?:attn_impl|attn_op\.local_attn|local_attn))\.proj_l\.(?P<part>weight|bias)$")
NATIVE_NAME = "blocks.{layer}.self_attn.attn_op.local_attn.proj_l.{part}"
"""TurboDiffusion's, under which projections are written."""
FLOATING = ("F64", "F32", "F16", "BF16")
HEAD_DIM = 128
"""Of every Wan."""


def named_as_projections(names: Iterable[str]) -> list[str]:
    """The names that speak of a layer proj_l, wherever it stands."""
    return [name for name in names if ".proj_l." in f".{name}"]


def find_projections(names: Iterable[str]) -> dict[int, dict[str, str]]:
    """layer -> part ("weight", "bias") -> name, layers ascending.

    Raises CheckpointError for a proj_l in a place that is not known, and for two names of one part: a name that was
    passed over would silently mean zeros.
    """
    found: dict[int, dict[str, str]] = defaultdict(dict)
    for name in named_as_projections(names):
        match = PROJECTION.match(without_prefix(name))
        if not match:
            raise CheckpointError(f"found {name}, an SLA projection in a place that is not known here: wanted names "
                                  f"such as {NATIVE_NAME.format(layer=0, part='weight')}")
        parts = found[int(match["layer"])]
        if match["part"] in parts:
            raise CheckpointError(f"found {parts[match['part']]} and {name}, two names for one SLA projection")
        parts[match["part"]] = name
    return {layer: found[layer] for layer in sorted(found)}


def check_projections(found: Mapping[int, Mapping[str, TensorInfo]], layers: int, where: str) -> None:
    """Whether every one of `layers` layers has a whole projection of a Wan head. Raises CheckpointError: found, wanted.

    found: layer -> part -> tensor.
    """
    if found and max(found) >= layers:
        raise CheckpointError(f"{where}: found SLA projections for {max(found) + 1} layers, this model has {layers}: "
                              "they belong to another model")
    for layer, parts in found.items():
        for part, shape in (("weight", (HEAD_DIM, HEAD_DIM)), ("bias", (HEAD_DIM,))):
            if part not in parts:
                raise CheckpointError(f"{where}: the SLA projection of layer {layer} has no {part}: the file is "
                                      "damaged")
            info = parts[part]
            if tuple(info.shape) != shape:
                raise CheckpointError(f"{where}: found an SLA projection with a {part} of shape {list(info.shape)} in "
                                      f"layer {layer}, wanted {list(shape)}: it belongs to another model")
            if info.dtype not in FLOATING:
                raise CheckpointError(f"{where}: found an SLA projection in {info.dtype} in layer {layer}, wanted one "
                                      f"of {', '.join(FLOATING)}")
    missing = sorted(set(range(layers)) - set(found))
    if missing:
        raise CheckpointError(f"{where}: found SLA projections for {len(found)} of {layers} layers, none for layer "
                              f"{', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}: wanted all")
