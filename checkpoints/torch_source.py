"""What only the converter reads: PyTorch files, and TurboDiffusion's int8 weights, as a checkpoint like any other.

A PyTorch file is a pickle, which could run code: `torch.load` takes tensors and nothing else (weights_only), and maps
the file, so that no more than one tensor is in memory. TurboDiffusion keeps a linear layer of its `-quant` files as
`int8_weight` [N, K] and `scale` [ceil(N / 128), ceil(K / 128)], one for every 128 x 128 weights
(its Int8Linear): weight = int8_weight * scale.
"""
from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .folder import is_pytorch
from .safetensors_file import CheckpointError, TensorInfo
from .source import Checkpoint, Place, open_checkpoint

INSIDE = ("state_dict", "model", "module", "generator", "ema")
"""Where training code puts the weights within a file."""
OUTSIDE = ("net.", "module.", "model.net.")
"""What training code puts before all names."""
INT8, SCALE, SIDE = ".int8_weight", ".scale", 128


def open_for_conversion(path: Path) -> Checkpoint:
    """`open_checkpoint` that takes PyTorch files and int8 weights too; the latter as the bf16 weights they stand for.

    Raises CheckpointError as there, for a PyTorch file that is none, is cut short or holds more than tensors, and for
    int8 weights without scales that fit.
    """
    path = Path(path)
    checkpoint = _open_pytorch(path) if path.is_file() and is_pytorch(path.name) else open_checkpoint(path)
    return _dequantised(checkpoint)


def bytes_of(tensor) -> memoryview:
    """A tensor's numbers as they stand in a safetensors file."""
    import torch
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _open_pytorch(path: Path) -> Checkpoint:
    state = _weights_in(_loaded(path), path)
    for prefix in OUTSIDE:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    dtypes, tensors, offset = _dtype_names(), {}, 0
    for name, tensor in state.items():
        if tensor.dtype not in dtypes:
            raise CheckpointError(f"{path}: {name} holds {tensor.dtype}, which safetensors cannot: wanted plain "
                                  "numbers")
        size = tensor.numel() * tensor.element_size()
        info = TensorInfo(dtypes[tensor.dtype], tuple(tensor.shape), offset, offset + size)
        tensors[name], offset = Place(path, info, lambda tensor=tensor: tensor), offset + size
    return Checkpoint(path, (path,), tensors, {}, {})


def _loaded(path: Path):
    try:
        import torch
    except ImportError:
        raise CheckpointError(f"{path} is a PyTorch file, which torch has to read: run this with ComfyUI's "
                              "Python") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} holds more than tensors, which could run code when it is read: refused. Wanted "
                              "a file of weights alone") from None
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path} cannot be read as a PyTorch file ({first}): it may be cut short. Download it "
                              "again") from None


def _weights_in(loaded: Any, path: Path) -> dict[str, Any]:
    import torch
    found = loaded
    for _ in range(3):
        if not isinstance(found, Mapping) or any(isinstance(value, torch.Tensor) for value in found.values()):
            break
        found = next((found[name] for name in INSIDE if isinstance(found.get(name), Mapping)), None)
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} holds no weights by name: found {type(loaded).__name__}, wanted a state dict")
    state = {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds no tensors")
    return state


def _dtype_names() -> dict[Any, str]:
    import torch
    return {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
            torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
            torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2"}


def _dequantised(checkpoint: Checkpoint) -> Checkpoint:
    """The same with a bf16 `weight` in place of every `int8_weight` and its `scale`."""
    tensors = dict(checkpoint.tensors)
    for name in [name for name in tensors if name.endswith(INT8)]:
        stem = name.removesuffix(INT8)
        numbers, scale = tensors.pop(name), tensors.pop(stem + SCALE, None)
        shape = numbers.info.shape
        blocks = tuple(-(-side // SIDE) for side in shape)
        found = None if scale is None else (scale.info.dtype, scale.info.shape)
        if len(shape) != 2 or numbers.info.dtype != "I8" or found != ("F32", blocks):
            told = "no scale" if scale is None else f"scale {list(scale.info.shape)} {scale.info.dtype}"
            raise CheckpointError(f"{checkpoint.path}: {name} is {list(shape)} {numbers.info.dtype} with {told}: "
                                  f"wanted [N, K] I8 with scale {list(blocks)} F32, one for {SIDE} x {SIDE} weights")
        if stem + ".weight" in tensors:
            raise CheckpointError(f"{checkpoint.path} holds {name} and {stem}.weight: wanted one of both")
        info = replace(numbers.info, dtype="BF16", end=numbers.info.start + 2 * numbers.info.numel)
        tensors[stem + ".weight"] = Place(numbers.file, info, _weight(numbers, scale))
    return checkpoint if tensors.keys() == checkpoint.tensors.keys() else replace(checkpoint, tensors=tensors)


def _weight(numbers: Place, scale: Place) -> Callable[[], Any]:
    def read():
        import torch
        rows, columns = numbers.info.shape
        values = _tensor(numbers, torch.int8).float()
        wide = _tensor(scale, torch.float32).repeat_interleave(SIDE, 0)[:rows].repeat_interleave(SIDE, 1)[:, :columns]
        return values.mul_(wide).to(torch.bfloat16)
    return read


def _tensor(place: Place, dtype):
    """A tensor that lies in the file as it is, or that the file's reader gives."""
    import torch
    if place.read is not None:
        return place.read()
    with open(place.file, "rb") as file:
        file.seek(place.info.start)
        raw = file.read(place.info.end - place.info.start)
    if len(raw) < place.info.end - place.info.start:
        raise CheckpointError(f"{place.file} ended while it was read")
    return torch.frombuffer(bytearray(raw), dtype=dtype).view(place.info.shape)
