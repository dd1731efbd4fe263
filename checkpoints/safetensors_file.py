"""The header of a safetensors file, checked against the file: names, shapes, places, metadata. No tensor is read.

Format: eight bytes with the header's length, the header as JSON, then the tensors' bytes.
"""
from __future__ import annotations

import json
import math
import operator
from dataclasses import dataclass
from pathlib import Path

DTYPE_BYTES = {
    "C64": 8, "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "F8_E8M0": 1, "I8": 1, "U8": 1, "BOOL": 1}
LARGEST_HEADER = 100_000_000
ZIP = b"PK\x03\x04"
OTHER_FORMATS = {b"GGUF": "a GGUF file", ZIP: "a PyTorch file (.pt, .pth or .ckpt)",
                 b"\x80\x02": "a pickle file", b"<!DO": "a web page", b"vers": "a Git LFS pointer, not the weights"}


HOW_TO_CONVERT = ("in the folder of this pack, with ComfyUI's Python, run: python -m checkpoints.convert {} "
                  "{}.safetensors")


def how_to_convert(path: Path) -> str:
    """The command that makes a file that the loader reads."""
    return HOW_TO_CONVERT.format(path, Path(path).with_suffix(""))


class CheckpointError(ValueError):
    """A file or folder that does not hold what it should: what was found, what was wanted."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `start` and `end` count bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises CheckpointError when the file is missing, cannot be read, is of another format, or is cut short.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start.startswith(tuple(OTHER_FORMATS)) or len(start) < 8 or not 2 <= length <= LARGEST_HEADER:
                cure = f". Convert it: {how_to_convert(path)}" if start.startswith(ZIP) else ""
                raise CheckpointError(f"{path} is no safetensors file: found {_format_of(start, size)}{cure}")
            raw = file.read(length)
    except PermissionError:
        raise CheckpointError(f"{path} cannot be read: no permission. Change the file's permissions") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(raw) < length:
        raise CheckpointError(f"{path} is cut short: {size} bytes, its header alone takes {8 + length}. "
                              "Download it again")
    try:
        content = json.loads(raw)
        metadata = content.pop("__metadata__", None)
        tensors = {name: _tensor(entry, 8 + length) for name, entry in content.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is no safetensors file: its header cannot be read") from None
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} is damaged: its __metadata__ is a JSON {type(metadata).__name__}, wanted an "
                              "object of texts. Save or download it again")
    metadata = {name: value if isinstance(value, str) else json.dumps(value) for name, value in metadata.items()}
    _check_sizes(path, tensors, size, 8 + length)
    return Header(tensors, metadata)


def _tensor(entry: dict, first: int) -> TensorInfo:
    """An entry of a header whose data begin at byte `first`. Raises KeyError, TypeError or ValueError for none."""
    start, end = map(operator.index, entry["data_offsets"])
    shape = tuple(map(operator.index, entry["shape"]))
    if not isinstance(entry["dtype"], str) or any(side < 0 for side in shape) or not 0 <= start <= end:
        raise ValueError(entry)
    return TensorInfo(entry["dtype"], shape, first + start, first + end)


def _check_sizes(path: Path, tensors: dict[str, TensorInfo], size: int, first: int) -> None:
    wanted = max((info.end for info in tensors.values()), default=first)
    if size < wanted:
        raise CheckpointError(f"{path} is cut short: {size} bytes, its header names {wanted}. Download it again")
    for name, info in tensors.items():
        bytes_each = DTYPE_BYTES.get(info.dtype)
        if info.start < first or bytes_each and info.end - info.start != info.numel * bytes_each:
            raise CheckpointError(f"{path} is damaged: {name} is said to hold {list(info.shape)} {info.dtype} in "
                                  f"{info.end - info.start} bytes")


def _format_of(start: bytes, size: int) -> str:
    if not size:
        return "an empty file"
    return next((name for magic, name in OTHER_FORMATS.items() if start.startswith(magic)), "something else")
