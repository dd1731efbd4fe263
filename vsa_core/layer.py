"""The attention layers that run whichever backend was selected for them. Names: FastVideo, attention/layer.py."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .forward_context import get_forward_context
from .rotary import apply_rotary_emb
from .selector import AttentionBackendEnum, backend_name_to_enum, get_attn_backend
from .sequence_parallel import sp_group_or_one


class LocalAttention(nn.Module):
    """Attention on one device. The backend is chosen once, when the layer is made."""

    def __init__(
        self, num_heads: int, head_size: int, num_kv_heads: int | None = None, softmax_scale: float | None = None,
        causal: bool = False, supported_attention_backends: tuple[AttentionBackendEnum, ...] | None = None,
        **extra_impl_args,
    ) -> None:
        """extra_impl_args go to the backend's implementation: backend (the kernel), prefix, on_selection, ...

        `dtype` among them is the one to select for, torch's default dtype otherwise.
        Raises ValueError when no backend can be had (`selector.get_attn_backend`) or it refuses the arguments.
        """
        super().__init__()
        self.dtype = extra_impl_args.pop("dtype", None) or torch.get_default_dtype()
        self.softmax_scale = head_size ** -0.5 if softmax_scale is None else softmax_scale
        self.num_heads, self.head_size = num_heads, head_size
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.attn_backend = get_attn_backend(head_size, self.dtype, supported_attention_backends)
        self.backend = backend_name_to_enum(self.attn_backend.get_name())
        self.attn_impl = self.attn_backend.get_impl_cls()(
            num_heads=num_heads, head_size=head_size, softmax_scale=self.softmax_scale,
            num_kv_heads=self.num_kv_heads, causal=causal, **extra_impl_args)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, freqs_cis: tuple[Tensor, Tensor] | None = None,
        gate_compress: Tensor | None = None,
    ) -> Tensor:
        """Attention in sequence order with the metadata of `set_forward_context`.

        q, k, v, gate_compress: [B, S, H, D]; freqs_cis: cos and sin [S, D/2], for q and k -> [B, S, H, D].
        gate_compress weighs the coarse branch of a backend that has one.
        Raises ValueError for operands or metadata that are another backend's, RuntimeError outside of a context.
        """
        _require_4d(q, k, v)
        metadata = self._metadata()
        if freqs_cis is not None:
            q, k = apply_rotary_emb(q, *freqs_cis), apply_rotary_emb(k, *freqs_cis)
        return self.attn_impl.attend(q, k, v, metadata, gate_compress)

    def _metadata(self):
        """That of the forward pass. Raises ValueError where it is another backend's."""
        metadata = get_forward_context().attn_metadata
        wanted = self.attn_backend.get_metadata_cls()
        dense = self.backend is AttentionBackendEnum.TORCH_SDPA
        if not (isinstance(metadata, wanted) or dense and metadata is None):
            raise ValueError(f"attention backend {self.backend.name}: found {type(metadata).__name__}, "
                             f"wanted {wanted.__name__} in set_forward_context")
        return metadata


def _require_4d(q: Tensor, k: Tensor, v: Tensor) -> None:
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(f"attention: found q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}, "
                         "wanted [batch, sequence, heads, head_dim]")


class DistributedAttention(LocalAttention):
    """Attention over a sequence whose rows are spread over the ranks of `set_sp_group`.

    Every rank has a layer object of its own, gives the rows that it has and gets the same rows back; in between it
    computes its heads over all rows. Outside of a group it is attention on one device.
    """

    def __init__(
        self, num_heads: int, head_size: int, num_kv_heads: int | None = None, softmax_scale: float | None = None,
        causal: bool = False, supported_attention_backends: tuple[AttentionBackendEnum, ...] | None = None,
        prefix: str = "", **extra_impl_args,
    ) -> None:
        """prefix: the layer's place in the model, such as blocks.7.attn1. The rest, and errors: `LocalAttention`."""
        super().__init__(num_heads, head_size, num_kv_heads, softmax_scale, causal, supported_attention_backends,
                         prefix=f"{prefix}.impl", **extra_impl_args)

    @torch.compiler.disable
    def forward(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, original_seq_len: int | None = None,
        replicated_q: Tensor | None = None, replicated_k: Tensor | None = None, replicated_v: Tensor | None = None,
        freqs_cis: tuple[Tensor, Tensor] | None = None, sequence_rows: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(output, output of the replicated tokens or None), with the metadata of `set_forward_context`.

        q, k, v: this rank's rows [B, S_r, H, D] -> output [B, S_r, H, D].
        original_seq_len: rows of all ranks without the padding at their end; None or 0: none is padding.
        replicated_q, _k, _v: tokens that every rank has, such as text, [B, L, H, D] -> [B, L, H, D]. They come behind
        the sequence, so that a grid in the metadata has them as its suffix. Rotary embedding leaves them alone.
        freqs_cis: cos and sin [original_seq_len, D/2] of the whole sequence, for q and k.
        sequence_rows: rows of every rank; None: all ranks have as many as this one.
        Raises ValueError for operands that do not fit together or the ranks: found, wanted.
        """
        replicated = replicated_q, replicated_k, replicated_v
        return self._attend_shared((q, k, v), original_seq_len, replicated, freqs_cis, sequence_rows)

    def _attend_shared(self, parts: tuple[Tensor, ...], original_seq_len: int | None,
                       replicated: tuple[Tensor | None, ...], freqs_cis, sequence_rows) -> tuple[Tensor, Tensor | None]:
        """parts: q, k, v and perhaps the gate."""
        _require_4d(*parts[:3])
        metadata, group = self._metadata(), sp_group_or_one()
        rows = self._rows(parts, sequence_rows, group)
        full = sum(rows)
        length = original_seq_len or full
        if length > full:
            raise ValueError(f"original_seq_len {original_seq_len}: the ranks have {full} rows, wanted at most as many")
        num_heads, heads = parts[0].shape[2], group.heads_of(parts[0].shape[2])
        mine = heads[group.rank_in_group]
        parts = tuple(x[:, :length] for x in group.heads_from_sequence(parts, rows))
        if freqs_cis is not None:
            parts = (*(apply_rotary_emb(x, *freqs_cis) for x in parts[:2]), *parts[2:])
        if any(x is not None for x in replicated):
            _require_replicated(replicated, (parts[0].shape[0], num_heads, parts[0].shape[3]))
            text = [x[:, :, mine.start:mine.stop] for x in replicated]
            text += [torch.zeros_like(text[0])] * (len(parts) - 3)       # the coarse branch is the grid's alone
            parts = tuple(torch.cat(both, dim=1) for both in zip(parts, text, strict=True))
        if hasattr(self.attn_impl, "first_head"):
            self.attn_impl.first_head = mine.start if group.world_size > 1 else None
        out = self.attn_impl.attend(*parts[:3], metadata, *parts[3:])
        video, text = out[:, :length], out[:, length:]
        if full > length:
            video = torch.nn.functional.pad(video, (0, 0, 0, 0, 0, full - length))
        gathered = None
        if replicated[0] is not None:
            gathered = group.gather(text, [len(part) for part in heads], dim=2)
        return group.sequence_from_heads(video, rows, num_heads), gathered

    @staticmethod
    def _rows(parts, sequence_rows, group) -> tuple[int, ...]:
        if any(x.shape != parts[0].shape for x in parts):
            raise ValueError(f"attention over several ranks: found {[list(x.shape) for x in parts]}, wanted one shape "
                             "for q, k, v and gate")
        here, ranks = parts[0].shape[1], group.world_size
        rows = (here,) * ranks if sequence_rows is None else tuple(sequence_rows)
        if len(rows) != ranks or rows[group.rank_in_group] != here:
            raise ValueError(f"sequence_rows {list(rows)}: rank {group.rank_in_group} of {ranks} has {here}")
        return rows


def _require_replicated(replicated: tuple[Tensor | None, ...], wanted: tuple[int, int, int]) -> None:
    found = [None if x is None else list(x.shape) for x in replicated]
    if None in found or any(x != found[0] or (x[0], *x[2:]) != wanted for x in found):
        batch, heads, head_dim = wanted
        raise ValueError(f"replicated q, k, v: found {found}, wanted all three of them, [{batch}, tokens, {heads}, "
                         f"{head_dim}]")


class DistributedAttention_VSA(DistributedAttention):  # noqa: N801, upstream's name
    """`DistributedAttention` for a backend with a coarse branch, whose gate goes the way of q, k and v."""

    @torch.compiler.disable
    def forward(  # type: ignore[override]
        self, q: Tensor, k: Tensor, v: Tensor, original_seq_len: int | None,
        replicated_q: Tensor | None = None, replicated_k: Tensor | None = None, replicated_v: Tensor | None = None,
        gate_compress: Tensor | None = None, freqs_cis: tuple[Tensor, Tensor] | None = None,
        sequence_rows: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As `DistributedAttention.forward`. gate_compress [B, S_r, H, D]; None: no coarse branch."""
        parts = (q, k, v) if gate_compress is None else (q, k, v, gate_compress)
        replicated = replicated_q, replicated_k, replicated_v
        return self._attend_shared(parts, original_seq_len, replicated, freqs_cis, sequence_rows)
