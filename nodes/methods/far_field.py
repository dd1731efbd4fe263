"""The widget `far_field`: whether the tiles that are not looked at count as one key each."""
from __future__ import annotations

from comfy_api.latest import io

AUTO, ON, OFF = "auto", "on", "off"
FAR_FIELDS = (AUTO, ON, OFF)


def far_field_input():
    return io.Combo.Input(
        "far_field", options=list(FAR_FIELDS), default=AUTO, optional=True, advanced=True,
        tooltip="What a tile does not look at still counts, as one averaged token per tile: closer to the dense result "
                "at nearly no cost. auto: on for models that were not trained with sparse attention, off for those "
                "that were, because they learned to do without.")


def uses_far_field(choice: str, trained_sparse: bool) -> bool:
    """Raises ValueError for a choice that is none."""
    if choice not in FAR_FIELDS:
        raise ValueError(f"far_field {choice!r}: wanted {', '.join(FAR_FIELDS)}")
    return choice == ON or choice == AUTO and not trained_sparse


def warning(choice: str, trained_sparse: bool) -> str:
    """A sentence on a choice that goes against the model's training, or ""."""
    return ("far_field is on, but this model was trained without it: set it to auto"
            if choice == ON and trained_sparse else "")
