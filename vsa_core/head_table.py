"""What every head is told, at every step and layer: the table that strategies of windows and of budgets share."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

from .grid import Thw

Assignment = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True)
class HeadTable:
    """choices[assignment[step][layer][head]] is what a head is told. `step` is a part of the schedule."""

    choices: tuple
    assignment: Assignment
    grid: Thw | None = None
    """Token grid that it was made on, as far as known."""
    tile: Thw | None = None
    model: str = ""
    check_choice: ClassVar[Callable]
    """Gives back a choice as it is to be kept; raises ValueError for one that is none."""
    kind: ClassVar[str]
    """A choice in a word."""

    def __post_init__(self):
        choices = tuple(type(self).check_choice(choice) for choice in self.choices)
        table = tuple(tuple(map(tuple, layers)) for layers in self.assignment)
        if not table or not table[0] or not table[0][0]:
            raise ValueError("strategy without steps, layers or heads: wanted at least one of each")
        layers, heads = len(table[0]), len(table[0][0])
        for step, rows in enumerate(table):
            if len(rows) != layers:
                raise ValueError(f"strategy: step {step} has {len(rows)} layers, wanted {layers} as in step 0")
            for layer, row in enumerate(rows):
                if len(row) != heads:
                    raise ValueError(f"strategy: step {step}, layer {layer} has {len(row)} heads, wanted {heads}")
                for head, place in enumerate(row):
                    if type(place) is not int or not 0 <= place < len(choices):
                        raise ValueError(f"strategy: step {step}, layer {layer}, head {head} has {self.kind} number "
                                         f"{place!r}, wanted 0 to {len(choices) - 1}")
        object.__setattr__(self, "choices", choices)
        object.__setattr__(self, "assignment", table)

    @property
    def steps(self) -> int:
        return len(self.assignment)

    @property
    def layers(self) -> int:
        return len(self.assignment[0])

    @property
    def heads(self) -> int:
        return len(self.assignment[0][0])

    def require(self, layers: int | None, heads: int) -> None:
        """Raise ValueError, naming both sides, unless the strategy fits a model. layers None: unknown, not compared."""
        if heads != self.heads or layers not in (None, self.layers):
            made_for = f" ({self.model})" if self.model else ""
            found = f"{heads} heads" if layers is None else f"{layers} layers of {heads} heads"
            raise ValueError(f"the strategy was made for {self.layers} layers of {self.heads} heads{made_for}, this "
                             f"model has {found}: layers and heads cannot be converted. Search one for this model")

    def step_of(self, step: int, steps: int) -> int:
        """The strategy's step for step `step` of a schedule of `steps`: the one at the same fraction of it."""
        if not 0 <= step < steps:
            raise ValueError(f"step {step} of {steps}: wanted 0 to {steps - 1}")
        return (2 * step + 1) * self.steps // (2 * steps)

    def resampled(self, steps: int) -> HeadTable:
        """The strategy for a schedule of another length; layers and heads stay."""
        return replace(self, assignment=tuple(self.assignment[self.step_of(step, steps)] for step in range(steps)))

    @cached_property
    def use_counts(self) -> list[int]:
        """How many heads of all steps and layers have each choice, in the order of the choices."""
        uses = [0] * len(self.choices)
        for layers in self.assignment:
            for row in layers:
                for place in row:
                    uses[place] += 1
        return uses

    @property
    def uses(self) -> dict:
        """The same by choice."""
        return dict(zip(self.choices, self.use_counts, strict=True))
