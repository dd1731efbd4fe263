"""Which safetensors files of a folder are one model: a single file, one sharded set, or what an index names."""
from __future__ import annotations

import json
import re
from pathlib import Path

from .safetensors_file import CheckpointError

SUFFIXES = (".safetensors", ".sft")
PYTORCH = (".pth", ".pt", ".ckpt", ".bin")
"""Files that only the converter reads."""
SHARD = re.compile(r".+-(?P<number>\d{4,6})-of-(?P<total>\d{4,6})\.(?:safetensors|sft)", re.IGNORECASE)
DIFFUSERS_NAME = "diffusion_pytorch_model.safetensors"
INDEX = ".safetensors.index.json"


def is_weights(name: str) -> bool:
    """Whether a file of this name is listed as one of weights; capitals count as small letters, as in ComfyUI."""
    return Path(name).suffix.lower() in SUFFIXES


def is_pytorch(name: str) -> bool:
    """Whether a file of this name is one of PyTorch's."""
    return Path(name).suffix.lower() in PYTORCH


def transformer_folder(folder: Path) -> Path:
    """Where a diffusers folder keeps the transformer's weights: its subfolder of that name, or itself."""
    inner = folder / "transformer"
    return inner if inner.is_dir() else folder


def weights_in(folder: Path) -> list[str]:
    """Names of the weight files directly in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir() if is_weights(path.name) and path.is_file())


def set_of(name: str) -> list[str]:
    """The files of the sharded set that a shard belongs to, or the one file that is no shard."""
    match = SHARD.fullmatch(name)
    if not match:
        return [name]
    first, last = match.span("number")
    return [f"{name[:first]}{number:0{last - first}}{name[last:]}" for number in range(1, int(match["total"]) + 1)]


def files_of_model(folder: Path) -> list[str]:
    """Names of the files of the one model that a folder holds, those that are missing too.

    An index decides, then diffusers' own name, then the only set or file there is.
    Raises CheckpointError for no model, for several, and for an index that cannot be read.
    """
    found = weights_in(folder)
    indexes = {name: sorted(set(index.values())) for name, index in indexes_of(folder).items()}
    # An index outlives its shards where somebody merged them into one file.
    alive = {name: files for name, files in indexes.items() if not found or set(files) & set(found)}
    main = DIFFUSERS_NAME + ".index.json"
    if main in alive or len(alive) == 1:
        return alive.get(main) or next(iter(alive.values()))
    for name in found:
        if name.lower() == DIFFUSERS_NAME:
            return [name]
    sets = {tuple(set_of(name)) for name in found}
    if len(sets) == 1:
        return list(sets.pop())
    names = ", ".join(found) or "no safetensors file"
    raise CheckpointError(f"{folder} holds {names}: wanted {DIFFUSERS_NAME}, one safetensors file, or one sharded set")


def models_in(folder: Path, as_folder: bool = True) -> tuple[bool, list[str]]:
    """(whether the folder stands for a model, names of the files that stand for another each).

    A sharded set is named by its first file that is there. A folder stands for a model only where its files have the
    names that whole folders are published with; as_folder False: it never does.
    """
    found, model = weights_in(folder), []
    published = any(name.lower() == DIFFUSERS_NAME or SHARD.fullmatch(name) for name in found)
    if as_folder and published:
        try:
            model = files_of_model(folder)
        except CheckpointError:
            model = []
    first = {}
    for name in found:
        if name not in model:
            first.setdefault(tuple(set_of(name)), name)
    return bool(model), list(first.values())


def indexes_of(folder: Path) -> dict[str, dict[str, str]]:
    """Index file -> tensor name -> file name. Raises CheckpointError for an index that cannot be read."""
    found = {}
    for path in sorted(folder.glob("*" + INDEX)):
        try:
            weight_map = read_json(path)["weight_map"]
            found[path.name] = {str(key): str(name) for key, name in weight_map.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} cannot be read as an index of shards: {error}") from None
    return found


def read_json(path: Path):
    """What a JSON file holds, in any of JSON's encodings and with a byte-order mark, whatever the system's locale."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
