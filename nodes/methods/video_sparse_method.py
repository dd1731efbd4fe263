"""Video Sparse Attention as a method for the hook."""
from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...vsa_core.backends.video_sparse_attn import (
    VSA_TILE_SIZE,
    VideoSparseAttentionMetadata,
    VideoSparseAttentionMetadataBuilder,
)
from ...vsa_core.budgets import Budgets, tiles_kept
from ...vsa_core.forward_context import set_forward_context
from ...vsa_core.grading import graded_shares
from ...vsa_core.grid import Thw, TokenGrid
from ...vsa_core.selector import AttentionBackendEnum
from ...vsa_core.tiling import auto_tile_size
from ..hook.method import LayerCall, StaysDense
from ..hook.run import GridRecord, Run
from ..trained.gate_advice import advice_after
from ..trained.gates import GateSet, gate_of
from .attention_mass import MassLists, mass_remarks
from .local_layers import LocalLayers
from .spread import SO_NOISY


@dataclass
class Plan:
    """One grid: its metadata, and the layers that its calls go through."""

    metadata: VideoSparseAttentionMetadata
    layers: LocalLayers
    mass: MassLists | None = None
    kept: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    """By the strategy: (its step, layer) -> tiles that every head keeps."""
    by_step: dict[int, list[VideoSparseAttentionMetadata]] = field(default_factory=dict)
    """Where the work is spread by noise: steps of the schedule -> the metadata of each."""

    @property
    def tiles(self) -> int:
        return math.prod(self.metadata.num_tiles)

    def keeping(self, kept: int) -> VideoSparseAttentionMetadata:
        """The metadata with another number of tiles; all tensors are shared."""
        return replace(self.metadata, VSA_sparsity=1 - (kept - 0.5) / self.tiles)


@dataclass(frozen=True)
class VideoSparseMethod:
    """VSA with its settings. tile_size None: the tile that the gates were trained with, else `auto_tile_size`."""

    sparsity: float
    tile_size: Thw | None
    gates: GateSet | None = None
    far_field: bool = False
    mass: float = 0.0
    budgets: Budgets | None = None
    start: float = 0.0
    """Dense part of the denoising at the start, as far as work is spread by noise: it counts as work."""
    spread_from: int | None = None
    """Steps of a schedule from which on the work is spread by noise; None: never."""
    timed: bool = True
    name: str = "VSA"
    has_strict = True

    @property
    def far_cure(self) -> str:
        return "lower sparsity" if self.budgets is None else "take a strategy with a smaller error"

    @property
    def dense_serves(self) -> bool:
        return self.gates is None

    def plans_start(self, steps: int) -> bool:
        return self.spread_from is not None and steps >= self.spread_from

    def _metadata(self, plan: Plan, call: LayerCall) -> VideoSparseAttentionMetadata:
        """Of this step."""
        step = call.step
        if self.spread_from is None or not self.plans_start(step.total):
            return plan.metadata
        if step.total not in plan.by_step:
            shares = graded_shares(step.noise, self.start + (1 - self.start) * (1 - self.sparsity))
            counts = [tiles_kept(round(share, 4), plan.tiles) for share in shares]
            known = {kept: plan.keeping(kept) for kept in set(counts)}
            plan.by_step[step.total] = [known[kept] for kept in counts]
            first, last, mean = (kept / plan.tiles for kept in (counts[0], counts[-1], sum(counts) / len(counts)))
            step.run.note(f"the work is spread over the steps by noise: {first:.0%} of the tiles in the first, "
                          f"{last:.0%} in the last, {mean:.0%} on average")
        return plan.by_step[step.total][step.index]

    def keeps_all(self, plan: Plan, heads: int, call: LayerCall) -> bool:
        if self.budgets is not None:
            return min(self._kept(plan, call)) == plan.tiles
        return not self.mass and self._metadata(plan, call).topk == plan.tiles

    def work(self, plan: Plan, heads: int, call: LayerCall) -> tuple[float, float]:
        if self.budgets is not None:
            kept = self._kept(plan, call)
            return round(sum(kept) / len(kept) / plan.tiles, 2), 0.0
        return self._metadata(plan, call).topk, self.mass

    def _kept(self, plan: Plan, call: LayerCall) -> tuple[int, ...]:
        """Tiles that every head of a call keeps, as the strategy has it."""
        if call.layer is None or call.heads is None:
            raise StaysDense("the strategy is per layer and head, and those of this call are not known")
        step = self.budgets.step_of(call.step.index, call.step.total)
        if (step, call.layer) not in plan.kept:
            plan.kept[step, call.layer] = self.budgets.kept(step, call.layer, plan.tiles)
        return plan.kept[step, call.layer][call.heads.start:call.heads.stop]

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
        if self.budgets is not None:
            made_for = f" for {self.budgets.model}" if self.budgets.model else ""
            return {"tile": list(md.tile_size), "tiles": plan.tiles, "kept": None, "far_field": self.far_field,
                    "label": f"strategy{made_for}, {self.budgets.steps} steps"}
        if self.spread_from is not None:
            return {"tile": list(md.tile_size), "tiles": plan.tiles, "kept": None, "far_field": self.far_field,
                    "sparsity": self.sparsity, "label": "every tile looks at more tiles in noisy steps than later"}
        return {"tile": list(md.tile_size), "tiles": plan.tiles, "kept": md.topk,
                "sparsity": self.sparsity, "far_field": self.far_field, "work": computed / md.total_seq_length ** 2}

    def attend(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, call: LayerCall) -> Tensor:
        layer, record = plan.layers.of(q, call.kernel), call.record
        layer.attn_impl.on_selection = (lambda tiles, md: _observe(tiles, md, record)) if call.sampled else None
        layer.attn_impl.on_lists = call.reads
        layer.attn_impl.kept_by_head = None
        if self.budgets is not None:
            layer.attn_impl.kept_by_head = kept = self._kept(plan, call)
            if min(kept) == plan.tiles:
                raise StaysDense("the strategy keeps everything there")
        md = self._metadata(plan, call)
        if md is not plan.metadata and md.topk == plan.tiles:
            raise StaysDense(SO_NOISY)
        layer.attn_impl.kept = plan.mass and plan.mass.of(q, k, md, call)
        gate = gate_of(call.options, q, call.heads, call.of_heads)
        if gate is not None and call.watch is not None:
            call.watch.adds = True
        with set_forward_context(md):
            out = layer(q, k, v, gate_compress=gate)
        if gate is not None:
            call.step.run.gated[call.layer] += 1
        return out

    def remarks(self, run: Run) -> list[str]:
        """What a user of trained gates should know of a finished run."""
        gates = self.gates and self.gates.trained
        if self.budgets is not None and self.budgets.far_field != self.far_field:
            used, wanted = ("with", "off") if self.far_field else ("without", "on")
            return [f"the strategy was measured {'without' if self.far_field else 'with'} the far field and is used "
                    f"{used} it: set far_field to {wanted}"]
        return [*mass_remarks(run, self.sparsity, gates and gates.name),
                *(advice_after(gates, self.sparsity, run) if gates else [])]


def _observe(tiles: Tensor, plan: VideoSparseAttentionMetadata, record: GridRecord) -> None:
    """Put the density of a selection, int32 [B, H, N, k], and its map of the middle query tile into the record.

    -1 is no tile.
    """
    tiles = tiles.long() % (len(plan.variable_block_sizes) + 1)         # -1 becomes one behind the last, of no tokens
    padded = torch.nn.functional.pad(plan.variable_block_sizes.float(), (0, 1))
    sizes = padded[:-1]
    total, hidden = plan.total_seq_length, len(plan.grid.hidden)
    others, seen = plan.grid.num_other_tokens, total - hidden
    keys = padded[tiles].sum(-1) + others - hidden               # [B, H, N]
    pairs = (keys * sizes).sum(-1).mean() + others * seen
    record.densities.append(pairs / (total * seen))
    n_t, n_h, n_w = plan.num_tiles
    middle = (n_t // 2 * n_h + n_h // 2) * n_w + n_w // 2
    kept = tiles[:, :, middle].flatten()
    counts = torch.zeros(len(padded), device=tiles.device).index_add_(
        0, kept, torch.ones(kept.shape, device=tiles.device))[:-1]
    record.tile_map = (counts / (tiles.shape[0] * tiles.shape[1])).view(n_t, n_h, n_w)
