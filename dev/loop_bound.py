"""What an RTX 4090 could reach at best with a compiled attention kernel: its inner loop's instructions, and a bound.

One scheduler of a multiprocessor (there are four) issues an instruction per cycle and feeds a tensor core and a unit
for exponentials. Rates: NVIDIA Ada GPU architecture whitepaper (165 TFLOPS of 16-bit floats with sums in float32, 330
with sums in float16, 660 TOPS of int8), CUDA C++ Programming Guide (16 exponentials per cycle and multiprocessor).
Whichever is busy longest binds: an upper bound, since nothing waits and all overlaps.
"""
import re
from collections import Counter

MULTIPROCESSORS, SCHEDULERS, CLOCK = 128, 4, 2.52e9
CYCLES = {"HMMA": 32, "HMMA.F16": 16, "IMMA": 16}
"""Of one warp's 16x8x16 product with sums in float32 and in float16, and 16x8x32 product of integers."""
MUFU_CYCLES = 8
"""Of 32 exponentials."""
LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")


def inner_loop(sass):
    """Counts of the instructions in the loop with the most tensor-core ones, by class; empty without a loop."""
    code = [(int(at, 16), name, rest) for at, name, rest in LINE.findall(sass)]
    loops = []
    for at, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) < at:
            loops.append([other for where, other, _ in code if int(target[1], 16) <= where <= at])
    found = max(loops, key=lambda names: sum("MMA" in name for name in names), default=[])
    return Counter(_class(name) for name in found)


def _class(name):
    stem = name.split(".")[0]
    if stem == "HMMA" and ".F32" not in name:
        return "HMMA.F16"
    if stem in ("HMMA", "IMMA", "MUFU"):
        return stem
    return "shared" if stem in ("LDSM", "LDS", "STS") else "spilled" if stem in ("LDL", "STL") else "other"


def bound(counts, head_dim, warps=4, block=64):
    """TFLOPS of attention (two products per pair) that the counts of one step allow on an RTX 4090."""
    cycles = max(sum(cycles * counts[name] for name, cycles in CYCLES.items()), MUFU_CYCLES * counts["MUFU"],
                 counts.total())
    flop = 4 * block * block * head_dim / warps
    return flop / cycles * MULTIPROCESSORS * SCHEDULERS * CLOCK / 1e12 if cycles else 0.0
