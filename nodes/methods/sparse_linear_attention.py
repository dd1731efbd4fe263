"""The node "Sparse Linear Attention (SLA)"."""
from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ...checkpoints.trained import SLA, Trained
from ...vsa_core.backends.sla import (
    KEY_RUN,
    QUERY_RUNS,
    SLAAttentionMetadata,
    SLAAttentionMetadataBuilder,
    check_ratio,
    kept_runs,
)
from ...vsa_core.forward_context import set_forward_context
from ...vsa_core.grid import TokenGrid
from ...vsa_core.linear_branch import FEATURES, add_linear, linear_state
from ...vsa_core.runs import RunLayout
from ...vsa_core.selector import AttentionBackendEnum
from ..hook.hook import SparseAttentionHook
from ..hook.method import LayerCall
from ..hook.run import GridRecord, Run
from ..hook.settings import precision_input, read_settings, settings_inputs
from ..hook.status import show_under_node
from ..trained.projection_advice import UNTRAINED, advice_after, advice_before
from ..trained.projections import ProjectionSet, projection_of, projections_of
from ..trained.training import BareTraining, bare_training_of, warn_of_other_training
from .local_layers import LocalLayers

log = logging.getLogger(__name__)

AUTO = "auto"
DEFAULT_RATIO = 0.15
UNTRAINED_QUERY_RUN, USUAL_FEATURE = 64, "softmax"
"""Shorter runs choose more finely; softmax is the map of every released model."""


@dataclass
class Plan:
    """One grid: its metadata and layout, and the layers that its calls go through."""

    metadata: SLAAttentionMetadata
    layout: RunLayout
    layers: LocalLayers

    @property
    def topk(self) -> int:
        return kept_runs(self.metadata.topk_ratio, self.layout.num_keys)


@dataclass(frozen=True)
class SparseLinearMethod:
    """SLA with its settings. query_run and feature_map None: those that the projections were trained with."""

    ratio: float
    query_run: int | None = None
    feature_map: str | None = None
    projections: ProjectionSet | None = None
    bare: BareTraining | None = None
    name: str = "SLA"
    far_cure = "raise ratio"
    timed = True
    has_strict = True

    @property
    def dense_serves(self) -> bool:
        return self.trained is None or self.trained.dense_serves

    @property
    def trained(self) -> Trained | None:
        """How the model was trained with SLA, with projections or without; None where it was not."""
        training = self.projections or self.bare
        return None if training is None else training.trained

    @property
    def queries_together(self) -> int:
        """Queries of one run."""
        trained = None if self.trained is None else self.trained.query_run or QUERY_RUNS[-1]
        return self.query_run or trained or UNTRAINED_QUERY_RUN

    @property
    def feature(self) -> str:
        """The feature map of the linear branch."""
        trained = None if self.projections is None else self.projections.trained.feature
        return self.feature_map or trained or USUAL_FEATURE

    def keeps_all(self, plan: Plan, heads: int, call: LayerCall) -> bool:
        return plan.topk == plan.layout.num_keys

    def work(self, plan: Plan, heads: int, call: LayerCall) -> int:
        return plan.topk

    def plan(self, grid: TokenGrid, device: torch.device) -> Plan:
        metadata = SLAAttentionMetadataBuilder().build(0, topk_ratio=self.ratio, grid=grid)
        layers = LocalLayers(AttentionBackendEnum.SLA_ATTN, BLKQ=self.queries_together, feature_map=self.feature,
                             projects=False)
        return Plan(metadata, metadata.on(grid.num_tokens, self.queries_together, device), layers)

    def facts(self, plan: Plan) -> dict[str, Any]:
        layout, what = plan.layout, "top-k without a trained projection"
        if self.projections is not None:
            what = "SLA with its trained projection"
        elif self.bare is not None:
            what = f"top-k as {self.bare.trained.name} has it"
        grid, others = layout.keys.grid, layout.keys.num_other_blocks * KEY_RUN
        computed = grid.num_video_tokens * (plan.topk * KEY_RUN + others) + others * layout.keys.padded_seq_length
        return {"tile": [1, 1, 1], "tiles": layout.num_keys, "kept": plan.topk, "ratio": self.ratio,
                "runs": [layout.query_run, KEY_RUN], "work": computed / grid.num_tokens ** 2,
                "label": f"{what}: every run of {layout.query_run} tokens looks at {plan.topk} of {layout.num_keys} "
                         f"runs of {KEY_RUN}"}

    def attend(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        layer, record = plan.layers.of(q, call.kernel), call.record
        layer.attn_impl.on_selection = (
            lambda kept, layout: _observe(kept, layout, record)) if call.sampled else None
        layer.attn_impl.on_lists = call.reads
        projection = projection_of(call.options)
        if not self.dense_serves and call.watch is not None:
            call.watch.adds = True
        with set_forward_context(plan.metadata.at(projection)):
            out = layer(q, k, v)
        if projection is not None:
            call.step.run.gated[call.layer] += 1
        return out

    def after_dense(self, options: dict[str, Any]) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None:
        """Dense attention of a trained model gets its projection too: SLA that keeps everything."""
        projection = projection_of(options)
        if projection is None:
            return None

        def finish(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = out.clone()                     # it may be memory that whoever computed it keeps
            add_linear(out, q, linear_state(k, v, projection, self.feature), self.feature)
            return out
        return finish

    def remarks(self, run: Run) -> list[str]:
        """What a user should know of a finished run: of the trained projections, or that there are none."""
        if self.trained is None:
            return [UNTRAINED] if run.sparse_calls else []
        return advice_after(self.trained, self.ratio, self.queries_together, self.feature, run)


def _observe(kept: Tensor, layout: RunLayout, record: GridRecord) -> None:
    """Put the density of a selection, int32 [B, H, Nq, n], and where the clip's middle looks into the record."""
    keys, (t, h, w) = layout.keys, record.grid.thw
    sizes, total, hidden = keys.variable_block_sizes.float(), keys.total_seq_length, len(keys.grid.hidden)
    others, seen = keys.grid.num_other_tokens, total - hidden
    queries = (layout.query_rows >= 0).view(layout.num_queries, -1).sum(1)
    read = sizes[kept.long()].sum(-1) + others - hidden                # [B, H, Nq]
    pairs = (read * queries).sum(-1).mean() + others * seen
    record.densities.append(pairs / (total * seen))
    middle = ((t // 2) * h + h // 2) * w + w // 2
    looked = kept[:, :, middle // layout.query_run].flatten().long()
    counts = torch.zeros(layout.num_keys, device=kept.device).index_add_(
        0, looked, torch.ones(looked.shape, device=kept.device))
    shares = counts / (kept.shape[0] * kept.shape[1])
    record.tile_map = shares.repeat_interleave(KEY_RUN)[:math.prod((t, h, w))].view(t, h, w)


class SparseLinearAttentionPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SparseLinearAttentionPatch",
            display_name="Sparse Linear Attention (SLA)",
            category="model/patch",
            description=(
                "Samples a model that was trained with SLA, such as TurboWan, as it was trained: in self-attention "
                "every run of tokens attends to the runs that matter most to it, and a trained projection adds a "
                "summary of the whole clip. Load such a model with Load Sparse Diffusion Model. On any other model it "
                "is plain top-k. After a run the node says whether it was on, whether that was faster, and why not."),
            search_aliases=["SLA", "SageSLA", "TurboWan", "TurboDiffusion", "sparse attention", "rCM"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A video model; with its trained projections where it comes from Load Sparse "
                                     "Diffusion Model. Other patches may come before or after."),
                io.Float.Input(
                    "ratio", default=DEFAULT_RATIO, min=0.01, max=1.0, step=0.01,
                    tooltip="Share of the clip that a run of tokens looks at. Lower is faster. TurboWan was trained "
                            "with 0.1 and looks better with 0.15. Models that were not trained with SLA want 0.2 to "
                            "0.3. 1 is dense attention plus the projection."),
                io.Combo.Input(
                    "query_run", options=[AUTO, *map(str, QUERY_RUNS)], default=AUTO,
                    tooltip="Tokens that share one choice. auto takes what the model was released with (128 for "
                            "TurboWan) and 64 where it was not trained with SLA: 64 chooses more finely."),
                *settings_inputs(),
                io.Combo.Input(
                    "feature_map", options=[AUTO, *FEATURES], default=AUTO, optional=True, advanced=True,
                    tooltip="How the trained summary weighs tokens. auto takes the one that the model was trained "
                            "with; all released models have softmax. Unused without a trained projection."),
                precision_input(),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, ratio=DEFAULT_RATIO, query_run=AUTO, feature_map=AUTO, **settings) -> io.NodeOutput:
        node_id = getattr(getattr(cls, "hidden", None), "unique_id", None)
        method, settings = replace(read_method(ratio, query_run, feature_map),
                                   projections=projections_of(model), bare=_bare(model)), read_settings(**settings)
        patched = SparseAttentionHook.install(model, method, settings, node_id)
        advice = [UNTRAINED]
        if method.trained is not None:
            advice = advice_before(method.trained, ratio, method.queries_together, method.feature, settings)
        if advice:
            log.warning("[SLA] %s", "; ".join(advice))
            show_under_node("\n".join(advice), node_id)
        warn_of_other_training(patched, node_id)
        return io.NodeOutput(patched)


def _bare(model) -> BareTraining | None:
    """That a ModelPatcher was trained with SLA and has no projections."""
    bare = bare_training_of(model)
    return bare if bare is not None and bare.trained.method == SLA else None


def read_method(ratio: float, query_run: str, feature_map: str) -> SparseLinearMethod:
    """The node's own widgets as a method. Raises ValueError: found, wanted."""
    if query_run not in (AUTO, *map(str, QUERY_RUNS)):
        raise ValueError(f"query_run {query_run!r}: wanted {AUTO}, {' or '.join(map(str, QUERY_RUNS))}")
    if feature_map not in (AUTO, *FEATURES):
        raise ValueError(f"feature_map {feature_map!r}: wanted {AUTO}, {', '.join(FEATURES)}")
    return SparseLinearMethod(check_ratio(ratio), None if query_run == AUTO else int(query_run),
                              None if feature_map == AUTO else feature_map)
