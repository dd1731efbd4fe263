"""Configurations of VMoBA: FastVideo's JSON, pasted into a node or as a file in models/vmoba_configs."""
from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import folder_paths

from ...vsa_core.chunk_settings import parse_config

log = logging.getLogger(__name__)

FOLDER = "vmoba_configs"


def register_folder() -> None:
    """Tell ComfyUI about models/vmoba_configs; doing it again changes nothing."""
    folder = os.path.join(folder_paths.models_dir, FOLDER)
    folder_paths.add_model_folder_path(FOLDER, folder)
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".json"})
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        log.warning("[VMoBA] models/%s cannot be made: %s", FOLDER, error)


def config_path(text: str) -> Path | None:
    """The file that the widget names, None where its text is no name of a file that is there."""
    name = str(text or "").strip()
    if not name or name.startswith("{"):
        return None
    register_folder()
    if name not in folder_paths.get_filename_list(FOLDER):
        return None
    found = folder_paths.get_full_path(FOLDER, name)
    return None if found is None else Path(found)


def read_config(text: str) -> dict[str, Any]:
    """The settings that the widget holds or names, none for an empty text. Raises ValueError: found, wanted."""
    text = str(text or "").strip()
    if not text:
        return {}
    if text.startswith("{"):
        try:
            return parse_config(text)
        except ValueError as error:
            raise ValueError(f"config: {error}") from error
    path = config_path(text)
    if path is None:
        there = folder_paths.get_filename_list(FOLDER)
        raise ValueError(f"config {text[:80]!r}: wanted JSON that begins with {{, or the name of a file in "
                         f"models/{FOLDER} ({', '.join(there) or 'there is none yet'})")
    try:
        return parse_config(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise ValueError(f"config {path.name}: {error}") from error
