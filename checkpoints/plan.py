"""What a checkpoint is and where each of its tensors goes, decided from headers alone."""
from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from .gate_names import check_gates, find_gates
from .names import (
    DIFFUSERS_MARKS,
    MINIMAX_H3,
    OTHER,
    WAN,
    family_of_names,
    is_lora,
    naming_of,
    native_wan_name,
    without_prefix,
)
from .projection_names import check_projections, find_projections
from .safetensors_file import CheckpointError
from .source import Checkpoint
from .trained import SLA, VSA, Trained, trained_facts

GATE_PARTS = ("weight", "bias", "scale_weight", "weight_scale", "input_scale", "scale_input", "comfy_quant")
BLOCK_PARTS = ("self_attn.", "cross_attn.", "attn.", "ffn.", "mlp.", "norm3.", "modulation")


@dataclass(frozen=True)
class Plan:
    checkpoint: Checkpoint
    family: str
    naming: str
    names: dict[str, str]
    """Name in the files -> name that ComfyUI reads, gates and projections left out."""
    gates: dict[int, dict[str, str]]
    """Layer -> part -> name in the files; empty for a model without VSA gates."""
    layers: int
    width: int
    per_head_gates: bool = False
    """Whether the file has gates of the same name that are none of VSA (LTX-2.3)."""
    projections: dict[int, dict[str, str]] = field(default_factory=dict)
    """Layer -> part -> name in the files; empty for a model that was not trained with SLA."""
    reshaped: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Name in the files -> the shape that ComfyUI wants, where it is another one of the same numbers in a row."""

    @property
    def trained(self) -> Trained | None:
        """What is known of the sparse training, None for a model without gates and projections."""
        if not self.gates and not self.projections:
            return None
        named = str(self._config.get("_name_or_path", ""))
        return trained_facts(self.checkpoint.metadata, (*self.checkpoint.path.parts[-3:], named),
                             SLA if self.projections else VSA)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor as ComfyUI wants it."""
        return self.reshaped.get(name, self.checkpoint.tensors[name].info.shape)

    @property
    def metadata(self) -> dict[str, str]:
        """Metadata for ComfyUI's detection: the file's own, and what it cannot see in a diffusers model's tensors."""
        if self.family != WAN or self.naming == "native" or "config" in self.checkpoint.metadata:
            return dict(self.checkpoint.metadata)
        places = {native: self.checkpoint.tensors[name].info.shape for name, native in self.names.items()}
        seen = {ours: places[name][1] for ours, name in (("text_dim", "text_embedding.0.weight"),
                                                         ("freq_dim", "time_embedding.0.weight")) if name in places}
        told = {"eps": "eps", "num_attention_heads": "num_heads"}
        seen.update({ours: self._config[theirs] for theirs, ours in told.items() if self._config.get(theirs)})
        return {**self.checkpoint.metadata, "config": json.dumps({"transformer": seen})}

    @property
    def _config(self) -> dict:
        """config.json where it describes these tensors, else empty: a folder may hold another model's."""
        config = self.checkpoint.config
        heads, size = config.get("num_attention_heads"), config.get("attention_head_dim")
        fits = self.naming != "native" and isinstance(heads, int) and isinstance(size, int)
        return config if fits and heads * size == self.width else {}

    @property
    def refusal(self) -> str:
        """Why a model that ComfyUI does not know cannot be loaded."""
        name = self.checkpoint.config.get("_class_name")
        if self.family == OTHER and (name or "condition_embedder" in str(self.names)):
            return f"{self.checkpoint.path} is a diffusers model ({name}): of those, only Wan is known here"
        return (f"{self.checkpoint.path} holds a model that this ComfyUI does not know: found names such as "
                f"{next(iter(self.names))}")


def plan_of(checkpoint: Checkpoint) -> Plan:
    """The plan for a whole model.

    What the tensors say wins over a config.json beside them.
    Raises CheckpointError for a LoRA, tensors without a place, blocks that lack tensors, weights in a form that ComfyUI
    cannot read, and VSA gates or SLA projections of wrong shapes or for some layers only.
    """
    shapes = {without_prefix(name): place.info.shape for name, place in checkpoint.tensors.items()}
    plain = {name: without_prefix(name) for name in checkpoint.tensors}
    if is_lora(plain.values()):
        gates_too = ", or its gates through Attach VSA Gates" if find_gates(checkpoint.tensors) else ""
        raise CheckpointError(f"{checkpoint.path} is a LoRA: wanted a whole model. Load it through a LoRA loader"
                              + gates_too)
    gates, projections = find_gates(checkpoint.tensors), _projections(checkpoint)
    extra = {name for found in (gates, projections) for parts in found.values() for name in parts.values()}
    names = {name: short for name, short in plain.items() if name not in extra}
    _refuse_int8(names, checkpoint)
    family = family_of_names(names.values())
    if projections and (gates or family != WAN):
        found = "VSA gates too" if gates else "a model that is not Wan"
        raise CheckpointError(f"{checkpoint.path}: found SLA projections (proj_l) and {found}: there is no such model "
                              "known here. Wanted a Wan model trained with one of both")
    naming = naming_of(names.values())
    if family == WAN:
        names = _native_names(names, naming, checkpoint)
        layers = _check_blocks(names.values(), checkpoint)
        width = shapes[next(plain[name] for name, native in names.items() if native == "head.modulation")][-1]
        wanted = (width, width)
    elif family == MINIMAX_H3:
        layers = _check_blocks(names.values(), checkpoint)
        inner, width = shapes["blocks.0.attn.qkv_proj.weight"][:2]
        wanted = (inner // 3, width)
    else:
        return Plan(checkpoint, OTHER, naming, plain, {}, 0, 0, per_head_gates=bool(gates))
    if gates:
        weights = {layer: checkpoint.tensors[parts["weight"]].info.shape
                   for layer, parts in gates.items() if "weight" in parts}
        check_gates(weights, layers, wanted, str(checkpoint.path))
        _check_parts(gates, checkpoint)
    if projections:
        check_projections({layer: {part: checkpoint.tensors[name].info for part, name in parts.items()}
                           for layer, parts in projections.items()}, layers, str(checkpoint.path))
    reshaped = _patch_of_linear(names, checkpoint) if family == WAN else {}
    return Plan(checkpoint, family, naming, names, gates, layers, width, projections=projections, reshaped=reshaped)


def _projections(checkpoint: Checkpoint) -> dict[int, dict[str, str]]:
    try:
        return find_projections(checkpoint.tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from None


def _refuse_int8(names: dict[str, str], checkpoint: Checkpoint) -> None:
    if any(short.endswith(".int8_weight") for short in names.values()):
        raise CheckpointError(f"{checkpoint.path} holds TurboDiffusion's int8 weights (int8_weight), which ComfyUI "
                              "cannot read: use the file of the same name without -quant")


def _patch_of_linear(names: dict[str, str], checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """TurboDiffusion keeps the patch embedding as a linear layer over (c, t, h, w): the convolution's numbers."""
    name = next((name for name, native in names.items() if native == "patch_embedding.weight"), None)
    shape = checkpoint.tensors[name].info.shape if name else ()
    if len(shape) != 2:
        return {}
    if shape[1] % 4:
        raise CheckpointError(f"{checkpoint.path}: found a patch embedding of shape {list(shape)}, wanted "
                              f"[{shape[0]}, channels * 4]: Wan's patches are 1x2x2")
    return {name: (shape[0], shape[1] // 4, 1, 2, 2)}


def _check_parts(gates: dict[int, dict[str, str]], checkpoint: Checkpoint) -> None:
    unknown = sorted({part for parts in gates.values() for part in parts} - set(GATE_PARTS))
    if unknown:
        raise CheckpointError(f"{checkpoint.path}: found gates with {', '.join(unknown)}: wanted weight and bias")


def _native_names(names: dict[str, str], naming: str, checkpoint: Checkpoint) -> dict[str, str]:
    native = {name: native_wan_name(short) for name, short in names.items()}
    lost = [name for name, target in native.items() if naming != "native" and DIFFUSERS_MARKS.search(target)]
    if lost:
        raise CheckpointError(f"{checkpoint.path}: found {len(lost)} tensors whose place in Wan is not known, such as "
                              f"{lost[0]}")
    twice = [target for target, count in Counter(native.values()).items() if count > 1]
    if twice:
        sources = [name for name, target in native.items() if target == twice[0]]
        raise CheckpointError(f"{checkpoint.path}: found {' and '.join(sources)}, two names for one tensor")
    return native


def _check_blocks(names, checkpoint: Checkpoint) -> int:
    """The number of blocks, each of which has the tensors that the others have."""
    blocks: dict[int, set[str]] = defaultdict(set)
    for name in names:
        if match := re.match(r"blocks\.(\d+)\.(.+)$", name):
            blocks[int(match[1])].add(match[2])
    every = set.union(*blocks.values()) if blocks else set()
    for layer in range(max(blocks, default=-1) + 1):
        missing = {part for part in every - blocks[layer]
                   if part.startswith(BLOCK_PARTS) and part.endswith((".weight", ".bias", "modulation"))}
        if missing:
            raise CheckpointError(f"{checkpoint.path}: block {layer} lacks {sorted(missing)[0]} and "
                                  f"{len(missing) - 1} more: a file of the model is missing")
    if not blocks:
        raise CheckpointError(f"{checkpoint.path} holds no transformer blocks")
    return len(blocks)
