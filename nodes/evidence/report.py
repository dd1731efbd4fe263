"""The node "Sparse Attention Report": what the last sampling of a patched model did, in words and as a picture."""
from __future__ import annotations

import time
from collections import Counter
from typing import ClassVar

import torch
from comfy_api.latest import io, ui

from ..hook.hook import SparseAttentionHook
from ..hook.place_of_run import executing, nodes_behind
from ..hook.run import Run
from ..hook.status import kernel_text, show_under_node, status_text
from ..hook.verdict import seconds, verdict
from . import node_times
from .tile_map import draw_tile_map, draw_words

NOT_SAMPLED = ("Nothing was sampled with this model: connect latent to the output of the sampler that uses it.")
FROM_CACHE = "the sampling ran in an earlier prompt: its result came from the cache"


class SparseAttentionReport(io.ComfyNode):
    _sparse_took: ClassVar[dict[tuple, float]] = {}
    """Seconds of the last sparse sampling of the same node and size of latent, to set a dense one beside it."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SparseAttentionReport",
            display_name="Sparse Attention Report",
            category="model/patch",
            description=(
                "Says whether sparse attention was on in the sampling that made this latent, whether that was faster, "
                "and shows where the middle of the clip looks. Bypass the sparse node and run again to compare."),
            search_aliases=["VSA report", "tile map", "sparsity report"],
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                io.Latent.Input("latent", tooltip="The sampler's output: it makes this node wait for the sampling."),
                io.Model.Input("model", tooltip="The model that the sampler used: the output of the sparse node."),
                io.Image.Input("images", optional=True, tooltip="The decoded clip. With it the picture shows the tiles "
                                                                "over the clip's own frames."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            outputs=[io.Latent.Output(), io.String.Output("report"), io.Image.Output("tile_map")],
        )

    @classmethod
    def fingerprint_inputs(cls, **_):
        """Never the same: a prompt that comes from the cache has a report, too. Asked before any node runs."""
        node_times.watch()
        return time.monotonic_ns()

    @classmethod
    def execute(cls, latent, model, images=None) -> io.NodeOutput:
        hidden = getattr(cls, "hidden", None)
        node_id, prompt = getattr(hidden, "unique_id", None), getattr(hidden, "prompt", None)
        behind = nodes_behind(prompt, node_id, "latent")
        took = node_times.sampling_seconds(prompt, behind)
        hooks = SparseAttentionHook.of(model)
        runs = [(hook, run) for hook in hooks for run in _runs_behind(hook, behind)]
        same = node_id, _size(latent)
        if not hooks:
            report = cls._dense_run(took, cls._sparse_took.get(same))
            image = draw_words(report.splitlines()[0], report.splitlines()[1:])
        elif not runs:
            report, image = NOT_SAMPLED, draw_words("Nothing to report", [NOT_SAMPLED])
        else:
            report, image = _text(runs), _picture([run for _, run in runs], images)
            if took is not None and any(run.sparse_calls for _, run in runs):
                cls._sparse_took[same] = took
        show_under_node(report, node_id)
        entries = [entry for _, run in runs for entry in run.summary()]
        return io.NodeOutput(latent, report, image, ui={
            **ui.PreviewImage(image, cls=cls).as_dict(), "text": [report], "sparse_attention": entries})

    @staticmethod
    def _dense_run(took: float | None, sparse_took: float | None) -> str:
        times = [f"{words} {seconds(value)}" for words, value in (
            ("the sampler took", took), ("the last sparse run took", sparse_took)) if value is not None]
        return ("DENSE run: there is no sparse attention node on this model, or it is bypassed."
                + (f"\n{'; '.join(times)}." if times else ""))


def _text(runs) -> str:
    texts = [part + status_text(run, hook.settings.verbose) for part, (hook, run) in zip(
        _parts(runs), runs, strict=True)]
    prompt = executing()[0]
    if prompt is not None and all(run.prompt != prompt for _, run in runs):
        texts.append(f"- {FROM_CACHE}")
    texts += dict.fromkeys(kernel_text(run, hook.settings.backend, hook.settings.precision)
                           for hook, run in runs if run.asked)
    return "\n".join(texts)


def _size(latent) -> tuple[int, ...]:
    samples = latent.get("samples") if isinstance(latent, dict) else None
    return tuple(samples.shape) if isinstance(samples, torch.Tensor) else ()


def _runs_behind(hook: SparseAttentionHook, behind: set[str]) -> list[Run]:
    """The samplings of this hook that lead to the latent of this node; without a prompt to look in, the last ones."""
    return [run for run in hook.runs if run.node is None or not behind or str(run.node) in behind]


def _parts(runs) -> list[str]:
    """What stands before each run where one hook served several samplers."""
    counts = Counter(id(hook) for hook, _ in runs)
    seen: Counter[int] = Counter()
    parts = []
    for hook, _ in runs:
        seen[id(hook)] += 1
        several = counts[id(hook)] > 1
        parts.append(f"sampler {seen[id(hook)]} of {counts[id(hook)]}: " if several else "")
    return parts


def _picture(runs: list[Run], images: torch.Tensor | None) -> torch.Tensor:
    """The map of the last grid that ran sparse, under the verdict; words where none did."""
    mapped = [(run, record) for run in runs for record in run.records.values() if record.tile_map is not None]
    if not mapped:
        return draw_words(verdict(runs[-1]), runs[-1].warnings)
    run, record = mapped[-1]
    return draw_tile_map(record.tile_map, record.grid.thw, tuple(record.facts["tile"]), verdict(run), images)
