"""Compile the Triton kernels for every card in their table, without a GPU, and check what comes out.

    python dev/aot.py [--arch sm_89 ...] [--fewer | --candidates] [--sizes 64 ...] [--json FILE] [--jobs N]

One row per kernel, card, head_dim or row length, dtype and variant. Exits 1 when a row spills registers, wants more
shared memory than its card has, or lacks tensor-core instructions that it should have. "CTAs" is how many programs
one multiprocessor can hold by registers, shared memory and threads: an estimate, nothing is run. "loop" counts the
instructions of the attention kernel's inner loop, "in loop" those of them that are about spills, "bound" is what they
allow an RTX 4090 at best, in TFLOPS.

--fewer: every variant of the attention kernel for sm_89 and head_dim 128 only, those whose speed is compared for
head_dim 64 too, and of each kernel for every card the one that holds most. What differs between variants is told by
that one card, what differs between cards by that one variant.

--candidates: instead, every launch that `make tune` would measure, for the attention kernel as it holds most. The last
column marks the table's entry, what spills and what the card has no room for; neither fails.
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

from load_pack import load_pack
from loop_bound import bound, inner_loop

os.environ.pop("TRITON_INTERPRET", None)

POINTERS = {"LSE": "fp32", "INDICES": "i32", "COUNTS": "i32", "SIZES": "i32", "TOKEN_ROWS": "i32", "COARSE": "fp32",
            "FAR": "fp32", "FAR_LSE": "fp32", "KEY_SCALES": "fp32", "KEY_MEAN": "fp32", "SUMS": "fp32",
            "INTEGERS": "i8", "EXPONENTS": "fp32", "LARGEST": "fp32", "HALVES": "fp16",
            "MEANS": "fp32", "QUERY_MEANS": "fp32", "KEY_MEANS": "fp32", "SCORES": "fp32",
            **dict.fromkeys(("Q", "K", "V", "OUT", "GATE", "X", "Y", "Z"))}
"""What a pointer points to; None: the dtype of the row."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
FLOATS = ("scale", "scale_log2e")
COLUMNS = ("kernel", "arch", "D", "dtype", "variant", "warps", "stages", "registers", "spill B", "shared KB", "CTAs",
           "HMMA", "HGMMA", "IMMA", "loop", "in loop", "bound")
ATTENTION = {"bf16": ("", "lse", "gather", "gather lse", "gather far", "gather combine", "gather combine lse",
                      "gather combine far lse", "int8 gather", "int8 gather far", "int8 gather combine",
                      "int8 gather combine far lse"),
             "fp16": ("lse", "gather lse", "gather combine far lse", "int8 gather combine far lse")}
MOST = "gather combine far lse", "int8 gather combine far lse"
"""Variants of the attention kernel: with and without LSE, tokens in place, a softmax that has begun, and the coarse
branch in the epilogue: what the pack launches, and what holds most. In fp16, whose code differs in the name of a type,
only those that hold most."""
MAY_SPILL = {"int8 gather": 16, "int8 gather combine": 8}
"""Bytes per thread at head_dim 128 on sm_120, saved before the loop and read back behind it. No other row spills."""
ROWS = (500, 1000, 2000, 4096)
"""Tiles to select from: one of every length that `select_tiles.py` compiles for."""


class Card(NamedTuple):
    """Limits from the CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    shared_kb: int
    """Most shared memory one program may use. A multiprocessor has 1 KB more, and keeps 1 KB for every program."""
    threads: int
    programs: int


CARDS = {(8, 0): Card(163, 2048, 32), (8, 6): Card(99, 1536, 16), (8, 9): Card(99, 1536, 24),
         (9, 0): Card(227, 2048, 32), (12, 0): Card(99, 1536, 24)}
EVERY_VARIANT, COMPARED = (8, 9), ("gather far", "int8 gather far")
"""The card for which `--fewer` compiles every variant at head_dim 128, and those that it compiles at 64 as well."""


def name(capability):
    return "sm_{}{}".format(*capability)


def entries(card):
    """What to compile for a card: (card, kernel, head_dim or row length, dtype, variant)."""
    for dim in (64, 128):
        for dtype in ("bf16", "fp16"):
            yield from ((card, "block_sparse_forward", dim, dtype, variant) for variant in ATTENTION[dtype])
            yield card, "tile_means_forward", dim, dtype, ""
            yield card, "sum_keys", dim, dtype, ""
            yield card, "quantise_keys", dim, dtype, ""
        yield card, "score_tiles", dim, "fp32", ""
    yield from ((card, "select_rows", length, "fp32", "") for length in ROWS)


def fewer_entries(card):
    """Of `entries` those that `--fewer` compiles."""
    for entry in entries(card):
        _, kernel, size, dtype, variant = entry
        every, most = card == EVERY_VARIANT, size in (128, ROWS[-1])
        if kernel == "block_sparse_forward":
            most, every = variant in MOST, every and (size == 128 or variant in COMPARED)
        if dtype != "fp16" and (most or every) or dtype == "fp16" and card == EVERY_VARIANT and most and size == 128:
            yield entry


def candidates(card):
    """What `--candidates` compiles for a card: an entry, and in its last place the launch options to try."""
    from pack.kernels.triton.configs import CANDIDATES
    for dim in (64, 128):
        yield from ((card, "block_sparse_forward", dim, "bf16", MOST[0], config._asdict())
                    for config in CANDIDATES)


def kernel_of(capability, kernel, size, dtype, variant, options=None):
    """(function, constants, launch options) of one entry, as the pack launches it. options: the attention's instead."""
    import torch

    from pack.kernels.triton import block_sparse, quantise, select_tiles, tile_means
    from pack.kernels.triton.configs import config_for, int8_config_for, sums_in_half

    half = sums_in_half(capability)
    if kernel in ("sum_keys", "quantise_keys"):
        constants = {"D": size, "BLOCK": 64, "GATHER": True}
        constants |= {"HALF": half} if kernel == "sum_keys" else {"COPY": half and dtype != "fp16"}
        constants |= {name: None for name in ("LARGEST",) if kernel == "sum_keys" and not half}
        constants |= {name: None for name in ("HALVES", "EXPONENTS") if not constants.get("COPY", True)}
        return getattr(quantise, kernel), constants, {"num_warps": quantise.NUM_WARPS}
    if kernel == "tile_means_forward":
        return tile_means.tile_means_forward, {"D": size, "BLOCK": 64, "PARTS": 3}, {"num_warps": tile_means.NUM_WARPS}
    if kernel == "score_tiles":
        options = dict(select_tiles.SCORE_OPTIONS)
        return select_tiles.score_tiles, {"D": size, "TILE": select_tiles.SCORE_TILE,
                                          "DEPTH": options.pop("DEPTH")}, options
    if kernel == "select_rows":
        options = select_tiles.row_options(size)
        return select_tiles.select_rows, {"ROW": options.pop("ROW")}, options
    gather, combine, far, lse, int8 = (word in variant for word in ("gather", "combine", "far", "lse", "int8"))
    half = half and int8
    constants = {"D": size, "BLOCK": 64, "RETURN_LSE": lse, "GATHER": gather, "COMBINE": combine, "START": far,
                 "INT8": int8, "HALF": half, "INTERPRET": False}
    absent = {"LSE": not lse, "TOKEN_ROWS": not gather, "GATE": not combine, "COARSE": not combine,
              "FAR": not far, "FAR_LSE": not far, "KEY_SCALES": not int8, "KEY_MEAN": not int8,
              "EXPONENTS": not half}
    constants |= {name: None for name, is_absent in absent.items() if is_absent}
    choose = int8_config_for if int8 else config_for
    options = options or choose(capability, size, getattr(torch, DTYPES[dtype]))._asdict()
    return block_sparse.block_sparse_forward, constants, options


def compile_row(capability, kernel_name, size, dtype, variant, options=None):
    """Compile one entry; returns the row of the report as a dict keyed by COLUMNS."""
    load_pack()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, options = kernel_of(capability, kernel_name, size, dtype, variant, options)
    signature, hints = {}, {}
    for i, parameter in enumerate(kernel.params):
        if parameter.name in constants:
            signature[parameter.name] = "constexpr"
            continue
        if parameter.name in POINTERS:
            holds = POINTERS[parameter.name] or dtype
            if "int8" in variant:
                holds = {"K": "i8", "V": "fp16" if constants["HALF"] else holds}.get(parameter.name, holds)
            signature[parameter.name] = f"*{holds}"
        else:
            signature[parameter.name] = "fp32" if parameter.name in FLOATS else "i32"
        if not parameter.do_not_specialize and signature[parameter.name] != "fp32":
            hints[i,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    built = triton.compile(source, target=target, options=options)
    registers, spilled, sass = inspect(built.asm["cubin"])
    shared, warps = built.metadata.shared, options["num_warps"]
    values = (kernel_name, name(capability), size, dtype, variant, warps, built.metadata.num_stages, registers, spilled,
              shared / 1024, programs_per_sm(capability, registers, shared, warps),
              len(re.findall(r"\bHMMA\b", sass)), len(re.findall(r"\bHGMMA\b", sass)),
              len(re.findall(r"\bI(?:G?)MMA\b", sass)), *_loop(capability, kernel_name, size, sass))
    return dict(zip(COLUMNS, values, strict=True))


def _loop(capability, kernel_name, size, sass):
    """("loop", "in loop", "bound") of a row, 0 where they say nothing."""
    if kernel_name != "block_sparse_forward":
        return 0, 0, 0.0
    counts = inner_loop(sass)
    return counts.total(), counts["spilled"], bound(counts, size) if capability == (8, 9) else 0.0


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
    where = " ".join(str(row[column]) for column in COLUMNS[:5]).strip()
    card = next(card for capability, card in CARDS.items() if name(capability) == row["arch"])
    if row["in loop"]:
        yield f"{where}: {row['in loop']} instructions of its loop are about spills, wanted 0"
    may = MAY_SPILL.get(row["variant"], 0) if (row["arch"], row["D"], row["dtype"]) == ("sm_120", 128, "bf16") else 0
    if row["spill B"] > may:
        yield f"{where}: spills {row['spill B']} bytes, wanted {may}"
    if row["shared KB"] > card.shared_kb:
        yield f"{where}: {row['shared KB']:.0f} KB of shared memory, the card has {card.shared_kb}"
    if row["kernel"] == "block_sparse_forward" and not row["HGMMA" if row["arch"] == "sm_90" else "HMMA"]:
        yield f"{where}: no tensor-core instructions"
    if row["kernel"] == "block_sparse_forward" and ("int8" in row["variant"]) != (row["IMMA"] > 0):
        yield f"{where}: {row['IMMA']} integer tensor-core instructions"


def note(entry, row):
    """What there is to say about a candidate: whether the table has it, and why it cannot be launched or is slow."""
    import torch

    from pack.kernels.triton.configs import config_for
    capability, _, dim, dtype, _, options = entry
    marks = {"in the table": options == config_for(capability, dim, getattr(torch, DTYPES[dtype]))._asdict(),
             "spills": row["spill B"], "does not fit": row["shared KB"] > CARDS[capability].shared_kb}
    return ", ".join(mark for mark, holds in marks.items() if holds)


def print_table(rows):
    cells = [tuple(rows[0]), *([f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=[name(card) for card in CARDS], help="default: all of them")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--fewer", action="store_true", help="all variants for one card only")
    which.add_argument("--candidates", action="store_true", help="compile what `make tune` would measure instead")
    parser.add_argument("--sizes", nargs="+", type=int, help="head dims and row lengths to compile, default: all")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()

    if options.candidates:
        load_pack()
    of_card = candidates if options.candidates else fewer_entries if options.fewer else entries
    wanted = [entry for card in CARDS if not options.arch or name(card) in options.arch for entry in of_card(card)
              if not options.sizes or entry[2] in options.sizes]
    if not wanted:
        parser.error(f"--sizes {options.sizes}: no kernel has any of them")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
            pending = [pool.submit(compile_row, *entry) for entry in wanted]
            for done, _ in enumerate(as_completed(pending), 1):
                print(f"\rcompiled {done} of {len(wanted)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        rows = [future.result() for future in pending]
    if options.candidates:
        rows = [row | {"note": note(entry, row)} for entry, row in zip(wanted, rows, strict=True)]
    print_table(rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    problems = [] if options.candidates else [fault for row in rows for fault in faults(row)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
