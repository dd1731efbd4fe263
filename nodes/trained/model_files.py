"""Names in ComfyUI's model folders for the loaders' lists, and the paths behind them."""
from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ...checkpoints.source import DIFFUSERS_NAME, PIPELINE_PARTS, SHARD

LORAS = "loras/"
"""Put before the name of a LoRA file, which is looked up among the LoRAs."""


def model_names() -> list[str]:
    """safetensors files in diffusion_models, without shards, and diffusers folders there and in `diffusers`."""
    files, folders = [], set()
    for name in folder_paths.get_filename_list("diffusion_models"):
        parent, base = Path(name).parent, Path(name).name
        if Path(base).suffix not in (".safetensors", ".sft"):
            continue
        if base == DIFFUSERS_NAME or SHARD.fullmatch(base):
            folders.add(_folder_name(parent))
        else:
            files.append(name)
    for root in folder_paths.get_folder_paths("diffusers"):
        for path, _, names in os.walk(root, followlinks=True):
            if any(name == DIFFUSERS_NAME or SHARD.fullmatch(name) for name in names):
                folders.add(_folder_name(Path(path).relative_to(root)))
    return files + sorted(folder for folder in folders if folder)


def gate_file_names() -> list[str]:
    """`model_names` and the LoRA files, which may carry gates too."""
    return model_names() + [LORAS + name for name in folder_paths.get_filename_list("loras")
                            if name.endswith((".safetensors", ".sft"))]


def model_path(name: str) -> Path:
    """The file or folder of a name from these lists. Raises ValueError when it is gone."""
    if name.startswith(LORAS):
        return Path(folder_paths.get_full_path_or_raise("loras", name.removeprefix(LORAS)))
    found = folder_paths.get_full_path("diffusion_models", name)
    if found is not None:
        return Path(found)
    if name and not Path(name).is_absolute() and ".." not in Path(name).parts:
        for kind in ("diffusion_models", "diffusers"):
            for root in map(Path, folder_paths.get_folder_paths(kind)):
                if (root / name).is_dir():
                    return root / name
    raise ValueError(f"{name} is in none of ComfyUI's folders diffusion_models and diffusers")


def _folder_name(folder: Path) -> str | None:
    """How a folder with diffusers weights is listed; None for the parts of a pipeline that are no transformer."""
    if folder.name.startswith(PIPELINE_PARTS) or folder == Path("."):
        return None
    return (folder.parent if folder.name == "transformer" and folder.parent != Path(".") else folder).as_posix()
