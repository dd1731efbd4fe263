"""Where the video tokens lie in a sequence."""
from __future__ import annotations

import math
from dataclasses import dataclass

Thw = tuple[int, int, int]
"""Three numbers in the order time, height, width."""


@dataclass(frozen=True)
class TokenGrid:
    """A sequence of `prefix` other tokens, then t*h*w video tokens in raster order, then `suffix` other tokens."""

    thw: Thw
    prefix: int = 0
    suffix: int = 0
    hidden: tuple[int, ...] = ()
    """Other tokens that no query sees, such as masked text: ascending places among them, prefix first."""

    def __post_init__(self):
        if len(self.thw) != 3 or min(self.thw) < 1:
            raise ValueError(f"token grid {'x'.join(map(str, self.thw))}: wanted three axes of at least 1 token")
        if self.prefix < 0 or self.suffix < 0:
            raise ValueError(f"token grid with prefix {self.prefix} and suffix {self.suffix}: wanted 0 or more")
        if self.hidden and not (sorted(set(self.hidden)) == list(self.hidden)
                                and 0 <= self.hidden[0] and self.hidden[-1] < self.num_other_tokens):
            raise ValueError(f"token grid hides {list(self.hidden)}: wanted ascending places among its "
                             f"{self.num_other_tokens} tokens that are not video")

    @property
    def num_video_tokens(self) -> int:
        return math.prod(self.thw)

    @property
    def num_other_tokens(self) -> int:
        return self.prefix + self.suffix

    @property
    def num_tokens(self) -> int:
        return self.num_video_tokens + self.num_other_tokens
