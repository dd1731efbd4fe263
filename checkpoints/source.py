"""A model on disk as one set of tensors: a file, a sharded file, or a diffusers folder."""
from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from .safetensors_file import CheckpointError, Header, TensorInfo, read_header

SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{4,6})-of-(?P<total>\d{4,6})(?P<suffix>\.safetensors|\.sft)")
DIFFUSERS_NAME = "diffusion_pytorch_model.safetensors"
PIPELINE_PARTS = ("vae", "text_encoder", "image_encoder", "tokenizer", "scheduler")
"""Folders of a diffusers pipeline (by the start of their names) that hold no transformer."""


@dataclass(frozen=True)
class Place:
    """A tensor and the file that holds it."""

    file: Path
    info: TensorInfo


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model under the names in its files."""

    path: Path
    """What was opened: a file or a folder."""
    files: tuple[Path, ...]
    tensors: dict[str, Place]
    metadata: dict[str, str]
    config: dict
    """config.json of a diffusers folder, else empty."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a safetensors file, one file of a sharded set, or a folder with either.

    Of a diffusers pipeline the folder `transformer` is taken. Reads headers only.
    Raises CheckpointError: nothing there, a shard missing, a tensor in two files, a file that is none.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    files = _files_of_folder(path) if path.is_dir() else _files_of_file(path)
    tensors, metadata = {}, {}
    for file, header in zip(files, map(read_header, files), strict=True):
        _merge(tensors, file, header)
        metadata.update(header.metadata)
    _check_index(files, tensors)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return Checkpoint(path, files, tensors, metadata, _config(files[0].parent))


def transformer_folder(folder: Path) -> Path:
    """Where a diffusers folder keeps the transformer's weights: its subfolder of that name, or itself."""
    inner = folder / "transformer"
    return inner if inner.is_dir() else folder


def _merge(tensors: dict[str, Place], file: Path, header: Header) -> None:
    for name, info in header.tensors.items():
        if name in tensors:
            raise CheckpointError(f"{name} is in {tensors[name].file.name} and in {file.name}: wanted every tensor "
                                  f"once. Remove the file that does not belong to {file.parent}")
        tensors[name] = Place(file, info)


def _files_of_file(path: Path) -> tuple[Path, ...]:
    match = SHARD.fullmatch(path.name)
    return _shards(path.parent, match) if match else (path,)


def _files_of_folder(folder: Path) -> tuple[Path, ...]:
    folder = transformer_folder(folder)
    index = _index(folder)
    if index is not None:
        return _present(folder, sorted(set(index.values())))
    found = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".sft"))
    if folder / DIFFUSERS_NAME in found:
        return (folder / DIFFUSERS_NAME,)
    matches = {path: SHARD.fullmatch(path.name) for path in found}
    sets = {(match["stem"], match["total"]): match for match in matches.values() if match}
    if len(sets) == 1 and all(matches.values()):
        return _shards(folder, next(iter(sets.values())))
    if len(found) == 1:
        return (found[0],)
    names = ", ".join(path.name for path in found) or "no safetensors file"
    raise CheckpointError(f"{folder} holds {names}: wanted {DIFFUSERS_NAME}, one safetensors file, or one sharded set")


def _shards(folder: Path, match: re.Match) -> tuple[Path, ...]:
    total, digits = int(match["total"]), len(match["number"])
    return _present(folder, [f"{match['stem']}-{number:0{digits}}-of-{match['total']}{match['suffix']}"
                             for number in range(1, total + 1)])


def _present(folder: Path, names: list[str]) -> tuple[Path, ...]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}: found {len(names) - len(missing)} of "
                              f"{len(names)} files. Download the missing ones")
    return tuple(folder / name for name in names)


def _index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> file name, as the folder's index says; None when there is no index."""
    found = sorted(folder.glob("*.safetensors.index.json"))
    if not found:
        return None
    try:
        weight_map = json.loads(found[0].read_text())["weight_map"]
        return {str(key): str(name) for key, name in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{found[0]} cannot be read as an index of shards: {error}") from None


def _check_index(files: tuple[Path, ...], tensors: dict[str, Place]) -> None:
    missing = sorted(set(_index(files[0].parent) or {}) - set(tensors)) if len(files) > 1 else []
    if missing:
        raise CheckpointError(f"{files[0].parent} lacks {len(missing)} tensors that its index names, such as "
                              f"{missing[0]}. Download the shards again")


def _config(folder: Path) -> dict:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
