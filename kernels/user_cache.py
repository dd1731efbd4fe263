"""Where this pack keeps what it has made on a user's machine. Losing the folder loses nothing but time."""
from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_cache_folder(name: str) -> Path:
    """The folder `name` in the user's cache folder of this pack. It need not exist.

    Raises RuntimeError for a user without a home folder.
    """
    if os.name == "nt":
        root = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    else:
        root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "video_sparse_attention", name)


def write_whole(path: Path, content: bytes) -> str | None:
    """Store `content`, all of it or nothing; returns why not, or None. Two writers at once: the later stays."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(content)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if temporary is not None and os.path.exists(temporary):
            try:
                os.unlink(temporary)
            except OSError:
                pass
        return f"not kept on disk: {error}"
    return None
