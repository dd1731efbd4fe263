"""Ranks of one process: a thread for each, which copy what they need from one another's devices."""
from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .sequence_parallel import ProcessRanks, SequenceParallelGroup, set_sp_group

T = TypeVar("T")


class Meeting:
    """Where ranks that are threads of one process meet, and where they learn that one of them failed."""

    def __init__(self, world_size: int):
        self._barrier, self._lock = threading.Barrier(world_size), threading.Lock()
        self._said: list[list[tuple[str, Any]]] = [[("", None)] * world_size for _ in range(2)]
        """Of this meeting and of the next, which some ranks may come to while others still read."""
        self._met = [0] * world_size
        self.failure: tuple[int, BaseException] | None = None
        """The rank that failed first, and how."""

    def meet(self, rank: int, what: str, said: Any = None) -> list[Any]:
        """What all ranks say, once all of them have. Raises RuntimeError when one failed, or came for something else.

        what: what the rank is about to do, the same for all.
        """
        here = self._said[self._met[rank] % 2]
        self._met[rank] += 1
        here[rank] = what, said
        self._wait(rank)
        found = list(here)
        wrong = next((other for other, (does, _) in enumerate(found) if does != what), None)
        if wrong is not None:
            self.fail(rank, RuntimeError(f"the ranks do not run the same model: {what} on rank {rank}, "
                                         f"{found[wrong][0]} on rank {wrong}"))
            self._wait(rank)
        return [what_it_said for _, what_it_said in found]

    def _wait(self, rank: int) -> None:
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            other = self.failure and self.failure[0]
            raise RuntimeError(f"rank {rank} stopped, as rank {other} failed") from None

    def fail(self, rank: int, error: BaseException) -> None:
        """No rank waits from now on: all that meet raise."""
        with self._lock:
            self.failure = self.failure or (rank, error)
        self._barrier.abort()


class ThreadRanks(SequenceParallelGroup):
    """Ranks that are threads of one process. Every rank copies what it gets from the others' device to its own."""

    def __init__(self, meeting: Meeting, world_size: int, rank_in_group: int):
        super().__init__(world_size, rank_in_group)
        self.meeting = meeting

    def _exchange(self, pieces, into) -> None:
        rank = self.rank_in_group
        offers = self.meeting.meet(rank, "exchange", (pieces, _moment(pieces[0].device)))
        for (theirs, ready), target in zip(offers, into, strict=True):
            if theirs[rank].shape != target.shape:
                raise ValueError(f"exchange: rank {rank} got {list(theirs[rank].shape)}, wanted {list(target.shape)}")
            _after(ready, theirs[rank].device)
            target.copy_(theirs[rank], non_blocking=True)
        # Nobody's pieces may be overwritten before they are copied.
        for copied in self.meeting.meet(rank, "copied", _moment(into[0].device)):
            _after(copied, pieces[0].device)


class ThreadProcessRanks(ProcessRanks):
    """Ranks that are threads of one process, with a torch.distributed group object each."""

    def __init__(self, meeting: Meeting, device_group: dist.ProcessGroup):
        super().__init__(device_group)
        self.meeting = meeting

    def _exchange(self, pieces, into) -> None:
        # The group itself would wait for a rank that failed until its timeout.
        self.meeting.meet(self.rank_in_group, "exchange")
        super()._exchange(pieces, into)


def _moment(device: torch.device) -> torch.cuda.Event | None:
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _after(event: torch.cuda.Event | None, device: torch.device) -> None:
    """What the device does from here on, it does after the event."""
    if event is not None and device.type == "cuda":
        torch.cuda.current_stream(device).wait_event(event)


def run_as_ranks(
    works: Sequence[Callable[[], T]], process_groups: Sequence[dist.ProcessGroup] | None = None,
) -> list[T]:
    """What the works return, one per rank, the first on this thread and each of the others on a thread of its own.

    Each finds its group by `get_sp_group`. process_groups: one per rank, for torch.distributed in place of copies.
    When one raises, no other waits for it any longer, and once all have
    ended RankFailed is raised from that first error.
    """
    meeting, results = Meeting(len(works)), [None] * len(works)

    def run(rank: int) -> None:
        try:
            group = (ThreadRanks(meeting, len(works), rank) if process_groups is None
                     else ThreadProcessRanks(meeting, process_groups[rank]))
            with set_sp_group(group):
                results[rank] = works[rank]()
            meeting.meet(rank, "the end")
        except BaseException as error:      # an interrupt too: the others must not wait for ever
            meeting.fail(rank, error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(1, len(works))]
    for thread in threads:
        thread.start()
    run(0)
    for thread in threads:
        thread.join()
    if meeting.failure is not None:
        rank, error = meeting.failure
        raise RankFailed(rank, error) from error
    return results


class RankFailed(RuntimeError):
    """One rank of several raised `error`; the rest were stopped."""

    def __init__(self, rank: int, error: BaseException):
        super().__init__(f"rank {rank}: {type(error).__name__}: {error}")
        self.rank, self.error = rank, error
