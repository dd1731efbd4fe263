"""Compile the Triton kernel for every card in its table, without a GPU, and check what comes out.

    python dev/aot.py [--arch sm_89 ...] [--json FILE] [--jobs N]

One row per (card, head_dim, dtype, with or without LSE). Exits 1 when a row spills registers, wants more
shared memory than its card has, or lacks tensor-core instructions. "CTAs" is how many programs one
multiprocessor can hold by registers, shared memory and threads: an estimate, nothing is run.
"""
import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

ROOT = Path(__file__).resolve().parent.parent
POINTERS = {"Q": None, "K": None, "V": None, "OUT": None, "LSE": "fp32", "INDICES": "i32", "COUNTS": "i32",
            "SIZES": "i32"}
COLUMNS = ("arch", "D", "dtype", "lse", "warps", "stages", "registers", "spill B", "shared KB", "CTAs", "HMMA", "HGMMA")


class Card(NamedTuple):
    """Limits from the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    shared_kb: int
    """Most shared memory one program may use. A multiprocessor has 1 KB more, and keeps 1 KB for every program."""
    threads: int
    programs: int


CARDS = {(8, 0): Card(163, 2048, 32), (8, 6): Card(99, 1536, 16), (8, 9): Card(99, 1536, 24),
         (9, 0): Card(227, 2048, 32), (12, 0): Card(99, 1536, 24)}


def load_pack():
    """Import the repository root as `pack`, whatever its folder is called."""
    import importlib.util
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    sys.modules["pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["pack"])


def name(capability):
    return "sm_{}{}".format(*capability)


def compile_row(capability, head_dim, dtype, return_lse):
    """Compile one entry of the table; returns the row of the report as a dict keyed by COLUMNS."""
    if "pack" not in sys.modules:
        load_pack()
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pack.kernels.triton.block_sparse import block_sparse_forward as kernel
    from pack.kernels.triton.configs import config_for

    config = config_for(capability, head_dim, getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[dtype]))
    constants = {"D": head_dim, "BLOCK": 64, "RETURN_LSE": return_lse, "INTERPRET": False}
    if not return_lse:
        constants["LSE"] = None
    signature, hints = {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
            continue
        if parameter.name in POINTERS:
            signature[parameter.name] = "*" + (POINTERS[parameter.name] or dtype)
        else:
            signature[parameter.name] = "fp32" if parameter.name == "scale_log2e" else "i32"
        if not parameter.do_not_specialize and signature[parameter.name] != "fp32":
            hints[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    built = triton.compile(source, target=target, options=config._asdict())
    registers, spilled, sass = inspect(built.asm["cubin"])
    shared = built.metadata.shared
    values = (name(capability), head_dim, dtype, return_lse, config.num_warps, config.num_stages, registers, spilled,
              shared / 1024, programs_per_sm(capability, registers, shared, config.num_warps),
              len(re.findall(r"\bHMMA\b", sass)), len(re.findall(r"\bHGMMA\b", sass)))
    return dict(zip(COLUMNS, values, strict=True))


def inspect(cubin):
    """(registers, bytes of local memory, disassembly). All local memory here is spills: the kernel has no arrays."""
    import triton
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def dump(option):
            return subprocess.run([cuobjdump, option, path], capture_output=True, text=True, check=True).stdout

        used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("--dump-resource-usage"))
        registers, stack, local = map(int, used.groups())
        return registers, stack + local, dump("-sass")


def programs_per_sm(capability, registers, shared, warps):
    card = CARDS[capability]
    by_registers = 65536 // (-(-registers // 8) * 8 * 32 * warps)
    by_shared = (card.shared_kb + 1) * 1024 // (shared + 1024)
    return min(by_registers, by_shared, card.threads // (32 * warps), card.programs)


def faults(row):
    """What is wrong with a row, as sentences."""
    where = f"{row['arch']} D {row['D']} {row['dtype']}{' with LSE' if row['lse'] else ''}"
    card = next(card for capability, card in CARDS.items() if name(capability) == row["arch"])
    if row["spill B"]:
        yield f"{where}: spills {row['spill B']} bytes, wanted 0"
    if row["shared KB"] > card.shared_kb:
        yield f"{where}: {row['shared KB']:.0f} KB of shared memory, the card has {card.shared_kb}"
    if not row["HGMMA" if row["arch"] == "sm_90" else "HMMA"]:
        yield f"{where}: no tensor-core instructions"


def print_table(rows):
    cells = [COLUMNS, *([f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=[name(card) for card in CARDS], help="default: all of them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()

    wanted = [(card, dim, dtype, lse) for card in CARDS if not options.arch or name(card) in options.arch
              for dim in (64, 128) for dtype in ("bf16", "fp16") for lse in (False, True)]
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            pending = [pool.submit(compile_row, *entry) for entry in wanted]
            for done, _ in enumerate(as_completed(pending), 1):
                print(f"\rcompiled {done} of {len(wanted)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        rows = [future.result() for future in pending]
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    problems = [fault for row in rows for fault in faults(row)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
