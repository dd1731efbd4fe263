"""Names in ComfyUI's model folders for the loaders' lists, and the paths behind them."""
from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import folder_paths

from ...checkpoints.folder import is_weights, models_in, transformer_folder, weights_in
from ...checkpoints.gate_names import find_gates
from ...checkpoints.plan import plan_of
from ...checkpoints.safetensors_file import CheckpointError
from ...checkpoints.source import open_checkpoint
from .sparse_model import is_video_model

log = logging.getLogger(__name__)

LORAS = "loras/"
"""Put before the name of a LoRA file, which is looked up among the LoRAs."""
MODELS = "diffusion_models/"
"""Put before the name of a model that would otherwise look like one with a prefix."""
KINDS = ("diffusion_models", "diffusers")
OTHER_PARTS = ("vae", "audio", "text_encoder", "image_encoder", "tokenizer", "scheduler", "vocoder", "connectors",
               "latent_upsampl", "upsampl", "spatial_upsampl", "temporal_upsampl", "controlnet", "feature_extractor",
               "image_processor", "safety_checker")
"""How folders of a pipeline that hold no video model begin, for those whose files cannot be read yet."""


def model_names() -> list[str]:
    """Files in diffusion_models, and the published models there and in `diffusers`: folders, or files of some.

    A name is that of a file, of the first file of a sharded set, or of a folder; a pipeline's for its transformer.
    Of published folders only what ComfyUI would know as a video model is named, whatever the folders are called.
    """
    models = [name for name, path in _listed() if path is None or _what_is(path)[0]]
    # A PyTorch file is offered so that choosing it says how to convert it.
    return models + [name for name in folder_paths.get_filename_list("diffusion_models")
                     if name.lower().endswith(".pth")]


def gate_file_names() -> list[str]:
    """`model_names`, files with gates alone, and the LoRA files, which may carry gates too."""
    models = [name for name, path in _listed() if path is None or any(_what_is(path))]
    return [MODELS + name if name.startswith((LORAS, MODELS)) else name for name in models] + [
        LORAS + name for name in folder_paths.get_filename_list("loras") if is_weights(name)]


def model_path(name: str) -> Path:
    """The file or folder of a name from `model_names`. Raises ValueError when it is gone."""
    if Path(name).parts and not Path(name).is_absolute() and ".." not in Path(name).parts:
        places = [Path(root) / name for kind in KINDS for root in folder_paths.get_folder_paths(kind)]
        found = [path for path in places if path.is_file() or path.is_dir()]
        # Of two folders of one name the first that holds a model is meant.
        if found:
            return next((path for path in found if path.is_file() or _stands_for_a_model(path)), found[0])
    raise ValueError(f"{name} is in none of ComfyUI's folders diffusion_models and diffusers")


def gate_file_path(name: str) -> Path:
    """The file or folder of a name from `gate_file_names`. Raises ValueError when it is gone."""
    if name.startswith(LORAS):
        found = folder_paths.get_full_path("loras", name.removeprefix(LORAS))
        if found is not None:
            return Path(found)
    try:
        return model_path(name.removeprefix(MODELS))
    except ValueError:
        if name.startswith(MODELS):       # a folder of this name, as graphs of earlier versions have it
            return model_path(name)
        if name.startswith(LORAS):
            raise ValueError(f"{name.removeprefix(LORAS)} is not in ComfyUI's folder loras") from None
        raise


@dataclass(frozen=True)
class Folder:
    """One folder with weights: how it is listed, and what is in it."""

    path: Path
    name: str | None
    """None for the root of a model folder, and for a folder whose name leads to the `transformer` in it."""
    whole: bool
    """Whether it stands for a model as a whole."""
    files: tuple[str, ...]
    """Files that stand for another model each."""
    published: bool
    """Whether it looks like one that was downloaded whole, whose files need not be models."""

    @classmethod
    def of(cls, path: Path, relative: Path) -> Folder:
        """The folder at `path`, `relative` to its root."""
        name = None
        if relative != Path(".") and not (path / "transformer").is_dir():
            pipeline = relative.name == "transformer" and relative.parent != Path(".")
            name = (relative.parent if pipeline else relative).as_posix()
        try:
            whole, files = models_in(path, as_folder=name is not None)
        except OSError as error:
            log.warning("[VSA] %s cannot be listed: %s", path, error)
            whole, files = False, []
        published = relative != Path(".") and (whole or (path / "config.json").exists()
                                               or (path.parent / "model_index.json").exists())
        return cls(path, name, whole, tuple(files), published)


def _listed() -> Iterator[tuple[str, Path | None]]:
    """(name, path to look into before it is offered, None for a file that ComfyUI's own loader lists alike)."""
    seen: dict[Path, Folder] = {}
    for name in folder_paths.get_filename_list("diffusion_models"):
        path = folder_paths.get_full_path("diffusion_models", name)
        if path is None or not is_weights(name):
            continue
        path = Path(path)
        if path.parent not in seen:
            seen[path.parent] = Folder.of(path.parent, Path(name).parent)
        folder = seen[path.parent]
        if path.name in folder.files:
            yield name, path if folder.published else None
    for root in map(Path, folder_paths.get_folder_paths("diffusers")):
        for path, _, _ in os.walk(root, followlinks=True):
            folder = seen[Path(path)] = Folder.of(Path(path), Path(path).relative_to(root))
            for file in folder.files:
                yield (folder.path / file).relative_to(root).as_posix(), folder.path / file
    whole: dict[str, Path] = {}
    for folder in seen.values():
        if folder.whole:
            whole.setdefault(folder.name, folder.path)
    yield from sorted(whole.items())


def _stands_for_a_model(path: Path) -> bool:
    return Folder.of(transformer_folder(path), Path(path.name)).whole


def _what_is(path: Path) -> tuple[bool, bool]:
    """(whether a file or folder is a video model, whether it holds gates), read anew when a file has changed."""
    folder = path if path.is_dir() else path.parent
    try:
        stats = [(name, (folder / name).stat()) for name in (*weights_in(folder), "config.json")
                 if (folder / name).exists()]
        return _look(path, tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
    except OSError:
        return False, False


@lru_cache(maxsize=4096)
def _look(path: Path, state: tuple) -> tuple[bool, bool]:
    """`_what_is` for files in this state (names, sizes, times)."""
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError:
        # Half a download is offered: choosing it says what is missing.
        folder = path if path.is_dir() else path.parent
        return not folder.name.lower().startswith(OTHER_PARTS), False
    gates = bool(find_gates(checkpoint.tensors))
    try:
        return is_video_model(plan_of(checkpoint)), gates
    except CheckpointError as error:
        log.info("[VSA] not offered as a model: %s", error)
        return False, gates
