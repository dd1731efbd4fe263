"""What a checkpoint is and where each of its tensors goes, decided from headers alone."""
from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace

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
from .projection_names import check_projections, find_projections, named_as_projections
from .safetensors_file import CheckpointError, how_to_convert
from .source import Checkpoint
from .trained import CHOICES, LTX, SLA, VSA, Trained, named_as_bare, told_by_metadata, trained_facts

GATE_PARTS = ("weight", "bias", "scale_weight", "weight_scale", "input_scale", "scale_input", "comfy_quant")
EXTRA = {VSA: "VSA gates", SLA: "SLA projections"}
"""What a model trained with a method has beside the tensors of one that was not."""
ATTENTION_WISH = ".comfy_attention.config"
"""A few bytes of JSON beside an attention: which of ComfyUI's own functions it asks for (Comfy-Org/ComfyUI#16419)."""
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
    chosen: Trained | None = None
    """What the user says that it is."""

    @property
    def trained(self) -> Trained | None:
        """What is known of the sparse training; None without gates and projections, unless user or metadata tell it."""
        if self.chosen is not None:
            return self.chosen
        if not self.gates and not self.projections:
            told = told_by_metadata(self.checkpoint.metadata)
            return told if told is not None and told.bare else None
        return trained_facts(self.checkpoint.metadata, self._called, SLA if self.projections else VSA)

    @property
    def remark(self) -> str:
        """A sentence on a training that metadata or a name speak of and neither user nor tensors confirm, else ""."""
        told = told_by_metadata(self.checkpoint.metadata)
        if self.chosen is not None:
            return "" if told in (None, self.chosen) else f"Its metadata say {told.name}: trained_as counts instead"
        if self.gates or self.projections or self.trained is not None:
            return ""
        if told is not None:
            gone = EXTRA.get(told.method, "its extra tensors")
            return (f"WARNING: its metadata say that it was trained as {told.name} with {told.method}, but {gone} are "
                    "not in this file: whoever saved it left them out, and without them it is not that model. Load the "
                    "file as it was published")
        if named := named_as_bare(self._called):
            return (f"Its name speaks of {named.name}, which is sampled with {named.method} and shows no sign of it in "
                    f"its tensors: if it is that, choose it in trained_as")
        return ""

    def told_as(self, name: str) -> Plan:
        """The plan of a file that the user says is a model of `CHOICES`.

        Raises CheckpointError where the tensors show that it is not.
        """
        if name not in CHOICES:
            raise CheckpointError(f"trained_as {name!r}: wanted one of {', '.join(CHOICES)}")
        chosen, path = CHOICES[name], self.checkpoint.path
        there = VSA if self.gates else SLA if self.projections else None
        wanted = None if chosen.bare else chosen.method
        if self.family != chosen.family and (self.family != OTHER or chosen.family != LTX):
            found = self.family if self.family != OTHER else "neither Wan nor MiniMax H3"
            raise CheckpointError(f"{path}: trained_as {name} is a {chosen.family}, this file is {found}. Set "
                                  "trained_as to auto")
        if there != wanted:
            has = f"it has {EXTRA[there]}" if there else "it has none"
            raise CheckpointError(f"{path} is not {name}: wanted a file with {EXTRA[wanted]}, {has}. Load the file as "
                                  "it was published, or set trained_as to auto" if wanted else
                                  f"{path} is not {name}, which has no {EXTRA[there]}: set trained_as to auto")
        if chosen.family == WAN and (found := self._from_image) is not None and found != ("-I2V" in name):
            has = "takes a start image, which that does not" if found else "takes no start image, which that does"
            raise CheckpointError(f"{path} is not {name}: this one {has}. Set trained_as to auto, or to the other task")
        return replace(self, chosen=chosen)

    @property
    def _from_image(self) -> bool | None:
        """Whether a Wan takes a start image beside the clip, None where its input has other channels than either."""
        name = next((name for name, native in self.names.items() if native == "patch_embedding.weight"), None)
        return {(16,): False, (36,): True}.get(self.shape_of(name)[1:2]) if name else None

    @property
    def _called(self) -> tuple[str, ...]:
        return (*self.checkpoint.path.parts[-3:], str(self._config.get("_name_or_path", "")))

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
        raise CheckpointError(f"{checkpoint.path} is a LoRA: wanted a whole model. Load it through a LoRA loader"
                              + _what_a_lora_loader_leaves(checkpoint))
    gates, projections = find_gates(checkpoint.tensors), _projections(checkpoint)
    extra = {name for found in (gates, projections) for parts in found.values() for name in parts.values()}
    names = {name: short for name, short in plain.items() if name not in extra}
    _refuse_foreign_numbers(names, checkpoint)
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


def _what_a_lora_loader_leaves(checkpoint: Checkpoint) -> str:
    """ComfyUI's LoRA loader applies what it finds in the model, and names the rest in its log at most."""
    if named_as_projections(checkpoint.tensors):
        return (". It changes SLA projections (proj_l) too, which no LoRA loader applies: wanted the whole model "
                "that it was trained into")
    if find_gates(checkpoint.tensors):
        return ", and its gates, which that leaves out, through Attach VSA Gates"
    if named := named_as_bare(checkpoint.path.parts[-2:]):
        return f", behind this node with trained_as {named.name}"
    return ""


def _refuse_foreign_numbers(names: dict[str, str], checkpoint: Checkpoint) -> None:
    if any(short.endswith(".input_global_scale") for short in names.values()):
        raise CheckpointError(f"{checkpoint.path} holds NVFP4 weights as LightX2V writes them (input_global_scale), "
                              "which ComfyUI reads in another order. Take the files made for ComfyUI, such as those of "
                              "Kijai/WanVideo_comfy_nvfp4")
    if any(short.endswith(".int8_weight") for short in names.values()):
        raise CheckpointError(f"{checkpoint.path} holds TurboDiffusion's int8 weights (int8_weight), which ComfyUI "
                              f"cannot read. Use the file of the same name without -quant, or convert it: "
                              f"{how_to_convert(checkpoint.path)}")


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
