"""The node "Sparse Attention Report": what the last sampling of a patched model did, in words and as a picture."""
from __future__ import annotations

from collections import Counter

import torch
from comfy_api.latest import io, ui

from ..hook.hook import SparseAttentionHook
from ..hook.place_of_run import nodes_behind
from ..hook.run import Run
from ..hook.status import kernel_text, show_under_node, status_text
from .tile_map import draw_tile_map


class SparseAttentionReport(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SparseAttentionReport",
            display_name="Sparse Attention Report",
            category="model/patch",
            description=(
                "Reports what sparse attention did in the sampling that made this latent: grid, tiles, density, "
                "kernel, calls, milliseconds, and a picture of the tiles that the middle of the clip looks at."),
            search_aliases=["VSA report", "tile map", "sparsity report"],
            is_output_node=True,
            not_idempotent=True,
            inputs=[
                io.Latent.Input("latent", tooltip="The sampler's output: it makes this node wait for the sampling."),
                io.Model.Input("model", tooltip="The patched model that the sampler used."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            outputs=[io.Latent.Output(), io.String.Output("report"), io.Image.Output("tile_map")],
        )

    @classmethod
    def execute(cls, latent, model) -> io.NodeOutput:
        hooks = SparseAttentionHook.of(model)
        if not hooks:
            raise ValueError("found a model without sparse attention: wanted the output of a sparse attention node, "
                             "the same one that the sampler uses")
        hidden = getattr(cls, "hidden", None)
        node_id, prompt = getattr(hidden, "unique_id", None), getattr(hidden, "prompt", None)
        runs = [(hook, run) for hook in hooks for run in _runs_behind(hook, prompt, node_id)]
        if not runs:
            raise ValueError("this model has not been sampled yet: connect `latent` to the output of the sampler "
                             "that uses it")
        texts = [part + status_text(run, hook.settings.verbose) for part, (hook, run) in zip(
            _parts(runs), runs, strict=True)]
        texts += dict.fromkeys(kernel_text(run, hook.settings.backend) for hook, run in runs if run.asked)
        report = "\n".join(texts)
        show_under_node(report, node_id)
        image, shown = _picture([run for _, run in runs])
        previews = ui.PreviewImage(image, cls=cls).as_dict() if shown else {}
        entries = [entry for _, run in runs for entry in run.summary()]
        return io.NodeOutput(latent, report, image, ui={**previews, "text": [report], "sparse_attention": entries})


def _runs_behind(hook: SparseAttentionHook, prompt, node_id) -> list[Run]:
    """The samplings of this hook that lead to the latent of this node; without a prompt to look in, the last ones."""
    behind = nodes_behind(prompt, node_id, "latent")
    return [run for run in hook.runs if run.node is None or not behind or str(run.node) in behind]


def _parts(runs) -> list[str]:
    """What stands before each run where one hook served several samplers."""
    counts = Counter(id(hook) for hook, _ in runs)
    seen: Counter[int] = Counter()
    parts = []
    for hook, _ in runs:
        seen[id(hook)] += 1
        several = counts[id(hook)] > 1
        parts.append(f"sampler {seen[id(hook)]} of {counts[id(hook)]}:\n" if several else "")
    return parts


def _picture(runs) -> tuple[torch.Tensor, bool]:
    """The map of the last grid that ran sparse; a grey pixel when none did."""
    records = [record for run in runs for record in run.records.values() if record.tile_map is not None]
    if not records:
        return torch.full((1, 1, 1, 3), 0.5), False
    record = records[-1]
    x = "x".join
    kept = record.facts.get("label") or f"{record.facts['kept']} of {record.facts['tiles']} tiles kept per query tile"
    caption = (f"grid {x(map(str, record.grid.thw))} tokens, tile {x(map(str, record.facts['tile']))}, "
               f"{kept}, density {record.density:.1%}, kernel {record.kernel}")
    return draw_tile_map(record.tile_map, caption), True
