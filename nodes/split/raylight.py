"""The node "Sparse Attention for Raylight", and what it installs in Raylight's worker processes.

Raylight (github.com/komikndr/raylight, read at c049571) holds a model in every actor and lets all of them sample with
equal inputs. Its own split is taken off: it pads rows with zeros that take part in attention, and its attention calls
know no override.
"""
from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..families import family_of
from ..hook.settings import settings_inputs
from ..hook.status import show_under_node
from ..methods.presets import AUTO, preset_input
from ..methods.sliding_tile_attention import DEFAULT_WINDOW, SlidingTileAttentionPatch
from ..methods.video_sparse_attention import DEFAULT_SPARSITY, VideoSparseAttentionPatch
from .in_worker import in_worker
from .rank_split import RankSplit

VSA, STA, DENSE = "VSA", "STA", "dense"
METHODS = VSA, STA, DENSE
PACK = Path(__file__).resolve().parents[2]


def installed(model, settings: dict[str, Any], process_group=None):
    """`model`, a worker's ModelPatcher, with the split over Raylight's processes and a sparse method.

    settings: "method", and the widgets of that method's node.   process_group: default: Raylight's Ulysses group.
    Raises ValueError for a Raylight that was started without one, or for a model that cannot be split.
    """
    group = _ulysses_group() if process_group is None else process_group
    stacks = family_of(model.model).stacks(model.model.diffusion_model)
    if isinstance(stacks, str):
        raise ValueError(f"this model cannot be split over several cards: {stacks}. Remove this node")
    heads = family_of(model.model).heads(model.model.diffusion_model)[0]
    if heads < group.size():
        raise ValueError(f"this model has {heads} heads, {group.size()} workers are too many for it")
    clone = model.clone()
    _without_raylights_split(clone)
    widgets = {name: value for name, value in settings.items() if name != "method"}
    if settings["method"] == VSA:
        clone = VideoSparseAttentionPatch.execute(clone, **widgets)[0]
    elif settings["method"] == STA:
        clone = SlidingTileAttentionPatch.execute(clone, **widgets)[0]
    RankSplit(group).install(clone)
    return clone


def _ulysses_group():
    globals_of = sys.modules.get("yunchang.globals")
    group = getattr(getattr(globals_of, "PROCESS_GROUP", None), "ULYSSES_PG", None)
    ring = getattr(getattr(globals_of, "PROCESS_GROUP", None), "RING_PG", None)
    if group is None:
        raise ValueError("this Raylight was started without Ulysses: set ulysses_degree of its Ray Init Actor to the "
                         "number of GPUs")
    if ring is not None and ring.size() > 1:
        raise ValueError(f"this Raylight has a ring of {ring.size()}: a sparse method needs all tokens of a head. Set "
                         "ring_degree to 1 and ulysses_degree to the number of GPUs")
    return group


def _without_raylights_split(model) -> None:
    """Take off what Raylight's loader hooks to the model, and what an earlier load left on its modules."""
    for by_key in model.callbacks.values():
        for key, found in by_key.items():
            by_key[key] = [callback for callback in found if not _is_raylights(callback)]
    for module in model.model.diffusion_model.modules():
        for name in [name for name, value in vars(module).items() if _is_raylights(value)]:
            delattr(module, name)


def _is_raylights(function) -> bool:
    """Whether it is a forward of Raylight's split, or what puts those in place."""
    function = getattr(function, "__func__", function)
    return (getattr(function, "__module__", None) or "").startswith("raylight.") and (
        getattr(function, "__qualname__", "").startswith(("USPInjectRegistry.", "usp_")))


class SparseAttentionForRaylight(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SparseAttentionForRaylight",
            display_name="Sparse Attention for Raylight",
            category="model/patch",
            description=(
                "Gives the workers of Raylight, another node pack, which runs one model in a process per GPU, this "
                "pack's sparse attention and an exact split over them. Between Raylight's loader and its sampler. What "
                "each run did stands in the log."),
            search_aliases=["Raylight", "multi gpu", "ray", "xDiT", "USP", "FSDP"],
            inputs=[
                io.Custom("RAY_ACTORS").Input(
                    "ray_actors", tooltip="From Raylight's loader, started with ulysses_degree as the number of GPUs."),
                io.Combo.Input(
                    "method", options=list(METHODS), default=VSA,
                    tooltip="VSA: every tile looks at those that matter most to it. STA: at a window around it. dense: "
                            "all pairs, split exactly."),
                io.Float.Input(
                    "sparsity", default=DEFAULT_SPARSITY, min=0.0, max=0.99, step=0.01,
                    tooltip="VSA: share of the clip that a tile does not look at."),
                io.String.Input(
                    "window", default=DEFAULT_WINDOW,
                    tooltip="STA: tiles as time x height x width around a tile (3x3x5), or fractions of the clip."),
                *settings_inputs(),
                preset_input("sparsity or window", trains=False),
            ],
            outputs=[io.Custom("RAY_ACTORS").Output("ray_actors")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, ray_actors, method=VSA, sparsity=DEFAULT_SPARSITY, window=DEFAULT_WINDOW, preset=AUTO,
                **settings) -> io.NodeOutput:
        node_id = getattr(getattr(cls, "hidden", None), "unique_id", None)
        if method not in METHODS:
            raise ValueError(f"method {method!r}: wanted {', '.join(METHODS)}")
        sent = {"method": method}
        if method != DENSE:
            own = {"sparsity": sparsity} if method == VSA else {"window": window}
            sent |= {**own, "preset": preset, "far_field": "auto", "spread": "auto", **settings}
        try:
            import ray
            workers = ray_actors["workers"]
            function = in_worker(str(PACK), sent)
            ray.get([worker.model_function_runner.remote(function) for worker in workers])
        except Exception as error:
            raise RuntimeError(f"Raylight's workers did not take the sparse attention: {_last_line(error)} "
                               f"({_versions()})") from error
        show_under_node(f"{method} on {len(workers)} workers, split exactly over them: what each run did stands in the "
                        "log", node_id)
        return io.NodeOutput(ray_actors)


def _last_line(error: Exception) -> str:
    """What went wrong in a worker, without the trace that Ray puts before it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _versions() -> str:
    found = []
    for name in ("ray", "xfuser", "yunchang"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)
