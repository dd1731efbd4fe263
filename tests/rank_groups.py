"""Ranks for the tests: threads that copy, threads with a gloo group each."""
from functools import partial

import torch.distributed as dist

from pack.vsa_core.sequence_parallel import ProcessRanks, get_sp_group, set_sp_group
from pack.vsa_core.thread_ranks import run_as_ranks


def by_copies(world_size, work):
    """What work(group) returns on every rank; the ranks are threads that copy from one another."""
    return run_as_ranks([lambda: work(get_sp_group())] * world_size)


def by_gloo(world_size, work):
    """The same with a torch.distributed group object per thread."""
    store = dist.HashStore()

    def on(rank):
        with set_sp_group(ProcessRanks(dist.ProcessGroupGloo(store, rank, world_size))) as group:
            return work(group)

    return run_as_ranks([partial(on, rank) for rank in range(world_size)])


ENGINES = {"copies": by_copies, "gloo": by_gloo}
