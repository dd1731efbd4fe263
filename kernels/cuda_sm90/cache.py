"""Compiled kernels on disk, so that only the first use on a machine compiles. Losing the folder loses nothing."""
from __future__ import annotations

import hashlib
from pathlib import Path

from ..user_cache import user_cache_folder, write_whole

DIGEST_BYTES = hashlib.sha256().digest_size


class CacheMiss(LookupError):
    """Nothing usable under this key; the message says why."""


def default_folder() -> Path:
    """The user's cache folder of this pack. It need not exist."""
    return user_cache_folder("cubin")


class Cache:
    """Files named by their key, each a SHA-256 digest and then the content it belongs to."""

    def __init__(self, folder: Path | None = None, absent: str = "not built on this machine yet"):
        """absent: what to say of a key that has no file. folder None: `default_folder`."""
        self._folder, self._absent = folder, absent

    @property
    def folder(self) -> Path:
        return self._folder or default_folder()

    def read(self, key: str) -> bytes:
        """The content stored under `key`. Raises CacheMiss."""
        try:
            path = self.folder / key
            stored = path.read_bytes()
        except FileNotFoundError:
            raise CacheMiss(self._absent) from None
        except (OSError, RuntimeError) as error:           # RuntimeError: a user without a home folder
            raise CacheMiss(f"cannot be read: {error}") from None
        digest, content = stored[:DIGEST_BYTES], stored[DIGEST_BYTES:]
        if not content or hashlib.sha256(content).digest() != digest:
            raise CacheMiss(f"{path} is corrupt")
        return content

    def write(self, key: str, content: bytes) -> str | None:
        """Store `content`, all of it or nothing; returns why not, or None. Two writers at once: the later stays."""
        try:
            path = self.folder / key
        except RuntimeError as error:                      # a user without a home folder
            return f"not kept on disk: {error}"
        return write_whole(path, hashlib.sha256(content).digest() + content)
