"""VSA gates in a checkpoint: one linear layer `to_gate_compress` per transformer block.

FastVideo writes blocks.N.to_gate_compress (Wan), blocks.N.attn.to_gate_compress (MiniMax H3) and
transformer_blocks.N.attn.to_gate_compress (its LoRA files). LTX-2.3 uses the name for another thing, a gate per head.
"""
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from .safetensors_file import CheckpointError

GATE = re.compile(r"^(?:(?:model\.)?diffusion_model\.|transformer\.)?(?:transformer_)?blocks\.(?P<layer>\d+)\."
                  r"(?:(?:attn1?|self_attn)\.)?to_gate_compress\.(?P<part>.+)$")


def find_gates(names: Iterable[str]) -> dict[int, dict[str, str]]:
    """layer -> part ("weight", "bias", "diff", ...) -> name, layers ascending."""
    found: dict[int, dict[str, str]] = defaultdict(dict)
    for name in names:
        if match := GATE.match(name):
            found[int(match["layer"])][match["part"]] = name
    return {layer: found[layer] for layer in sorted(found)}


def check_gates(shapes: dict[int, tuple[int, ...]], layers: int, wanted: tuple[int, int], where: str) -> None:
    """Whether every one of `layers` layers has a gate weight of shape `wanted` (heads * head_dim, width).

    shapes: layer -> shape of its gate's weight. Raises CheckpointError: found, wanted.
    """
    if not shapes:
        raise CheckpointError(f"{where}: found no gates (to_gate_compress)")
    if max(shapes) >= layers:
        raise CheckpointError(f"{where}: found gates for {max(shapes) + 1} layers, this model has {layers}: "
                              "they belong to another model")
    wrong = {layer: list(shape) for layer, shape in shapes.items() if tuple(shape) != tuple(wanted)}
    for layer, shape in wrong.items():
        if len(shape) == 2 and shape[0] < 128 <= wanted[0]:
            raise CheckpointError(f"{where}: found to_gate_compress of shape {shape} in layer {layer}, a gate per "
                                  f"head as in LTX-2.3; VSA has one per channel: wanted {list(wanted)}")
        whose = "they belong to another model" if len(wrong) == len(shapes) else "the file is damaged"
        raise CheckpointError(f"{where}: found a gate of shape {shape} in layer {layer}, this model takes "
                              f"{list(wanted)}: {whose}")
    missing = sorted(set(range(layers)) - set(shapes))
    if missing:
        raise CheckpointError(f"{where}: found gates for {len(shapes)} of {layers} layers, none for layer "
                              f"{', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}: wanted all")
