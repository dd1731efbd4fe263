"""A sequence that several ranks share: each holds some of its rows, and trades them for heads around attention.

DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509): a rank then has all rows of its heads, so that tiles, lists,
windows and gates are what they are on one rank. Names: FastVideo, distributed/communication_op.py and
parallel_state.py at 2f3d4074. Wider than upstream: rows and heads need not divide by the ranks, and the ranks may be
threads of one process (`thread_ranks`).
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor


def even_shares(total: int, ranks: int) -> tuple[int, ...]:
    """How many of `total` rows or heads each rank has: they differ by one at most, the first ranks have more."""
    return tuple(total // ranks + (rank < total % ranks) for rank in range(ranks))


def ranges_of(shares: Sequence[int]) -> list[range]:
    """Which rows or heads each rank has, in rank order."""
    return [range(*ends) for ends in pairwise(accumulate(shares, initial=0))]


class SequenceParallelGroup(ABC):
    """The ranks that share one sequence, as one of them sees them. All make the same calls in the same order."""

    def __init__(self, world_size: int, rank_in_group: int):
        self.world_size, self.rank_in_group = world_size, rank_in_group
        self.exchanges = self.sent_bytes = 0
        """Exchanges so far, and what this rank sent to others in them."""

    @abstractmethod
    def _exchange(self, pieces: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """pieces[r] goes to rank r; into[r] gets what rank r sent here. Pieces are contiguous."""

    def exchange(self, pieces: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """The one primitive: pieces[r] goes to rank r, into[r] gets what rank r sent here, of one dtype.

        into: views of a tensor on this rank's device, of the shapes that the others send.
        """
        self.exchanges += 1
        self.sent_bytes += sum(piece.nbytes for rank, piece in enumerate(pieces) if rank != self.rank_in_group)
        self._exchange(pieces, into)

    def heads_from_sequence(self, parts: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """All rows of this rank's heads, from some rows of all heads; q, k, v and gate go together.

        parts: each [B, rows[rank], H, D] -> each [B, sum(rows), H of this rank, D].
        Raises ValueError for fewer heads than ranks.
        """
        if self.world_size == 1:
            return list(parts)
        batch, _, num_heads, head_dim = parts[0].shape
        heads = self.heads_of(num_heads)
        with torch.no_grad():
            pieces = [torch.stack([x[:, :, part.start:part.stop] for x in parts]) for part in heads]
            out = parts[0].new_empty(len(parts), batch, sum(rows), len(heads[self.rank_in_group]), head_dim)
            self.exchange(pieces, out.split(tuple(rows), dim=2))
        return list(_without_backward(out, *parts))

    def sequence_from_heads(self, x: Tensor, rows: Sequence[int], num_heads: int) -> Tensor:
        """The inverse.   [B, sum(rows), H of this rank, D] -> [B, rows[rank], num_heads, D]"""
        if self.world_size == 1:
            return x
        batch, _, _, head_dim = x.shape
        heads = self.heads_of(num_heads)
        with torch.no_grad():
            pieces = [piece.contiguous() for piece in x.split(tuple(rows), dim=1)]
            out = x.new_empty(batch, rows[self.rank_in_group], num_heads, head_dim)
            self.exchange(pieces, out.split([len(part) for part in heads], dim=2))
        return _without_backward(out, x)

    def gather(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """The parts of all ranks joined along `dim`, on every rank. sizes: of every rank's part along it."""
        if self.world_size == 1:
            return x
        shape = list(x.shape)
        shape[dim] = sum(sizes)
        with torch.no_grad():
            out, piece = x.new_empty(shape), x.contiguous()
            self.exchange([piece] * self.world_size, out.split(tuple(sizes), dim=dim))
        return _without_backward(out, x)

    def heads_of(self, num_heads: int) -> list[range]:
        """The heads of every rank. Raises ValueError for fewer heads than ranks."""
        if num_heads < self.world_size:
            raise ValueError(f"{num_heads} heads for {self.world_size} ranks: wanted at least one head for each. "
                             "Use fewer ranks")
        return ranges_of(even_shares(num_heads, self.world_size))


class OneRank(SequenceParallelGroup):
    """A sequence that is not shared."""

    def __init__(self):
        super().__init__(1, 0)

    def _exchange(self, pieces, into) -> None:
        into[0].copy_(pieces[0])


class ProcessRanks(SequenceParallelGroup):
    """The ranks of a torch.distributed process group: processes, or threads with a group object each."""

    def __init__(self, device_group: dist.ProcessGroup):
        super().__init__(device_group.size(), device_group.rank())
        self.device_group = device_group

    def _exchange(self, pieces, into) -> None:
        send = torch.cat([piece.reshape(-1).view(torch.uint8) for piece in pieces])     # not every backend knows bf16
        sizes = [target.nbytes for target in into]
        received = send.new_empty(sum(sizes))
        self.device_group.alltoall_base(received, send, sizes, [piece.nbytes for piece in pieces],
                                        dist.AllToAllOptions()).wait()
        for piece, target in zip(received.split(sizes), into, strict=True):
            target.copy_(piece.view(target.dtype).view(target.shape))


# -- the group of this thread, under FastVideo's names -----------------------------------------------------------------

_group: ContextVar[SequenceParallelGroup | None] = ContextVar("sequence_parallel_group", default=None)


@contextmanager
def set_sp_group(group: SequenceParallelGroup | dist.ProcessGroup) -> Iterator[SequenceParallelGroup]:
    """Layers called inside, on this thread, share their sequence with the ranks of `group`."""
    token = _group.set(group if isinstance(group, SequenceParallelGroup) else ProcessRanks(group))
    try:
        yield _group.get()
    finally:
        _group.reset(token)


def get_sp_group() -> SequenceParallelGroup:
    """The group of this thread. Raises RuntimeError outside of `set_sp_group`."""
    group = _group.get()
    if group is None:
        raise RuntimeError("no sequence-parallel group: wanted `with set_sp_group(process_group):` around the model")
    return group


def sp_group_or_one() -> SequenceParallelGroup:
    """The group of this thread, one rank outside of `set_sp_group`."""
    return _group.get() or OneRank()


def get_sp_world_size() -> int:
    """Ranks that share the sequence, 1 outside of `set_sp_group`."""
    return sp_group_or_one().world_size


def get_sp_parallel_rank() -> int:
    """This rank's place among them, 0 outside of `set_sp_group`."""
    return sp_group_or_one().rank_in_group


def sequence_model_parallel_all_to_all_4D(      # noqa: N802, upstream's name
    input_: Tensor, scatter_dim: int = 2, gather_dim: int = 1, sizes: Sequence[int] | None = None,
) -> Tensor:
    """(2, 1): [B, S of this rank, H, D] -> [B, S, H of this rank, D]; (1, 2): the inverse.

    sizes: of every rank along gather_dim; None: as many as here. Along scatter_dim the shares are `even_shares`.
    Raises ValueError for other dimensions: found, wanted.
    """
    group = sp_group_or_one()
    if input_.dim() != 4 or (scatter_dim, gather_dim) not in ((2, 1), (1, 2)):
        raise ValueError(f"all-to-all of {list(input_.shape)} from dim {scatter_dim} to {gather_dim}: wanted "
                         "[batch, sequence, heads, head_dim], and dims 2 and 1 or 1 and 2")
    sizes = (input_.shape[gather_dim],) * group.world_size if sizes is None else tuple(sizes)
    if gather_dim == 1:
        return group.heads_from_sequence((input_,), sizes)[0]
    return group.sequence_from_heads(input_, even_shares(input_.shape[1], group.world_size), sum(sizes))


def sequence_model_parallel_all_gather(input_: Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> Tensor:
    """The ranks' tensors joined along `dim`, in rank order. sizes: theirs along it; None: as many as here."""
    group = sp_group_or_one()
    dim %= input_.dim()
    return group.gather(input_, (input_.shape[dim],) * group.world_size if sizes is None else tuple(sizes), dim)


def sequence_model_parallel_shard(input_: Tensor, dim: int = 1) -> Tensor:
    """This rank's part of a tensor that all have, by `even_shares` without padding."""
    group = sp_group_or_one()
    part = ranges_of(even_shares(input_.shape[dim], group.world_size))[group.rank_in_group]
    return input_.narrow(dim, part.start, len(part))


class _NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(context, out, *operands):
        return out.view_as(out)

    @staticmethod
    def backward(context, gradient):
        raise RuntimeError("an exchange between ranks has no backward pass: found operands that require a gradient. It "
                           "is for sampling: run it under torch.no_grad()")


def _without_backward(out: Tensor, *operands: Tensor) -> Tensor:
    """What an exchange gave for the operands, through which no gradient is lost in silence."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in operands):
        return _NoBackward.apply(out, *operands)
    return out
