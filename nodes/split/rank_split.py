"""One forward pass on several cards where every card has a process of its own, and all of them sample the same clip."""
from __future__ import annotations

import logging

from ...vsa_core.sequence_parallel import ProcessRanks, get_sp_group, set_sp_group
from .evidence import Evidence
from .passes import Call, Split
from .split_attention import Times

log = logging.getLogger(__name__)


class RankSplit(Split):
    """This process's part of a split over the ranks of a torch.distributed process group."""

    def __init__(self, process_group):
        super().__init__([f"rank {rank}" for rank in range(process_group.size())])
        self.process_group = process_group

    def _outer_sample(self, executor, *args, **kwargs):
        self.evidence = Evidence(self.cards)
        try:
            return executor(*args, **kwargs)
        finally:
            log.info("rank %d: %s", self.process_group.rank(), self.evidence.text().replace("\n- ", " | "))

    def on_all_cards(self, executor, patcher, call: Call):
        times = Times()
        with set_sp_group(ProcessRanks(self.process_group)):
            out, shard = self.on_card(patcher, executor.class_obj, executor, call, times)
            self.evidence.add({get_sp_group().rank_in_group: (shard, times)})
        return out
