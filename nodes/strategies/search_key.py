"""What the measurements of a search depend on, as one key: equal for equal content, in another process too.

Model and conditioning reach a node as Python objects of many packs. They are read by what is in them: numbers, texts
and tensors, in containers, closures and attributes; never by address. What cannot be read counts by its type.
"""
from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import comfy.model_patcher
import numpy
import torch
from torch import Tensor

from ..hook.hook import SparseAttentionHook

VERSION = 2
"""Counts up when measurements of an earlier version can no longer be gone on with."""
DEPTH, WHOLE, SAMPLED = 12, 4096, 256
"""Levels that are read; elements up to which a weight is read whole, and how many of a larger one are read."""
PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, PurePath, Enum,
         slice, range, numpy.generic)


def search_key(model, *inputs: Any) -> str:
    """Hex digits for a ModelPatcher with everything that patches it, and the other inputs of a search."""
    reader = _Reader()
    reader.read(VERSION)
    reader.patcher(model, whole=True)
    for value in inputs:
        reader.read(value)
    return reader.digest.hexdigest()[:32]


class _Reader:
    """Feeds values into one digest. Objects that were read before are named by their place."""

    def __init__(self):
        self.digest, self.seen, self.depth, self.sampling = hashlib.sha256(), {}, 0, False

    def patcher(self, model, whole: bool) -> None:
        """A ModelPatcher: its weights as they are without patches, the patches, and with `whole` all the rest."""
        base = model.model
        # While a model is loaded its object patches stand in it; they are read as what they are, below.
        replaced = tuple(f"{name}." for name in ("model_sampling", *model.object_patches))
        self._say("patcher", type(base).__qualname__, str(getattr(base, "manual_cast_dtype", None)))
        with self._some_of_each():
            for name, ((weight, _), *patches) in sorted(model.get_key_patches().items()):
                if name.startswith(replaced):
                    continue
                self._say(name)
                self.read(weight)
                self.read(patches)
        if whole:
            self.read(model.get_model_object("model_sampling") if hasattr(base, "model_sampling") else None)
            for part in (model.object_patches, model.model_options, model.wrappers, model.callbacks, model.injections,
                         model.attachments):
                self.read(part)
            for key, patchers in sorted(model.additional_models.items()):
                self._say(key)
                for other in patchers:
                    self.patcher(other, whole=False)

    @contextmanager
    def _some_of_each(self):
        """Weights are too many to be read whole; some elements of every one tell models apart."""
        before, self.sampling = self.sampling, True
        try:
            yield
        finally:
            self.sampling = before

    def read(self, value: Any) -> None:
        """Any value, whatever it is."""
        if self.depth > DEPTH:
            self._say("deep", type(value).__qualname__)
            return
        self.depth += 1
        try:
            self._read(value)
        finally:
            self.depth -= 1

    def _read(self, value: Any) -> None:
        self._say("tensor" if isinstance(value, Tensor) else type(value).__qualname__)     # a Parameter is one too
        if isinstance(value, PLAIN):
            self._say(str(value) if isinstance(value, PurePath) else repr(value))
        elif isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, numpy.ndarray):
            self._say(str(value.shape), str(value.dtype))
            self.digest.update(value.tobytes() if value.dtype != object else b"objects")
        elif isinstance(value, (list, tuple)):
            self._say(len(value))
            for part in value:
                self.read(part)
        elif isinstance(value, (set, frozenset)):
            self._say(*sorted(_Reader.of(part) for part in value))
        elif isinstance(value, (dict, Mapping)):
            self._say(len(value))
            for key in sorted(value, key=_name):
                self._say(_name(key))
                self.read(value[key])
        elif id(value) in self.seen:
            self._say("seen", self.seen[id(value)][0])
        else:
            self.seen[id(value)] = len(self.seen), value      # kept alive: no other object takes its id meanwhile
            self._object(value)

    @classmethod
    def of(cls, value: Any) -> str:
        reader = cls()
        reader.read(value)
        return reader.digest.hexdigest()

    def _object(self, value: Any) -> None:
        hook = value if isinstance(value, SparseAttentionHook) else getattr(value, "sparse_attention_hook", None)
        if isinstance(hook, SparseAttentionHook):
            self.read((hook.method, hook.settings))
        elif isinstance(value, comfy.model_patcher.ModelPatcher):
            self.patcher(value, whole=False)
        elif isinstance(value, types.MethodType):
            self._say(value.__qualname__)
            self.read(value.__self__)
        elif isinstance(value, types.FunctionType):
            self._say(value.__module__, value.__qualname__, value.__code__.co_code)
            self.read((value.__defaults__, value.__kwdefaults__, [_inside(cell) for cell in value.__closure__ or ()]))
        elif isinstance(value, functools.partial):
            self.read((value.func, value.args, value.keywords))
        elif isinstance(value, torch.nn.Module):
            with self._some_of_each():
                self.read(value.state_dict())
            self.read(_settings(vars(value)))
        elif is_dataclass(value) and not isinstance(value, type):
            self.read({field.name: getattr(value, field.name) for field in fields(value)})
        elif isinstance(value, (type, types.BuiltinFunctionType, types.ModuleType)):
            self._say(getattr(value, "__qualname__", value.__name__))
        else:
            self.read(_settings(getattr(value, "__dict__", {})))

    def _tensor(self, x: Tensor) -> None:
        self._say(str(tuple(x.shape)), str(x.dtype))
        try:
            flat = x.detach().reshape(-1)
            if self.sampling and flat.numel() > WHOLE:
                flat = flat[::flat.numel() // SAMPLED]
            self.digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        except Exception:      # a tensor of another pack's own kind may refuse anything
            self._say("unreadable")

    def _say(self, *words: Any) -> None:
        for word in words:
            raw = word if isinstance(word, bytes) else str(word).encode()
            self.digest.update(len(raw).to_bytes(8, "little") + raw)


def _name(key: Any) -> str:
    return f"{type(key).__qualname__} {key!r}" if isinstance(key, PLAIN) else type(key).__qualname__


def _inside(cell) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _settings(attributes: dict[str, Any]) -> dict[str, Any]:
    """The attributes that a user or another node may have set."""
    return {name: value for name, value in attributes.items() if not name.startswith("_")}
