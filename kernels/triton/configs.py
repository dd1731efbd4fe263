"""How many warps and pipeline stages a card gets: a literal table, so nothing is tuned while a user waits.

Chosen from compiled code without a GPU (`dev/aot.py`): no spills, then as many programs per multiprocessor as
registers allow, then up to 3 stages as long as shared memory holds those programs. Measured on 9.0 only, by `make tune`
on an H100 (`benchmarks/results`): more stages at head_dim 64, and no other change (float16 at 128 was not reached).
"""
from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Config(NamedTuple):
    """Launch options of Triton, by its names."""

    num_warps: int
    num_stages: int
    enable_fp_fusion: bool = True
    """Scaling a score and masking it is one instruction then. Triton 3.10 stops doing so unless asked."""


BF16, FP16 = torch.bfloat16, torch.float16

# On every card but 9.0 registers allow two programs of 4 warps with any number of stages, so that 1 stage holds no
# more of them, and one program of 8 warps. At head_dim 128, 99 KB of shared memory (8.6, 8.9, 12.0) hold two with
# 2 stages (48 KB each), one with 3, which spills on 8.6 and 8.9, and none with 4.
# With integer scores the same holds: 32 KB with 2 stages at head_dim 128, and 56 KB with 3, of which 99 KB hold one. At
# head_dim 64, sums in float16 leave room for three programs.
# On 9.0 registers allow two programs at head_dim 128 and three at 64. Without token rows it is four at 64, which with
# 3 stages fill shared memory to the last byte, and three at 128, but with 1 stage only: 1 stage is 1.5 times slower.
CONFIGS: dict[tuple[tuple[int, int], int, torch.dtype], Config] = {
    ((8, 0), 64, BF16): Config(4, 3),
    ((8, 0), 64, FP16): Config(4, 3),
    ((8, 0), 128, BF16): Config(4, 3),
    ((8, 0), 128, FP16): Config(4, 3),
    ((8, 6), 64, BF16): Config(4, 3),
    ((8, 6), 64, FP16): Config(4, 3),
    ((8, 6), 128, BF16): Config(4, 2),
    ((8, 6), 128, FP16): Config(4, 2),
    ((8, 9), 64, BF16): Config(4, 3),
    ((8, 9), 64, FP16): Config(4, 3),
    ((8, 9), 128, BF16): Config(4, 2),
    ((8, 9), 128, FP16): Config(4, 2),
    ((9, 0), 64, BF16): Config(4, 3),
    ((9, 0), 64, FP16): Config(4, 3),
    ((9, 0), 128, BF16): Config(4, 3),
    ((9, 0), 128, FP16): Config(4, 3),
    ((12, 0), 64, BF16): Config(4, 3),
    ((12, 0), 64, FP16): Config(4, 3),
    ((12, 0), 128, BF16): Config(4, 2),
    ((12, 0), 128, FP16): Config(4, 2),
}

CANDIDATES = (Config(4, 1), Config(4, 2), Config(4, 3), Config(4, 4),
              Config(8, 1), Config(8, 2), Config(8, 3), Config(8, 4))
"""What may be worth measuring on a card: `make tune` times them, `dev/aot.py --candidates` compiles them for all."""

DEFAULT = Config(4, 2)
"""For cards not in the table; its shared memory fits every card from sm_80 on."""


@cache
def config_for(capability: tuple[int, int] | None, head_dim: int, dtype: torch.dtype) -> Config:
    """The table's entry for this card, else that of the newest listed card below it with the same major number.

    capability: compute capability, None off CUDA. Cards of a generation that is not listed get `DEFAULT`.
    """
    if capability is None:
        return DEFAULT
    kin = [card for card, dim, kind in CONFIGS
           if card[0] == capability[0] and card <= capability and (dim, kind) == (head_dim, dtype)]
    return CONFIGS[max(kin), head_dim, dtype] if kin else DEFAULT


def int8_config_for(capability: tuple[int, int] | None, head_dim: int, dtype: torch.dtype) -> Config:
    """The same with integer scores. On 8.0 a third stage spills at head_dim 128.

    At head_dim 128 some variants without a far field spill 8 to 64 bytes, which are saved before the loop and read back
    behind it (`dev/aot.py` looks after that).
    """
    config = config_for(capability, head_dim, dtype)
    return config._replace(num_stages=2) if capability == (8, 0) and head_dim == 128 else config


def sums_in_half(capability: tuple[int, int] | None) -> bool:
    """Whether products with 16-bit floats take half the time where they are summed in 16 bits, not 32: on GeForce RTX
    30, 40 and 50 (NVIDIA Ada GPU architecture whitepaper, table of peak rates)."""
    return capability is not None and (capability[0] == 12 or capability[0] == 8 and capability[1] >= 6)
