"""Sparse-Linear Attention (SLA): runs of queries read the runs of keys that score highest, and a summary of all keys.

Zhang et al., "SLA: Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention", arXiv
2509.24006; names, signatures and rules: FastVideo attention/backends/sla.py at 2f3d4074, which are those of
thu-ml/TurboDiffusion. Runs are of consecutive tokens in raster order. Unlike upstream a row keeps at least one run,
means and scores are float32, and what SLA has no rule for raises. Wider than upstream: tokens that are not video.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ...kernels import BLOCK, select_tiles, tile_means
from ..grid import TokenGrid
from ..int8_scores import through_fp8, through_int8
from ..linear_branch import Projection, add_linear, feature_named, linear_state
from ..lowering import attend_lists_in_sequence, dense_lists, readable
from ..runs import RunLayout, run_means
from .abstract import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder

QUERY_RUNS = (64, 128)
KEY_RUN = BLOCK


def check_ratio(topk_ratio: float) -> float:
    """The ratio. Raises ValueError for one that is not above 0 and at most 1."""
    if not 0 < topk_ratio <= 1:
        raise ValueError(f"topk_ratio {topk_ratio}: wanted above 0 and at most 1")
    return topk_ratio


def kept_runs(topk_ratio: float, runs: int) -> int:
    """Runs of keys that a run of queries keeps: int(topk_ratio * runs) in float arithmetic as upstream, at least 1."""
    return max(1, min(runs, int(check_ratio(topk_ratio) * runs)))


def mean_pool(x: Tensor, BLK: int) -> Tensor:
    """The mean of every run of BLK tokens, summed in float32.   [B, H, L, D] -> [B, H, ceil(L / BLK), D], x's dtype"""
    return run_means(x.transpose(1, 2), BLK).to(x.dtype)


def get_block_map(q: Tensor, k: Tensor, topk_ratio: float, BLKQ: int = 64, BLKK: int = 64,
                  ) -> tuple[Tensor, Tensor, int]:
    """The runs of keys whose mean scores highest against each run of queries.

    q, k: [B, H, L, D] -> sparse_map int8 [B, H, Nq, K], lut int64 [B, H, Nq, topk] ascending, topk (1 or more).
    k is not made free of its mean first: that shifts all scores of a row alike, and float32 needs no such help.
    """
    means = run_means(q.transpose(1, 2), BLKQ), run_means(k.transpose(1, 2), BLKK)
    topk = kept_runs(topk_ratio, means[1].shape[2])
    lut = select_tiles(*means, topk, 1.0).long()
    sparse_map = torch.zeros((*lut.shape[:3], means[1].shape[2]), dtype=torch.int8, device=q.device)
    return sparse_map.scatter_(-1, lut, 1), lut, topk


@dataclass
class SLAAttentionMetadata(AttentionMetadata):
    """How much is kept. What depends on the shape of a sequence is made at its first call and shared by all layers."""

    topk_ratio: float = 0.5
    """Share of the runs of keys; where there is metadata it wins over the implementation's own."""
    grid: TokenGrid | None = None
    """Where the video lies in the sequence; None: everywhere."""
    projection: Projection | None = None
    """proj_l of the layer that is called next, in place of the implementation's own."""
    layouts: dict = field(default_factory=dict, repr=False)

    def at(self, projection: Projection | None) -> SLAAttentionMetadata:
        """This metadata for a layer with this projection. Shares all tensors."""
        return replace(self, projection=projection)

    def on(self, tokens: int, query_run: int, device: torch.device) -> RunLayout:
        """The layout of a sequence. Raises ValueError for one of another length than the grid's."""
        grid = self.grid or TokenGrid((1, 1, tokens))
        if grid.num_tokens != tokens:
            raise ValueError(f"attention: found a sequence of {tokens} tokens, wanted {grid.num_tokens}")
        key = grid, query_run, device
        if key not in self.layouts:
            self.layouts[key] = RunLayout.of(grid, query_run, device)
        return self.layouts[key]


class SLAAttentionMetadataBuilder(AttentionMetadataBuilder[SLAAttentionMetadata]):
    def __init__(self) -> None:
        pass

    def prepare(self) -> None:
        pass

    def build(  # type: ignore[override]
        self, current_timestep: int = 0, topk_ratio: float = 0.5, grid: TokenGrid | None = None, **kwargs,
    ) -> SLAAttentionMetadata:
        """Raises ValueError for a ratio outside 0 < r <= 1, TypeError for a keyword that no builder has."""
        self.refuse_unknown(kwargs, self.build)
        return SLAAttentionMetadata(current_timestep, check_ratio(topk_ratio), grid)


class SLAAttentionImpl(AttentionImpl[SLAAttentionMetadata], nn.Module):
    """SLA in the order of the sequence, [B, S, H, D]. Its proj_l is zero until it is loaded: then SLA is top-k."""

    def __init__(
        self, num_heads: int, head_size: int, causal: bool = False, softmax_scale: float | None = None,
        num_kv_heads: int | None = None, prefix: str = "", topk_ratio: float = 0.1, feature_map: str = "softmax",
        BLKQ: int = 128, BLKK: int = KEY_RUN, use_bf16: bool = True, backend: str = "auto", projects: bool = True,
        on_selection: Callable[[Tensor, RunLayout], None] | None = None, **extra_impl_args,
    ) -> None:
        """backend: the kernel, as in `kernels.block_sparse_attention`.

        projects False: there is no proj_l of its own, only what metadata brings. use_bf16 is taken and has no effect:
        operands keep their dtype, and sums are float32. on_selection is called with the kept runs, int32 [B, H, Nq, n].
        Raises ValueError for causal attention, fewer key heads than query heads, another run than QUERY_RUNS and
        KEY_RUN, an unknown feature map, a ratio that is none.
        """
        nn.Module.__init__(self)
        if causal:
            raise ValueError("sparse-linear attention is not causal: found causal=True, wanted False")
        if num_kv_heads not in (None, num_heads):
            raise ValueError(f"found {num_kv_heads} key heads for {num_heads} query heads: wanted as many")
        if BLKQ not in QUERY_RUNS or BLKK != KEY_RUN:
            raise ValueError(f"found runs of {BLKQ} queries and {BLKK} keys: wanted BLKQ "
                             f"{' or '.join(map(str, QUERY_RUNS))} and BLKK {KEY_RUN}")
        feature_named(feature_map)
        self.num_heads, self.head_size, self.causal, self.prefix = num_heads, head_size, causal, prefix
        self.softmax_scale = softmax_scale if softmax_scale else head_size ** -0.5
        self.topk_ratio, self.feature_map = check_ratio(topk_ratio), feature_map
        self.BLKQ, self.BLKK = BLKQ, BLKK
        self.backend, self.on_selection = backend, on_selection
        self.proj_l = nn.Linear(head_size, head_size, dtype=torch.float32) if projects else None
        self._init_weights()

    def _init_weights(self) -> None:
        if self.proj_l is not None:
            nn.init.zeros_(self.proj_l.weight)
            nn.init.zeros_(self.proj_l.bias)

    def select(self, query: Tensor, key: Tensor, layout: RunLayout, topk: int) -> Tensor:
        """Runs of keys that every run of queries keeps, ascending.   q, k [B, S, H, D] -> int32 [B, H, Nq, topk]"""
        if topk == layout.num_keys:
            every = torch.arange(topk, dtype=torch.int32, device=query.device)
            return every.expand(query.shape[0], query.shape[2], layout.num_queries, topk)
        means = (tile_means((x,), rows, runs, run // BLOCK, self.backend)[0] for x, rows, runs, run in (
            (query, layout.query_rows, layout.num_queries, layout.query_run),
            (key, layout.keys.token_rows, layout.num_keys, BLOCK)))
        return select_tiles(*means, topk, 1.0, backend=self.backend)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: AttentionMetadata | None) -> Tensor:
        """Sparse branch plus proj_l of the linear one, [B, S, H, D] -> the same, contiguous, in query's dtype.

        Tokens that are not video are read by all queries, and their queries read everything.
        Raises ValueError for operands of different shapes or that do not fit the metadata, NoKernel when no kernel can
        run them.
        """
        if not query.shape == key.shape == value.shape or query.dim() != 4:
            raise ValueError(f"sparse-linear attention: found q {list(query.shape)}, k {list(key.shape)}, "
                             f"v {list(value.shape)}, wanted one shape [batch, sequence, heads, head_dim]")
        query, key, value = readable(query, key, value)
        md = attn_metadata
        if not isinstance(md, SLAAttentionMetadata):
            md = SLAAttentionMetadata(0, getattr(md, "topk_ratio", self.topk_ratio))
        layout = md.on(query.shape[1], self.BLKQ, query.device)
        kept = self.select(query, key, layout, kept_runs(md.topk_ratio, layout.num_keys))
        if self.on_selection is not None:
            self.on_selection(kept, layout)
        lists = _lists(kept, layout)
        if self.on_lists is not None:
            self.on_lists(slice(0, query.shape[2]), *lists, layout.keys)
        out = self._sparse(query, key, value, lists, layout)
        projection = md.projection or (None if self.proj_l is None else self._project)
        if projection is not None:
            state = linear_state(key, value, projection, self.feature_map, layout.visible)
            add_linear(out, query, state, self.feature_map)
        return out.to(query.dtype)

    def _project(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.proj_l.weight.to(x.dtype), self.proj_l.bias.to(x.dtype))

    def _sparse(self, query: Tensor, key: Tensor, value: Tensor, lists, layout: RunLayout) -> Tensor:
        return attend_lists_in_sequence(query, key, value, *lists, layout.keys, self.softmax_scale, self.backend)


def _lists(kept: Tensor, layout: RunLayout) -> tuple[Tensor, Tensor]:
    """indices and counts of the video's query blocks, as a kernel wants them."""
    batch, heads, _, topk = kept.shape
    others = layout.keys.num_other_blocks
    if topk == layout.num_keys:
        return dense_lists(batch, heads, layout.num_keys, layout.keys)
    if others:
        every = torch.arange(layout.num_keys, layout.num_keys + others, dtype=torch.int32, device=kept.device)
        kept = torch.cat([kept, every.expand(*kept.shape[:3], others)], dim=3)
    indices = layout.per_block(kept).contiguous()
    counts = torch.full((1, 1, 1), indices.shape[3], dtype=torch.int32, device=indices.device)
    return indices, counts.expand(indices.shape[:3])


class SageSLAAttentionImpl(SLAAttentionImpl):
    """SLA whose scores are those of 8-bit integers; the linear branch is SLA's.

    The quantised arithmetic, on the reference kernel: it shows what the integers cost in quality and is not fast. Needs
    no SpargeAttn, takes any head size, and keeps runs of 64 keys on every GPU, so that a seed selects alike everywhere.
    """

    def __init__(
        self, num_heads: int, head_size: int, causal: bool = False, softmax_scale: float | None = None,
        num_kv_heads: int | None = None, prefix: str = "", topk_ratio: float = 0.5, feature_map: str = "softmax",
        use_bf16: bool = True, backend: str = "auto", fp8_values: bool = False, **extra_impl_args,
    ) -> None:
        """fp8_values: v is rounded to FP8 as well; the weights of the softmax stay as they are, which upstream rounds.

        Raises ValueError as SLA does, and for a kernel other than the reference: no other has 8-bit scores.
        """
        if backend not in ("auto", "reference"):
            raise ValueError(f"found backend {backend!r} for 8-bit scores: wanted auto or reference, the one kernel "
                             "that computes them")
        super().__init__(num_heads, head_size, causal, softmax_scale, num_kv_heads, prefix, topk_ratio, feature_map,
                         use_bf16=use_bf16, backend=backend, **extra_impl_args)
        self.fp8_values = fp8_values

    def _sparse(self, query: Tensor, key: Tensor, value: Tensor, lists, layout: RunLayout) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        others = layout.keys.token_rows[layout.num_keys * BLOCK:]
        rows = torch.cat([layout.query_rows, nn.functional.pad(others, (0, -len(others) % layout.query_run), value=-1)])
        seen = key if layout.visible is None else key[:, layout.visible]
        key = key.to(wide) - seen.to(wide).mean(1, keepdim=True)
        query, key = through_int8(query, rows, layout.query_run), through_int8(key, layout.seen_rows(), BLOCK)
        value = through_fp8(value) if self.fp8_values else value.to(wide)
        return attend_lists_in_sequence(query, key, value, *lists, layout.keys, self.softmax_scale, "reference")


class SLAAttentionBackend(AttentionBackend):
    """SLA, for the selector and the tables."""

    @staticmethod
    def get_name() -> str:
        return "SLA_ATTN"

    @staticmethod
    def get_impl_cls() -> type[SLAAttentionImpl]:
        return SLAAttentionImpl

    @staticmethod
    def get_metadata_cls() -> type[SLAAttentionMetadata]:
        return SLAAttentionMetadata

    @staticmethod
    def get_builder_cls() -> type[SLAAttentionMetadataBuilder]:
        return SLAAttentionMetadataBuilder


class SageSLAAttentionBackend(SLAAttentionBackend):
    """SLA with 8-bit scores, for the selector and the tables."""

    @staticmethod
    def get_name() -> str:
        return "SAGE_SLA_ATTN"

    @staticmethod
    def get_impl_cls() -> type[SageSLAAttentionImpl]:
        return SageSLAAttentionImpl
