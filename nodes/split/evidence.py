"""What a split has done in one sampling, in numbers and as the text under the node."""
from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from torch import Tensor

from .shard import Shard
from .split_attention import Times

WAITS = 1.25
"""A card that needs this many times as long in attention as the fastest one is named."""


class Evidence:
    """The passes of one sampling."""

    def __init__(self, cards: Sequence[str]):
        self.devices = list(cards)
        self.whole: Counter[str] = Counter()
        """Passes that ran on one card, by the reason."""
        self.passes = 0
        """Passes that ran on all."""
        self.given_up = ""
        """Why no further pass of this sampling is tried on several cards."""
        self.tokens: tuple[int, ...] = ()
        self.heads: tuple[int, ...] = ()
        self.sent_bytes = [0] * len(cards)
        self.error: float | None = None
        """Relative L2 of the first pass from the same pass on one card."""
        self.checked = False
        self._times: list[list[Times]] = [[] for _ in cards]

    def on_one_card(self, reason: str) -> None:
        self.whole[reason] += 1

    def add(self, parts: Mapping[int, tuple[Shard, Times]]) -> None:
        """A pass that ran on all cards. parts: what is known of it, by card."""
        self.passes += 1
        for rank, (shard, spent) in parts.items():
            if sum(shard.shares) > sum(self.tokens):
                self.tokens, self.heads = shard.shares, shard.heads
            self.sent_bytes[rank] += shard.group.sent_bytes
            self._times[rank].append(spent)

    def compare(self, out: Tensor, alone: Tensor) -> None:
        """Remember how far the result of all cards is from that of one."""
        out, alone = out.float(), alone.to(out.device).float()
        self.error, self.checked = float((out - alone).norm() / alone.norm().clamp_min(1e-30)), True

    def milliseconds(self, kind: str) -> list[float]:
        """Of each card, per pass, in "exchange" or in "attention"."""
        return [sum(span.milliseconds() for times in passes for span in getattr(times, kind)) / max(1, self.passes)
                for passes in self._times]

    def each(self) -> str:
        """The cards and what each of them has."""
        each = ", ".join(f"{device} {tokens} tokens and {heads} head{'s' * (heads > 1)}" for device, tokens, heads in
                         zip(self.devices, self.tokens, self.heads, strict=True))
        return f"{len(self.devices)} cards: {each}"

    def text(self) -> str:
        """What the user sees under the node."""
        reasons = ", ".join(f"{n} pass{'es' * (n > 1)}: {reason}" for reason, n in self.whole.items())
        if not self.passes:
            return f"NOT SPLIT: every pass ran on {self.devices[0]} alone ({reasons or 'nothing was sampled'})"
        lines = [self.each()]
        exchange, attention = self.milliseconds("exchange"), self.milliseconds("attention")
        sent = max(self.sent_bytes) / self.passes
        lines.append(f"per pass: {sent / 1e6:.1f} MB sent by a card, {max(exchange):.1f} ms in exchange, "
                     f"{max(attention):.1f} ms in attention")
        if self.error is not None:
            lines.append(f"the first pass is {self.error:.1e} from one card's")
        slow = max(range(len(attention)), key=attention.__getitem__)
        if attention[slow] > WAITS * min(attention) > 0:
            lines.append(f"the others wait for {self.devices[slow]}: {attention[slow]:.1f} ms in attention, the "
                         f"fastest card {min(attention):.1f} ms")
        if self.whole:
            lines.append(f"not split: {reasons}")
        return "\n- ".join(lines)
