"""The node "Video Sparse Attention (VSA)"."""
from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ...vsa_core.backends.video_sparse_attn import (
    VSA_TILE_SIZE,
    VideoSparseAttentionMetadata,
    VideoSparseAttentionMetadataBuilder,
)
from ...vsa_core.forward_context import set_forward_context
from ...vsa_core.grid import Thw, TokenGrid
from ...vsa_core.selector import AttentionBackendEnum
from ...vsa_core.tiling import auto_tile_size, parse_tile_size
from ..hook.hook import SparseAttentionHook
from ..hook.method import LayerCall
from ..hook.run import GridRecord, Run
from ..hook.settings import DEFAULT_START, precision_input, read_settings, settings_inputs, why_invalid
from ..hook.status import show_under_node
from ..trained.fed_layers import warn_of_other_training
from ..trained.gate_advice import advice_after, advice_before
from ..trained.gates import GateSet, gate_of, gates_of
from .attention_mass import MassLists, mass_input, mass_remarks, require_mass
from .far_field import OFF, far_field_input, uses_far_field, warning
from .local_layers import LocalLayers
from .presets import CUSTOM, PRESETS, as_trained, choose, preset_input

log = logging.getLogger(__name__)

DEFAULT_SPARSITY, AUTO_TILE = 0.8, "auto"
TILE_SIZES = (AUTO_TILE, "4x4x4", "1x8x8", "2x4x8", "2x8x4", "4x2x8", "4x8x2", "8x2x4", "8x4x2", "4x4x8", "4x8x4",
              "8x4x4", "2x8x8", "4x8x8", "8x8x4")


@dataclass
class Plan:
    """One grid: its metadata, and the layers that its calls go through."""

    metadata: VideoSparseAttentionMetadata
    layers: LocalLayers
    mass: MassLists | None = None


@dataclass(frozen=True)
class VideoSparseMethod:
    """VSA with its settings. tile_size None: the tile that the gates were trained with, else `auto_tile_size`."""

    sparsity: float
    tile_size: Thw | None
    gates: GateSet | None = None
    far_field: bool = False
    mass: float = 0.0
    name: str = "VSA"
    timed = True
    has_strict = True
    far_cure = "lower sparsity"

    @property
    def dense_serves(self) -> bool:
        return self.gates is None

    def keeps_all(self, plan: Plan, heads: int, call: LayerCall) -> bool:
        return not self.mass and plan.metadata.topk == math.prod(plan.metadata.num_tiles)

    def work(self, plan: Plan, heads: int, call: LayerCall) -> tuple[int, float]:
        return plan.metadata.topk, self.mass

    def plan(self, grid: TokenGrid, device: torch.device) -> Plan:
        # No reused tile buffer: between layers it would hold three q-sized tensors that the host needs for itself.
        metadata = VideoSparseAttentionMetadataBuilder().build(
            current_timestep=0, raw_latent_shape=grid.thw, patch_size=(1, 1, 1), VSA_sparsity=self.sparsity,
            device=device, tile_size=self._tile(grid), prefix=grid.prefix,
            suffix=grid.suffix, hidden=grid.hidden, cache_tile_buf=False)
        return Plan(metadata, LocalLayers(AttentionBackendEnum.VIDEO_SPARSE_ATTN, far_field=self.far_field),
                    MassLists(self.mass, self.sparsity) if self.mass else None)

    def _tile(self, grid: TokenGrid) -> Thw:
        if self.tile_size is None and self.gates is not None:
            return self.gates.trained.tile or VSA_TILE_SIZE
        return self.tile_size or auto_tile_size(grid.thw)

    def facts(self, plan: Plan) -> dict[str, Any]:
        md = plan.metadata
        others = md.padded_seq_length - md.num_video_slots
        computed = md.num_video_slots * (md.topk * md.slots_per_tile + others) + others * md.padded_seq_length
        return {"tile": list(md.tile_size), "tiles": math.prod(md.num_tiles), "kept": md.topk,
                "sparsity": self.sparsity, "far_field": self.far_field, "work": computed / md.total_seq_length ** 2}

    def attend(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        layer, record = plan.layers.of(q, call.kernel), call.record
        layer.attn_impl.on_selection = (lambda tiles, md: _observe(tiles, md, record)) if call.sampled else None
        layer.attn_impl.on_lists = call.reads
        layer.attn_impl.kept = plan.mass and plan.mass.of(q, k, plan.metadata, call)
        gate = gate_of(call.options, q, call.heads, call.of_heads)
        if gate is not None and call.watch is not None:
            call.watch.adds = True
        with set_forward_context(plan.metadata):
            out = layer(q, k, v, gate_compress=gate)
        if gate is not None:
            call.step.run.gated[call.layer] += 1
        return out

    def remarks(self, run: Run) -> list[str]:
        """What a user of trained gates should know of a finished run."""
        gates = self.gates and self.gates.trained
        return [*mass_remarks(run, self.sparsity, gates and gates.name),
                *(advice_after(gates, self.sparsity, run) if gates else [])]


def _observe(tiles: Tensor, plan: VideoSparseAttentionMetadata, record: GridRecord) -> None:
    """Put the density of a selection, int32 [B, H, N, k], and its map of the middle query tile into the record."""
    sizes = plan.variable_block_sizes.float()
    total, hidden = plan.total_seq_length, len(plan.grid.hidden)
    others, seen = plan.grid.num_other_tokens, total - hidden
    keys = sizes[tiles.long()].sum(-1) + others - hidden               # [B, H, N]
    pairs = (keys * sizes).sum(-1).mean() + others * seen
    record.densities.append(pairs / (total * seen))
    n_t, n_h, n_w = plan.num_tiles
    middle = (n_t // 2 * n_h + n_h // 2) * n_w + n_w // 2
    kept = tiles[:, :, middle].flatten().long()
    counts = torch.zeros(n_t * n_h * n_w, device=tiles.device).index_add_(
        0, kept, torch.ones(kept.shape, device=tiles.device))
    record.tile_map = (counts / (tiles.shape[0] * tiles.shape[1])).view(n_t, n_h, n_w)


class VideoSparseAttentionPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="VideoSparseAttentionPatch",
            display_name="Video Sparse Attention (VSA)",
            category="model/patch",
            description=(
                "Makes a video model sample faster: in self-attention every tile of the clip attends only to the "
                "tiles that matter most to it. Works at any resolution and length. After a run the node says "
                "whether it was on, whether that was faster, and why not."),
            search_aliases=["VSA", "sparse attention", "FastVideo", "speed up video", "Wan"],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A video model from any loader. Other patches may come before or after."),
                io.Float.Input(
                    "sparsity", default=DEFAULT_SPARSITY, min=0.0, max=0.99, step=0.01,
                    tooltip="Share of the clip that a tile does not look at. Higher is faster and further from the "
                            "dense result. 0.8 is a good start for models that were not trained for it; above 0.85 "
                            "expect visible changes. Models trained with VSA take 0.8 to 0.9. 0 is dense attention."),
                io.Combo.Input(
                    "tile_size", options=list(TILE_SIZES), default=AUTO_TILE, optional=True, advanced=True,
                    tooltip="Tokens per tile as time x height x width. auto takes the shape that fits this "
                            "resolution best: nearly a cube, with little padding at the edges. 4x4x4 is what VSA "
                            "checkpoints were trained with. 128 and 256 tokens choose more coarsely. Any tile of 64, "
                            "128, 192, ... tokens is accepted."),
                *settings_inputs(),
                far_field_input(),
                mass_input(),
                preset_input("sparsity", trains=True),
                precision_input(),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, tile_size=None):
        return why_invalid(lambda text: read_method(0.0, text), tile_size)

    @classmethod
    def execute(cls, model, sparsity, tile_size=AUTO_TILE, far_field=OFF, attention_mass=0.0, preset=CUSTOM,
                **settings) -> io.NodeOutput:
        node_id, gates = getattr(getattr(cls, "hidden", None), "unique_id", None), gates_of(model)
        require_mass(attention_mass)
        sparsity, settings = preset_of(preset, sparsity, settings, gates)
        method, settings = read_method(sparsity, tile_size), read_settings(**settings)
        method = replace(method, gates=gates, far_field=uses_far_field(far_field, gates is not None),
                         mass=attention_mass)
        patched = SparseAttentionHook.install(model, method, settings, node_id)
        if method.gates is not None:
            advice = advice_before(method.gates.trained, sparsity, settings)
            if advice := [*advice, *filter(None, [warning(far_field, True)])]:
                log.warning("[VSA] %s", "; ".join(advice))
                show_under_node("\n".join(advice), node_id)
        warn_of_other_training(patched, node_id)
        return io.NodeOutput(patched)


def preset_of(preset: str, sparsity: float, settings: dict[str, Any], gates: GateSet | None):
    """(sparsity, shared widgets) as a preset has them, for a model with these gates."""
    defaults = {"sparsity": DEFAULT_SPARSITY, "start_percent": DEFAULT_START, "end_percent": 1.0, "dense_blocks": ""}
    wanted = {}
    if gates is not None:
        wanted = as_trained(gates.trained)
    elif preset in PRESETS:
        wanted = {"sparsity": PRESETS[preset].sparsity, "start_percent": PRESETS[preset].start_percent}
    widgets = {name: settings.get(name, default) for name, default in defaults.items()} | {"sparsity": sparsity}
    chosen = choose(preset, widgets, defaults, wanted, gates and gates.trained)
    used = dict(chosen.widgets)
    return used.pop("sparsity"), {**settings, **used, "few_steps": chosen.few_steps, "said": chosen.said}


def read_method(sparsity: float, tile_size: str) -> VideoSparseMethod:
    """The node's own widgets as a method. Raises ValueError: found, wanted."""
    if not 0.0 <= sparsity <= 0.99:
        raise ValueError(f"sparsity {sparsity}: wanted 0 to 0.99")
    return VideoSparseMethod(sparsity, None if tile_size == AUTO_TILE else parse_tile_size(tile_size))
