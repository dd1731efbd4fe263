"""The node "Video Mixture of Block Attention (VMoBA)"."""
from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ...vsa_core.backends.vmoba import KINDS, VideoMobaAttentionMetadata, VideoMobaAttentionMetadataBuilder
from ...vsa_core.chunk_gate import MODES, POOLS
from ...vsa_core.chunk_settings import ChunkSettings, parse_box
from ...vsa_core.chunks import Chunks
from ...vsa_core.forward_context import set_forward_context
from ...vsa_core.grid import TokenGrid
from ...vsa_core.selector import AttentionBackendEnum
from ..hook.hook import SparseAttentionHook
from ..hook.method import LayerCall, StaysDense
from ..hook.run import Run
from ..hook.settings import precision_input, read_settings, settings_inputs, why_invalid
from ..trained.training import warn_of_other_training
from .local_layers import LocalLayers
from .moba_config import config_path, read_config

log = logging.getLogger(__name__)

EXACT, POOLED = "exact", "pooled"
FORMS = {EXACT: ("VMoBA", AttentionBackendEnum.VMOBA_ATTN), POOLED: ("Pooled chunks",
                                                                     AttentionBackendEnum.POOLED_CHUNK_ATTN)}
"""Form -> what it is called after a run, and its backend."""
DEFAULT = ChunkSettings()
WORDS = {"temporal": "temporal", "spatial": "spatial", "st": "space-time"}


@dataclass
class Plan:
    """One grid: its metadata, the layers that its calls go through, and where the middle of the clip has looked."""

    metadata: VideoMobaAttentionMetadata
    layers: LocalLayers
    maps: dict[str, list[Tensor]] = field(default_factory=dict)
    """Kind -> of every head that was looked at, the chunks that the middle sees, as a clip [t, h, w] of 0 and 1."""


@dataclass(frozen=True)
class MixtureOfBlockMethod:
    """VMoBA with its settings, or its pooled form."""

    settings: ChunkSettings
    form: str = EXACT
    far_cure = None           # its tokens choose one by one: there are no lists of tiles to judge
    dense_serves = True
    timed = True
    has_strict = True

    @property
    def name(self) -> str:
        return FORMS[self.form][0]

    def keeps_all(self, plan: Plan, heads: int, call: LayerCall) -> bool:
        if call.layer is None:
            return False
        kind = plan.metadata.kind(call.layer)
        return plan.metadata.rule(kind).keeps_all(self._chunks(plan, kind).number)

    def work(self, plan: Plan, heads: int, call: LayerCall) -> str | None:
        return None if call.layer is None else plan.metadata.kind(call.layer)

    def plan(self, grid: TokenGrid, device: torch.device) -> Plan:
        metadata = VideoMobaAttentionMetadataBuilder().build(
            0, grid.thw, (1, 1, 1), **self.settings.build_arguments(), device=device, prefix=grid.prefix,
            suffix=grid.suffix, hidden=grid.hidden)
        plan = Plan(metadata, LocalLayers(FORMS[self.form][1]))
        for kind in metadata.kinds:
            metadata.chunks(kind, device)
        return plan

    def facts(self, plan: Plan) -> dict[str, Any]:
        md, rule = plan.metadata, self.settings
        numbers = {kind: self._chunks(plan, kind).number for kind in md.kinds}
        chunks = ", ".join(f"{number} {WORDS[kind]} of {_x(md.chunk_size(kind))}"
                           for kind, number in numbers.items())
        who = "every token" if self.form == EXACT else "every block of 64 tokens"
        how = f"by a share of {rule.moba_threshold:g} ({rule.moba_threshold_type})"
        if rule.moba_select_mode == "topk":
            how = f"the best {'/'.join(str(getattr(rule, f'{kind}_topk')) for kind in numbers)} " \
                  f"({rule.moba_threshold_type})"
        return {"tile": [1, 1, 1], "tiles": max(numbers.values()), "kept": None, "chunks": numbers, "form": self.form,
                "label": f"{who} looks at its own chunk and others, {how}; chunks in turn: {chunks}"}

    def attend(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        if call.layer is None:
            raise StaysDense("chunks go by layer, and the layer of this call is not known")
        layer, kind, record, seen = plan.layers.of(q, call.kernel), plan.metadata.kind(call.layer), call.record, []
        wants_map = call.sampled or kind not in plan.maps
        maps = plan.maps.setdefault(kind, []) if wants_map else None
        if maps:
            maps.clear()
        layer.attn_impl.on_selection = lambda chosen, chunks: seen.append(
            self._observe(chosen, chunks, record.grid, maps))
        with set_forward_context(plan.metadata.at(call.layer)):
            out = layer(q, k, v)
        record.densities.append(torch.stack(seen).mean())
        if wants_map:
            record.tile_map = torch.stack([torch.stack(of).mean(0) for of in plan.maps.values() if of]).mean(0)
        return out

    def remarks(self, run: Run) -> list[str]:
        """What a user should know of a finished run: settings that do less than they seem to."""
        if not run.sparse_calls:
            return []
        alone = [WORDS[kind] for kind in KINDS if getattr(self.settings, f"{kind}_layer")
                 and self.settings.moba_select_mode == "topk" and getattr(self.settings, f"{kind}_topk") == 1]
        if not alone:
            return []
        return [f"a top-k of 1 ({', '.join(alone)}) is the own chunk alone: tokens there see nothing else of the clip"]

    @staticmethod
    def _chunks(plan: Plan, kind: str) -> Chunks:
        return next(chunks for (of, _), chunks in plan.metadata.layouts.items() if of == kind)

    def _observe(self, chosen: Tensor, chunks: Chunks, grid: TokenGrid, maps: list[Tensor] | None) -> Tensor:
        """The share of query-key pairs of one head whose queries chose `chosen` besides their own, a scalar.

        maps: where to put what the middle of the clip sees, None where nobody asks.
        """
        sizes, total, hidden = chunks.layout.variable_block_sizes.double(), grid.num_tokens, len(grid.hidden)
        others, seen = grid.num_other_tokens, grid.num_tokens - hidden
        weights = None
        if self.form == POOLED:
            weights = chunks.video_sizes[chunks.video_sizes > 0].double()
        per_chunk = chosen.sum(0).double() if weights is None else weights @ chosen.double()
        pairs = (sizes * sizes).sum() + per_chunk @ sizes + grid.num_video_tokens * (others - hidden) + others * seen
        if maps is not None:
            (t, h, w), row = grid.thw, (grid.thw[0] // 2 * grid.thw[1] + grid.thw[1] // 2) * grid.thw[2]
            middle = row + w // 2
            place = middle
            if self.form == POOLED:
                slot = chunks.layout.untile_combined_index[grid.prefix + middle]
                place = (chunks.video_sizes[:slot // 64] > 0).sum()
            looks = chosen[place].float().index_fill(0, chunks.own[middle], 1)
            maps.append(looks[chunks.own].view(t, h, w))
        return pairs / (total * seen)


class VideoMixtureOfBlockAttentionPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="VideoMixtureOfBlockAttentionPatch",
            display_name="Video Mixture of Block Attention (VMoBA)",
            category="model/patch",
            description=(
                "Makes a video model sample faster: in self-attention every token attends to its own chunk of the clip "
                "and to those that it chooses itself. Layers take turns: chunks of whole frames, columns through time, "
                "boxes. Works at any resolution and length. After a run the node says whether it was on, whether that "
                "was faster, and why not."),
            search_aliases=["VMoBA", "MoBA", "mixture of block attention", "sparse attention", "FastVideo"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A video model from any loader. Other patches may come before or after."),
                io.Combo.Input(
                    "form", options=list(FORMS), default=EXACT,
                    tooltip="exact is VMoBA: every token chooses for itself, which takes time and memory. In pooled, "
                            "64 neighbouring tokens choose together: cheaper and coarser, and no longer VMoBA."),
                io.Combo.Input(
                    "select", options=list(MODES), default=DEFAULT.moba_select_mode,
                    tooltip="threshold chooses chunks until their scores reach a share of all scores: the same at "
                            "every resolution. topk chooses a fixed number of chunks, which the advanced inputs say."),
                io.Float.Input(
                    "threshold", default=DEFAULT.moba_threshold, min=0.0, max=1.0, step=0.01,
                    tooltip="The share, with select threshold. Higher is slower and closer to dense; 1 is dense. 0.25, "
                            "as published, looks at about a fifth of the clip. Unused with topk."),
                *settings_inputs(),
                io.Float.Input(
                    "temporal_chunk", default=DEFAULT.temporal_chunk_size, min=0.1, max=1024.0, step=0.1,
                    optional=True, advanced=True,
                    tooltip="Latent frames in a chunk, in the layers whose turn is time. Fractions cut frames."),
                io.Int.Input(
                    "temporal_topk", default=DEFAULT.temporal_topk, min=1, max=1 << 16, optional=True, advanced=True,
                    tooltip="With select topk: chunks that a token looks at there, its own included."),
                io.String.Input(
                    "spatial_chunk", default="3x4", optional=True, advanced=True,
                    tooltip="Tokens in a chunk, height x width through all frames, in the layers whose turn is space. "
                            "A token is 16 x 16 pixels in most models. Chunks at the edge may be smaller."),
                io.Int.Input(
                    "spatial_topk", default=DEFAULT.spatial_topk, min=1, max=1 << 16, optional=True, advanced=True,
                    tooltip="With select topk: chunks that a token looks at there, its own included."),
                io.String.Input(
                    "st_chunk", default="4x6x4", optional=True, advanced=True,
                    tooltip="Tokens in a chunk, time x height x width, in the layers whose turn is space-time."),
                io.Int.Input(
                    "st_topk", default=DEFAULT.st_topk, min=1, max=1 << 16, optional=True, advanced=True,
                    tooltip="With select topk: chunks that a token looks at there, its own included."),
                io.Combo.Input(
                    "compete", options=list(POOLS), default=DEFAULT.moba_threshold_type, optional=True, advanced=True,
                    tooltip="What competes for the share or the number: the chunks of one token and head (query_head, "
                            "as published), all that look at one chunk (block), one head (head_global), or all heads "
                            "(overall)."),
                io.String.Input(
                    "turns", default="1, 1, 1", optional=True, advanced=True,
                    tooltip="How many layers in a row have temporal, spatial and space-time chunks. 0 leaves a kind "
                            "out."),
                io.Int.Input(
                    "first_layer", default=DEFAULT.first_full_layer, min=0, max=1024, optional=True, advanced=True,
                    tooltip="The layer with which the turns begin."),
                io.String.Input(
                    "config", default="", optional=True, advanced=True,
                    tooltip="FastVideo's settings as JSON, pasted, or the name of a .json file in models/"
                            "vmoba_configs. What it names replaces the inputs above. Its first_full_step does "
                            "nothing, as in FastVideo: use start_percent."),
                precision_input(),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, config=None):
        return why_invalid(read_config, config)

    @classmethod
    def fingerprint_inputs(cls, config="", **_):
        path = config_path(config)
        return None if path is None else path.stat().st_mtime_ns

    @classmethod
    def execute(
        cls, model, form=EXACT, select=DEFAULT.moba_select_mode, threshold=DEFAULT.moba_threshold,
        temporal_chunk=DEFAULT.temporal_chunk_size, temporal_topk=DEFAULT.temporal_topk, spatial_chunk="3x4",
        spatial_topk=DEFAULT.spatial_topk, st_chunk="4x6x4", st_topk=DEFAULT.st_topk,
        compete=DEFAULT.moba_threshold_type, turns="1, 1, 1", first_layer=DEFAULT.first_full_layer, config="",
        **settings,
    ) -> io.NodeOutput:
        node_id = getattr(getattr(cls, "hidden", None), "unique_id", None)
        own = {"moba_select_mode": select, "moba_threshold": threshold, "moba_threshold_type": compete,
               "temporal_chunk_size": temporal_chunk, "temporal_topk": temporal_topk,
               "spatial_chunk_size": parse_box(spatial_chunk, "spatial_chunk", 2), "spatial_topk": spatial_topk,
               "st_chunk_size": parse_box(st_chunk, "st_chunk", 3), "st_topk": st_topk,
               "first_full_layer": first_layer, **parse_turns(turns)}
        patched = SparseAttentionHook.install(model, read_method(form, {**own, **read_config(config)}),
                                              read_settings(**settings), node_id)
        warn_of_other_training(patched, node_id)
        return io.NodeOutput(patched)


def read_method(form: str, settings: dict[str, Any]) -> MixtureOfBlockMethod:
    """The node's own widgets as a method. Raises ValueError: found, wanted."""
    if form not in FORMS:
        raise ValueError(f"form {form!r}: wanted {' or '.join(FORMS)}")
    chosen = ChunkSettings(**settings)
    VideoMobaAttentionMetadataBuilder().build(0, (1, 1, 1), (1, 1, 1), **chosen.build_arguments())
    return MixtureOfBlockMethod(chosen, form)


def parse_turns(text: str) -> dict[str, int]:
    """The layers in a row that "1, 1, 1" names, by kind. Raises ValueError for anything but three whole numbers."""
    parts = [part.strip() for part in str(text).split(",")]
    if len(parts) != len(KINDS) or not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"turns {text!r}: wanted three whole numbers for temporal, spatial and space-time layers, "
                         "such as 1, 1, 1")
    return {f"{kind}_layer": int(part) for kind, part in zip(KINDS, parts, strict=True)}


def _x(size) -> str:
    return "x".join(map(str, size)) if isinstance(size, tuple) else f"{size:g} frame{'s' if size != 1 else ''}"
