"""The widget `preset`: settings that follow the model, and the table that nodes, help and README share."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from comfy_api.latest import io

from ...checkpoints.trained import Trained
from ..hook.settings import FEW_STEPS

AUTO, CUSTOM = "auto", "custom"


class Preset(NamedTuple):
    """For models that were not trained with sparse attention, whose sampling has more than a few steps."""

    sparsity: float
    window: str
    start_percent: float


PRESETS = {"safe": Preset(0.7, "1.0x0.7x0.7", 0.3), "balanced": Preset(0.8, "1.0x0.5x0.5", 0.2),
           "fast": Preset(0.9, "0.7x0.4x0.4", 0.15)}
CHOICES = (AUTO, *PRESETS, CUSTOM)


@dataclass(frozen=True)
class Chosen:
    """What a preset makes of the widgets."""

    widgets: dict[str, Any]
    """All widgets that it was given, as they are to be used."""
    said: str = ""
    """What the user is told, "" where nothing differs from the widgets."""
    few_steps: bool = False
    """Whether a short schedule has at most one dense step at its start."""


def preset_input(first: str, trains: bool):
    """first: the widget that auto leaves to the user.   trains: whether there are models trained with the method."""
    follows = "the rest follows the model: one that was trained with this method runs as it was trained, and "
    return io.Combo.Input(
        "preset", options=list(CHOICES), default=AUTO, optional=True,
        tooltip=f"auto: {first} counts, and {follows if trains else ''}with up to {FEW_STEPS} steps at most the first "
                f"one is dense. safe, balanced and fast set {first} and the dense start for you. custom takes every "
                "input as it stands.")


def choose(preset: str, widgets: dict[str, Any], defaults: dict[str, Any], wanted: dict[str, Any],
           trained: Trained | None) -> Chosen:
    """The widgets as a preset has them.

    widgets: name -> value, of those that a preset may set; defaults: the same as a new node has them.
    wanted: what the model was trained with, where `trained`, else what the table says for this preset.
    Raises ValueError for a preset that is none.
    """
    if preset not in CHOICES:
        raise ValueError(f"preset {preset!r}: wanted {', '.join(CHOICES)}")
    if preset == CUSTOM:
        return Chosen(widgets)
    set_by_user = {name for name, value in widgets.items() if value != defaults[name]}
    taken = {name: value for name, value in wanted.items() if value != widgets[name]}
    if preset == AUTO:
        taken = {name: value for name, value in taken.items() if name not in set_by_user}
    overruled = sorted(set_by_user & set(taken))
    said = ""
    if taken or preset != AUTO:
        why = f" ({trained.name} was trained so)" if trained else ""
        said = f"preset {preset}: {_listed(wanted if preset != AUTO else taken)}{why}"
    if overruled:
        said += f"; not used: {_listed({name: widgets[name] for name in overruled})}. Choose custom to use it"
    return Chosen({**widgets, **taken}, said, preset != AUTO or "start_percent" not in set_by_user)


def as_trained(trained: Trained) -> dict[str, Any]:
    """The widgets of a model that was trained with VSA, as far as its training is known."""
    known = {"sparsity": trained.sparsity, "start_percent": 0.0, "end_percent": 1.0, "dense_blocks": ""}
    return {name: value for name, value in known.items() if value is not None}


def _listed(widgets: dict[str, Any]) -> str:
    def value(of) -> str:
        return f"{of:g}" if isinstance(of, float) else str(of) or "none"
    return ", ".join(f"{name} {value(of)}" for name, of in widgets.items())
