"""One card's share of the tokens in one forward pass: cut before the first block, whole again behind the last."""
from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ...vsa_core.sequence_parallel import SequenceParallelGroup, even_shares, ranges_of
from ..families import Stack

Rows = tuple[int, ...]
"""How many of some tokens each card has."""


class CannotSplit(Exception):
    """This pass has to run on one card; the message is the reason, in a user's words."""


class Shard:
    """What one card has of the sequence. Every card has one, and all come to the same decisions."""

    def __init__(self, group: SequenceParallelGroup, stacks: Sequence[Stack]):
        self.group, self.stacks = group, stacks
        self.joined: tuple[Rows, ...] | None = None
        """Of the blocks that are running: for every stream of tokens in its attention, each card's rows."""
        self.shares: Rows = ()
        """Tokens of each card, of the longest sequence that was shared."""
        self.heads: Rows = ()
        """Heads of each card."""
        self._rows: dict[tuple[int, str], Rows] = {}
        self._signatures: dict[type, inspect.Signature] = {}

    @property
    def local(self) -> int:
        """Tokens that this card's attention calls have, while `joined`."""
        return sum(rows[self.group.rank_in_group] for rows in self.joined)

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """While it lasts, the blocks of the stacks see this card's tokens, and what comes behind them sees all."""
        with ExitStack() as handles:
            ends: dict[int, Any] = {}
            for number, stack in enumerate(self.stacks):
                for block in stack.blocks:
                    handle = block.register_forward_pre_hook(self._before(number), with_kwargs=True)
                    handles.callback(handle.remove)
                if stack.until is not None:
                    ends.setdefault(id(stack.until), (number, stack.until))
                elif len(stack.blocks):
                    handles.callback(stack.blocks[-1].register_forward_hook(self._behind(number)).remove)
            for number, module in ends.values():
                handle = module.register_forward_pre_hook(self._end(number), with_kwargs=True)
                handles.callback(handle.remove)
            yield

    # -- the hooks ------------------------------------------------------------------------------------------------

    def _before(self, number: int):
        def cut(module, args, kwargs):
            if type(module) not in self._signatures:
                self._signatures[type(module)] = inspect.signature(module.forward)
            signature = self._signatures[type(module)]
            bound = signature.bind(*args, **kwargs)
            rest = next((name for name, parameter in signature.parameters.items()
                         if parameter.kind is parameter.VAR_KEYWORD), None)
            given = {**bound.arguments, **bound.arguments.get(rest, {})}
            self._cut(number, given)
            for name in bound.arguments:
                bound.arguments[name] = given[name]
            if rest in bound.arguments:
                bound.arguments[rest] = {name: given[name] for name in bound.arguments[rest]}
            return bound.args, bound.kwargs
        return cut

    def _behind(self, number: int):
        def whole(module, args, out):
            self.joined = None
            stack = self.stacks[number]
            names = stack.returns or stack.tokens
            if isinstance(out, Tensor):
                return self._gather(out, number, names[0])
            return tuple(self._gather(x, number, name) for x, name in zip(out, names, strict=True))
        return whole

    def _end(self, number: int):
        def whole(module, args, kwargs):
            if self.joined is None:
                return None
            self.joined = None
            return (self._gather(args[0], number, self.stacks[number].tokens[0]), *args[1:]), kwargs
        return whole

    def _gather(self, x: Tensor, number: int, name: str) -> Tensor:
        return self.group.gather(x, self._rows[number, name], self.stacks[number].axis)

    # -- one block's arguments ------------------------------------------------------------------------------------

    def _cut(self, number: int, given: dict[str, Any]) -> None:
        stack = self.stacks[number]
        if missing := [name for name in stack.tokens if not isinstance(given.get(name), Tensor)]:
            raise CannotSplit(f"blocks that are not called with {missing[0]}: another node has changed them")
        for name, what in stack.unknown.items():
            if given.get(name) is not None:
                raise CannotSplit(what)
        for name in stack.tokens:
            if (number, name) not in self._rows:
                self._rows[number, name] = self._shares(stack, name, given)
        rows = {name: self._rows[number, name] for name in stack.tokens}
        for name, own in rows.items():
            given[name] = self._part(given[name], own, stack.axis, name)
        for name, (whose, axis) in stack.along.items():
            if given.get(name) is not None:
                owners = tuple(rows.values()) if whose is None else (rows[whose],)
                given[name] = self._along(given[name], owners, axis, stack.per_frame.get(name), name)
        for name, whose in stack.ranges.items():
            if given.get(name) is not None:
                given[name] = self._ranges(given[name], rows[whose])
        self.joined = tuple(rows.values())
        self.shares = max(self.shares, tuple(map(sum, zip(*self.joined, strict=True))), key=sum)

    def _shares(self, stack: Stack, name: str, given: dict[str, Any]) -> Rows:
        """Each card's rows of a stream: whole frames where something has a row per frame."""
        total, cards = given[name].shape[stack.axis], self.group.world_size
        for other, dimensions in stack.per_frame.items():
            value, (whose, axis) = given.get(other), stack.along[other]
            frames = value.shape[axis] if value is not None and value.ndim == dimensions else 1
            if whose == name and 1 < frames < total:
                if total % frames or frames < cards:
                    raise CannotSplit(f"{frames} timesteps for {total} tokens on {cards} cards")
                return tuple(n * (total // frames) for n in even_shares(frames, cards))
        if len(stack.tokens) == 1 and total < cards:
            raise CannotSplit(f"{total} tokens for {cards} cards")
        return even_shares(total, cards)

    def _mine(self, rows: Rows) -> range:
        return ranges_of(rows)[self.group.rank_in_group]

    def _part(self, x: Tensor, rows: Rows, axis: int, name: str) -> Tensor:
        mine = self._mine(rows)
        if x.shape[axis] == sum(rows):
            return x.narrow(axis, mine.start, len(mine)).clone()        # some hosts add to it in place
        if x.shape[axis] != len(mine):
            raise CannotSplit("tokens that come or go between the blocks")
        return x

    def _along(self, value: Any, owners: tuple[Rows, ...], axis: int, per_frame: int | None, name: str) -> Any:
        """This card's rows of something that has one per token of the streams `owners`, one behind the other."""
        if isinstance(value, tuple | list):
            return type(value)(self._along(x, owners, axis, per_frame, name) for x in value)
        if not isinstance(value, Tensor) or value.shape[axis] == 1 or per_frame not in (None, value.ndim):
            return value
        size, total = value.shape[axis], sum(map(sum, owners))
        if size == sum(len(self._mine(rows)) for rows in owners):
            return value
        if size != total and (per_frame is None or total % size):
            raise CannotSplit(f"{name} of {size} rows for {total} tokens")
        first, parts = 0, []
        for rows in owners:
            mine = self._mine(tuple(n * size // total for n in rows))
            parts.append(value.narrow(axis, first + mine.start, len(mine)))
            first += sum(rows)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=axis)

    def _ranges(self, ranges: Sequence[tuple], rows: Rows) -> list[tuple]:
        """The ranges as this card's rows have them."""
        mine, found = self._mine(rows), []
        for start, stop, *rest in ranges:
            start, stop = max(start, mine.start), min(sum(rows) if stop is None else stop, mine.stop)
            if start < stop:
                found.append((start - mine.start, stop - mine.start, *rest))
        return found
