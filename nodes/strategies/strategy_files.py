"""The nodes that load and save a strategy, windows or budgets, and the folders they look in."""
from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ...vsa_core.budgets import Budgets
from ...vsa_core.strategy_files import load_strategy, save_strategy
from ...vsa_core.window import check_window
from ..methods.strategy_input import StrategyType

log = logging.getLogger(__name__)

FOLDER = "sta_strategies"
NO_FILE = "(put a .json into models/sta_strategies)"


def register_folders() -> None:
    """Tell ComfyUI about models/sta_strategies and output/sta_strategies; doing it again changes nothing."""
    for root in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(FOLDER, os.path.join(root, FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {".json"})


def strategy_names() -> list[str]:
    """Files that the load node offers; one placeholder that says what to do when there are none."""
    register_folders()
    found = folder_paths.get_filename_list(FOLDER)
    if not found:
        try:
            os.makedirs(os.path.join(folder_paths.models_dir, FOLDER), exist_ok=True)
        except OSError as error:
            log.warning("[STA] models/%s cannot be made: %s", FOLDER, error)
    return found or [NO_FILE]


def parse_tiles(text: str):
    """The grid in tiles that "5x6x10" names, None for an empty text. Raises ValueError: found, wanted."""
    if not str(text or "").strip():
        return None
    parts = re.fullmatch(r"\s*(\d+)\s*[x×,]\s*(\d+)\s*[x×,]\s*(\d+)\s*", str(text))
    if not parts:
        raise ValueError(f"grid_tiles {text!r}: wanted tiles along time x height x width, such as 5x6x10, or nothing")
    return check_window([int(n) for n in parts.groups()])


class LoadSTAStrategy(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LoadSTAStrategy",
            display_name="Load Sparse Attention Strategy",
            category="model/loaders",
            description=(
                "Reads a strategy: windows for Sliding Tile Attention, in FastVideo's JSON or this pack's own, or "
                "budgets for Video Sparse Attention, from models/sta_strategies or output/sta_strategies."),
            search_aliases=["mask strategy", "STA", "VSA", "budgets", "Load STA Strategy"],
            inputs=[
                io.Combo.Input("strategy_name", options=strategy_names(),
                               tooltip="A .json file in models/sta_strategies or output/sta_strategies."),
                io.String.Input(
                    "grid_tiles", default="", optional=True, advanced=True,
                    tooltip="Only for FastVideo's form: how many tiles the clip had that the file was made for, such "
                            "as 5x6x10. Empty: told from the widest window, which the published files need."),
            ],
            outputs=[StrategyType.Output("strategy"), io.String.Output("description")],
        )

    @classmethod
    def validate_inputs(cls, strategy_name=None):
        if strategy_name == NO_FILE:
            return (f"there is no strategy yet: put a .json file into models/{FOLDER}, or make one with STA Strategy "
                    "Search or Calibrate Sparse Attention")
        if strategy_name is not None and strategy_name not in folder_paths.get_filename_list(FOLDER):
            return (f"strategy file {strategy_name!r} is not in models/{FOLDER} nor in output/{FOLDER}: put it there "
                    "and refresh the page")
        return True

    @classmethod
    def fingerprint_inputs(cls, strategy_name, grid_tiles=""):
        path = folder_paths.get_full_path(FOLDER, strategy_name)
        return (strategy_name, grid_tiles, os.path.getmtime(path) if path else None)

    @classmethod
    def execute(cls, strategy_name, grid_tiles="") -> io.NodeOutput:
        strategy = load_strategy(folder_paths.get_full_path_or_raise(FOLDER, strategy_name), parse_tiles(grid_tiles))
        return io.NodeOutput(strategy, describe(strategy))


class SaveSTAStrategy(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SaveSTAStrategy",
            display_name="Save Sparse Attention Strategy",
            category="model/loaders",
            description="Writes a strategy to output/sta_strategies, where Load Sparse Attention Strategy finds it.",
            search_aliases=["mask strategy", "STA", "VSA", "budgets", "Save STA Strategy"],
            is_output_node=True,
            inputs=[
                StrategyType.Input("strategy", tooltip="A strategy from a search, or one that was loaded."),
                io.String.Input("filename_prefix", default="strategy",
                                tooltip="The file is called prefix_00001_.json, counting up: nothing is overwritten."),
                io.String.Input(
                    "grid_tiles", default="", optional=True, advanced=True,
                    tooltip="Empty: this pack's form, which fits any resolution. Tiles such as 5x6x10: FastVideo's "
                            "form for a clip of so many tiles."),
            ],
            outputs=[io.String.Output("path")],
        )

    @classmethod
    def validate_inputs(cls, grid_tiles=None):
        try:
            parse_tiles(grid_tiles)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, strategy, filename_prefix="strategy", grid_tiles="") -> io.NodeOutput:
        path = write_strategy(strategy, filename_prefix, parse_tiles(grid_tiles))
        text = f"saved {path.name}: {describe(strategy)}"
        return io.NodeOutput(str(path), ui={"text": [text]})


def unused(folder: Path, name: str, counter: int, root: Path) -> Path:
    """The first of name_00001_.json, name_00002_.json, ... from `counter` on that no strategy folder has yet.

    folder: below `root`, the strategy folder that is written to; what another has would be loaded in its place.
    """
    register_folders()
    folders = [Path(other) / folder.relative_to(root) for other in folder_paths.get_folder_paths(FOLDER)]
    # ComfyUI before 0.21 counts by the trailing underscore, which earlier versions of this pack did not write.
    while any((other / f"{name}_{counter:05}{end}").exists() for other in folders for end in ("_.json", ".json")):
        counter += 1
    return folder / f"{name}_{counter:05}_.json"


def write_strategy(strategy, prefix: str, tiles=None) -> Path:
    """Writes a strategy to output/sta_strategies under a name that no strategy file has -> its path.

    tiles: in FastVideo's form, for a clip of so many; None: in this pack's.
    """
    root = os.path.join(folder_paths.get_output_directory(), FOLDER)
    os.makedirs(root, exist_ok=True)
    folder, name, counter, _, _ = folder_paths.get_save_image_path(prefix, root)
    path = unused(Path(folder), name, counter, Path(root))
    save_strategy(strategy, path, tiles)
    return path


def describe(strategy) -> str:
    """A strategy in one line: size, origin, how its heads are spread over the windows."""
    total = sum(strategy.uses.values())
    origin = f"{strategy.model}, " if strategy.model else ""
    grid = f", made at {'x'.join(map(str, strategy.grid))} tokens" if strategy.grid else ""
    size = f"{origin}{strategy.steps} steps, {strategy.layers} layers of {strategy.heads} heads{grid}"
    if isinstance(strategy, Budgets):
        spread = ", ".join(f"{share:.0%} for {count / total:.0%}" for share, count in sorted(strategy.uses.items()))
        far = "with" if strategy.far_field else "without"
        return (f"{size}; budgets for VSA, measured {far} the far field: {strategy.mean_share:.0%} of the tiles on "
                f"average, {spread} of the heads")
    common = sorted(strategy.uses.items(), key=lambda item: -item[1])[:4]
    shares = ", ".join(f"{'x'.join(f'{part:.2f}' for part in window)} {count / total:.0%}" for window, count in common)
    return f"{size}; windows as fractions of the clip: {shares}"
