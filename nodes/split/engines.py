"""What moves tensors between the cards of one process: copies from device to device, or torch.distributed."""
from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ...vsa_core.thread_ranks import run_as_ranks

AUTO, COPIES, DISTRIBUTED = "auto", "device copies", "torch.distributed"
EXCHANGES = AUTO, COPIES, DISTRIBUTED


def refusal(exchange: str, devices: Sequence[torch.device]) -> str:
    """Why these devices cannot trade tensors this way, "" where they can."""
    if exchange not in EXCHANGES:
        return f"exchange {exchange!r}: wanted {', '.join(EXCHANGES)}"
    if exchange != DISTRIBUTED:
        return ""
    if not dist.is_available():
        return "this torch was built without torch.distributed: choose device copies"
    if all(device.type == "cpu" for device in devices):
        return "" if dist.is_gloo_available() else "this torch was built without gloo: choose device copies"
    if not dist.is_nccl_available():
        return "this torch was built without NCCL, as on Windows: choose device copies"
    return ""


def groups_of(exchange: str, devices: Sequence[torch.device]) -> list[dist.ProcessGroup] | None:
    """A torch.distributed group object per card, None where cards copy from one another."""
    if exchange != DISTRIBUTED:
        return None
    store, count = dist.HashStore(), len(devices)
    engine = dist.ProcessGroupGloo if devices[0].type == "cpu" else dist.ProcessGroupNCCL

    def make(rank: int):
        if devices[rank].type == "cuda":
            torch.cuda.set_device(devices[rank])
        return engine(store, rank, count)

    return run_as_ranks([lambda rank=rank: make(rank) for rank in range(count)])
