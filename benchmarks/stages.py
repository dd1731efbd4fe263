"""What every stage of the whole sparse attention costs, in sequence order and by the three steps with tiled copies.

    python benchmarks/stages.py [--shapes NAME ...] [--sparsities 0.8 0.9] [--kernels triton] [--out benchmarks/results]
    python benchmarks/stages.py --dry-run --out FOLDER      the same steps on a CPU with a tiny problem

Writes DATE-GPU-stages.json and a Markdown table beside it. A stage that cannot run has its reason in place of a time.
Before a stage is timed its result is compared with torch's; one that is wrong is not timed.
"""
from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from block_problem import SHAPES, TINY  # noqa: E402
from gpu import ROOT, milliseconds, own_kernels, prepare_to_measure, save, start  # noqa: E402

MEANS, SELECT = "tile means of q, k, v", "scores, top-k and lists"
MEANS_TORCH, SELECT_TORCH = f"{MEANS}, torch", f"{SELECT}, torch"
COARSE, ATTENTION, GATED = "coarse attention", "attention, gathered", "attention, gathered and combined"
WHOLE, WHOLE_GATED, STEPS = "whole op", "whole op, gated", "whole op in three steps, gated"
STAGES = (MEANS, MEANS_TORCH, SELECT, SELECT_TORCH, COARSE, ATTENTION, GATED, WHOLE, WHOLE_GATED, STEPS)


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9])
    parser.add_argument("--kernels", nargs="+", help="attention kernels to measure the stages with (default: all)")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args(arguments)


def make_stages(shape, sparsity, kernel, device):
    """{stage: a function that runs it once}, all on one problem."""
    from pack.kernels import select_tiles, tile_means
    from pack.kernels.tile_ops import MEANS_KERNELS, SELECT_KERNELS
    from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder
    from pack.vsa_core.lowering import attend_lists_in_sequence

    dtype, scale = torch.bfloat16, shape.dim ** -0.5
    generator = torch.Generator(device).manual_seed(7)
    q, k, v, gate = (torch.randn(1, math.prod(shape.grid), shape.heads, shape.dim, generator=generator, device=device,
                                 dtype=dtype) for _ in range(4))
    md = VideoSparseAttentionMetadataBuilder().build(0, shape.grid, (1, 1, 1), sparsity, device, cache_tile_buf=False)
    impl = VideoSparseAttentionImpl(shape.heads, shape.dim, backend=kernel)
    tiles = math.prod(md.num_tiles)
    means = tile_means((q, k, v), md.token_rows, tiles, backend="reference")
    lists = select_tiles(*means[:2], md.topk, scale, backend="reference")
    counts = torch.full((1, 1, 1), md.topk, dtype=torch.int32, device=device).expand(lists.shape[:3])

    def coarse():
        return torch.nn.functional.scaled_dot_product_attention(*means, scale=scale)

    added = coarse()
    means_kernel, select_kernel = (table[0].name if device.type == "cuda" else kernel
                                   for table in (MEANS_KERNELS, SELECT_KERNELS))

    def attend(*gated):
        return attend_lists_in_sequence(q, k, v, lists, counts, md, scale, kernel, *gated)

    def three_steps():
        parts = impl.tile_parts((q, k, v, gate), md).chunk(4)
        return impl.postprocess_output(impl.forward(*parts, md), md)

    return {
        MEANS: lambda: torch.stack(tile_means((q, k, v), md.token_rows, tiles, backend=means_kernel)),
        MEANS_TORCH: lambda: torch.stack(tile_means((q, k, v), md.token_rows, tiles, backend="reference")),
        SELECT: lambda: select_tiles(*means[:2], md.topk, scale, backend=select_kernel),
        SELECT_TORCH: lambda: select_tiles(*means[:2], md.topk, scale, backend="reference"),
        COARSE: coarse, ATTENTION: attend, GATED: lambda: attend(gate, added),
        WHOLE: lambda: impl.attend(q, k, v, md), WHOLE_GATED: lambda: impl.attend(q, k, v, md, gate),
        STEPS: three_steps}


PAIRS = {MEANS: (MEANS_TORCH, 1e-5), SELECT: (SELECT_TORCH, 1e-3), WHOLE_GATED: (STEPS, 5e-3)}
"""What a stage is compared with, and how far it may be off: absolute, share of lists that differ, relative L2."""


def difference(stage, found, wanted) -> float:
    if stage == SELECT:
        return float((found != wanted).any(-1).float().mean())
    if stage == MEANS:
        return float((found - wanted).abs().max())
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def measure(stages, repeats, device) -> list[dict]:
    """A row for every stage: its milliseconds, or the reason why there are none, and its distance from torch's."""
    rows = []
    for stage in STAGES:
        row: dict = {"stage": stage}
        try:
            if stage in PAIRS:
                other, bound = PAIRS[stage]
                row["difference"] = difference(stage, stages[stage](), stages[other]())
                if not row["difference"] <= bound:
                    raise ArithmeticError(f"off by {row['difference']:.1e}, wanted at most {bound:.0e}")
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                stages[stage]()
                row["extra_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            row["ms"] = statistics.median(milliseconds(stages[stage], repeats, device))
        except Exception as error:
            row["reason"] = (str(error).splitlines() or [type(error).__name__])[0][:300]
        rows.append(row)
    return rows


def table(report) -> str:
    """The report as Markdown."""
    hardware = report["hardware"]["gpu"] or "CPU, dry run: numbers mean nothing"
    lines = [f"# Stages on {hardware}, {report['date']}", "",
             "| shape | sparsity | kernel | stage | ms | memory beside the operands, MB |", "|---|---|---|---|---|---|"]
    for row in report["rows"]:
        time = f"{row['ms']:.3f}" if "ms" in row else row["reason"]
        memory = f"{row['extra_mb']:.0f}" if "extra_mb" in row else ""
        lines.append(f"| {row['shape']} | {row['sparsity']} | {row['kernel']} | {row['stage']} | {time} | {memory} |")
    return "\n".join(lines) + "\n"


def verdicts(rows) -> dict:
    """For the kernels beside the attention their source hash, and whether all of their results were right."""
    from pack.kernels.spec import fingerprint
    from pack.kernels.tile_ops import MEANS_KERNELS, SELECT_KERNELS
    found = {}
    for spec, stage in ((MEANS_KERNELS[0], MEANS), (SELECT_KERNELS[0], SELECT)):
        mine = [row for row in rows if row["stage"] == stage]
        found[spec.name] = {"files": fingerprint(spec.files), "results": sum("ms" in row for row in mine),
                            "passed": bool(mine) and all("ms" in row for row in mine)}
    return found


def main(arguments=None) -> Path:
    """Measure and write; returns the JSON file."""
    args = parse(arguments)
    device = prepare_to_measure(args)
    report = start(args, device)
    for shape in (shape for shape in SHAPES if shape.name in args.shapes):
        size = TINY._replace(name=shape.name, dim=shape.dim) if args.dry_run else shape
        for sparsity in args.sparsities:
            for kernel in own_kernels(device) if args.dry_run else args.kernels or own_kernels(device):
                place = {"shape": shape.name, "sparsity": sparsity, "kernel": kernel}
                report["rows"] += [place | row for row in measure(
                    make_stages(size, sparsity, kernel, device), args.repeats, device)]
    report["kernels"] = {} if args.dry_run else verdicts(report["rows"])
    return save(report, table(report), args.out, "-stages")


if __name__ == "__main__":
    main()
