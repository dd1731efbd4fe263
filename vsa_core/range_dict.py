"""A dict that is looked up by numbers and may hold ranges of them. Name: FastVideo, sliding_tile_attn.py."""
from __future__ import annotations

from numbers import Integral


class RangeDict(dict):
    """A dict whose keys may be (first, last) ranges of integers, both ends included."""

    def _key_of(self, item):
        """The key that `item` is or lies in, None where there is none."""
        for key in self:
            ranged = isinstance(key, tuple) and isinstance(item, Integral)
            if key[0] <= item <= key[1] if ranged else key == item:
                return key
        return None

    def __contains__(self, item) -> bool:
        return self._key_of(item) is not None

    def get(self, item, default=None):
        key = self._key_of(item)
        return default if key is None else super().__getitem__(key)

    def __getitem__(self, item):
        if (key := self._key_of(item)) is not None:
            return super().__getitem__(key)
        keys = ", ".join(f"{key[0]} to {key[1]}" if isinstance(key, tuple) else str(key) for key in self)
        raise KeyError(f"sequence of {item} tokens: wanted {keys}, or metadata built with raw_latent_shape")
