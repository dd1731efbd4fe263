"""A model on disk as one set of tensors: a file, a sharded file, or a diffusers folder."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .folder import files_of_model, indexes_of, read_json, set_of, transformer_folder
from .safetensors_file import CheckpointError, Header, TensorInfo, read_header
from .trained import METADATA_KEY


@dataclass(frozen=True)
class Place:
    """A tensor and the file that holds it."""

    file: Path
    info: TensorInfo
    read: Callable[[], Any] | None = None
    """Gives the tensor where it does not lie in the file as it is; `info` then only says how large it is."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one model under the names in its files."""

    path: Path
    """What was opened: a file or a folder."""
    files: tuple[Path, ...]
    tensors: dict[str, Place]
    metadata: dict[str, str]
    config: dict
    """config.json beside the files, else empty. It may be another model's: what the tensors say wins."""
    remark: str = ""
    """A sentence about something beside the files that could not be used."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.stat().st_size for file in self.files)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a safetensors file, one file of a sharded set, or a folder with either.

    Of a diffusers pipeline the folder `transformer` is taken. Reads headers only, and what a saved model says of its
    training.
    Raises CheckpointError: nothing there, a shard missing, a tensor in two files, a file that is none.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    folder = transformer_folder(path) if path.is_dir() else path.parent
    files = _present(folder, files_of_model(folder) if path.is_dir() else set_of(path.name))
    tensors, metadata = {}, {}
    for file, header in zip(files, map(read_header, files), strict=True):
        _merge(tensors, file, header)
        metadata.update(header.metadata)
    if METADATA_KEY in tensors:
        metadata.setdefault(METADATA_KEY, text_of(METADATA_KEY, tensors.pop(METADATA_KEY)))
    _check_index(files, tensors)
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors")
    return Checkpoint(path, files, tensors, metadata, *_config(folder))


def _merge(tensors: dict[str, Place], file: Path, header: Header) -> None:
    for name, info in header.tensors.items():
        if name in tensors:
            raise CheckpointError(f"{name} is in {tensors[name].file.name} and in {file.name}: wanted every tensor "
                                  f"once. Remove the file that does not belong to {file.parent}")
        tensors[name] = Place(file, info)


def _present(folder: Path, names: list[str]) -> tuple[Path, ...]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise CheckpointError(f"{folder} lacks {shown}: found {len(names) - len(missing)} of "
                              f"{len(names)} files. Download the missing ones")
    return tuple(folder / name for name in names)


def _check_index(files: tuple[Path, ...], tensors: dict[str, Place]) -> None:
    if len(files) < 2:
        return
    names = {file.name for file in files}
    for index in indexes_of(files[0].parent).values():
        missing = sorted(set(index) - set(tensors)) if set(index.values()) <= names else []
        if missing:
            raise CheckpointError(f"{files[0].parent} lacks {len(missing)} tensors that its index names, such as "
                                  f"{missing[0]}. Download the shards again")


def text_of(name: str, place: Place) -> str:
    """What a small tensor of bytes says: ComfyUI keeps texts so beside weights.

    Raises CheckpointError for a tensor that is none.
    """
    if place.info.dtype != "U8" or place.info.numel > 1 << 16:
        raise CheckpointError(f"{place.file}: found {name} of {place.info.numel} {place.info.dtype}, wanted up "
                              f"to {1 << 16} U8")
    with open(place.file, "rb") as file:
        file.seek(place.info.start)
        return file.read(place.info.numel).decode(errors="replace")


def _config(folder: Path) -> tuple[dict, str]:
    """(config.json of a folder, a remark when there is one that is no JSON object)."""
    path = folder / "config.json"
    if not path.is_file():
        return {}, ""
    try:
        config = read_json(path)
    except (OSError, ValueError) as error:
        return {}, f"{path} was left out, it cannot be read: {error}"
    if not isinstance(config, dict):
        return {}, f"{path} was left out: found a JSON {type(config).__name__}, wanted an object"
    return config, ""
