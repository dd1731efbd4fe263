"""What is sent to a process that has never seen this pack: a function that loads it there and hands the model on.

Nothing here may refer to another module of the pack.
"""
from __future__ import annotations

from typing import Any

NAME = "video_sparse_attention_in_worker"
"""What the pack is called in that process."""


def in_worker(folder: str, settings: dict[str, Any]):
    """A function of a ModelPatcher for `model_function_runner` of a Raylight actor, which is sent by value.

    folder: of the pack, on the worker's machine too.   settings: as `raylight.installed` takes them.
    """
    name = NAME

    def install(model):
        import importlib.util
        import sys
        from pathlib import Path
        if name not in sys.modules:
            init = Path(folder) / "__init__.py"
            if not init.exists():
                raise FileNotFoundError(f"this worker's machine has no {folder}: install the pack there too, in the "
                                        "same folder")
            spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[folder])
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
        return importlib.import_module(f"{name}.nodes.split.raylight").installed(model, settings)

    install.__module__ = "__main__"
    return install
