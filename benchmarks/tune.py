"""Which launch options the Triton attention kernel should have on this GPU: every candidate, timed in turns.

    python benchmarks/tune.py [--shapes NAME ...] [--head-dims 64 128] [--dtypes bf16 fp16] [--out benchmarks/results]
    python benchmarks/tune.py --dry-run --out FOLDER      the same steps on a CPU with a tiny problem

Writes DATE-GPU-tune.json and a Markdown table beside it, with the lines of CONFIGS in kernels/triton/configs.py that
should change: where a candidate beats the present entry on every shape by more than the spread, nowhere else.
A candidate that does not compile, launch or agree with the present entry has its reason in place of a time.
"""
from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from block_problem import BLOCK, TINY, Shape  # noqa: E402
from gpu import ROOT, prepare_to_measure, save, start  # noqa: E402

SHAPES = (Shape("H12 32760", 12, (21, 30, 52), 128), Shape("H24 32640", 24, (16, 34, 60), 128))
"""Each is measured with every head_dim."""
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""How far any query block may be from the present entry's, as relative L2."""
FEWEST_ROUNDS = 5
"""Fewer say nothing about the spread: a problem gets these even when its share of the time is over."""
NO_TIME = "not measured: no time left"


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--head-dims", nargs="+", type=int, choices=(64, 128), default=[64, 128])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=30, help="at most, for every shape, head_dim and dtype")
    parser.add_argument("--seconds", type=float, default=240, help="start no measurement after this long")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: wanted at least 1")
    if not 0 <= args.sparsity < 1:
        parser.error(f"--sparsity {args.sparsity}: wanted at least 0 and below 1")
    return args


def load_kernel(device):
    """`run` of the Triton kernel. On a CPU the reference's, which has no launch options: only the steps are real."""
    if device.type != "cuda":
        from pack.kernels.reference import run
        return lambda *operands, config: run(*operands)
    from pack.kernels import Call
    from pack.kernels.triton import SPEC
    if reason := SPEC.refusal(Call.on(device, torch.bfloat16, 128)):
        raise SystemExit(f"the Triton kernel does not run here: {reason}")
    from pack.kernels.triton.block_sparse import PIPELINES, run
    if not PIPELINES:
        raise SystemExit("this Triton cannot pipeline the kernel's loop: found 3.2, wanted 3.3 or newer")
    return run


def make_operands(shape, sparsity, dtype, device):
    """(tile, what the node gives the kernel for one clip): arguments of `run` up to token_rows, without a gate."""
    from pack.kernels import select_tiles, tile_means
    from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionMetadataBuilder
    from pack.vsa_core.tiling import auto_tile_size

    scale, tile = shape.dim ** -0.5, auto_tile_size(shape.grid)
    generator = torch.Generator(device).manual_seed(7)
    q, k, v = (torch.randn(1, math.prod(shape.grid), shape.heads, shape.dim, generator=generator, device=device,
                           dtype=dtype) for _ in range(3))
    md = VideoSparseAttentionMetadataBuilder().build(
        0, shape.grid, (1, 1, 1), sparsity, device, tile_size=tile, cache_tile_buf=False)
    means = tile_means((q, k), md.token_rows, math.prod(md.num_tiles), md.blocks_per_tile, "reference")
    lists = select_tiles(*means, md.topk, scale, md.blocks_per_tile, md.num_other_blocks, "reference")
    counts = torch.full((1, 1, 1), lists.shape[3], dtype=torch.int32, device=device).expand(lists.shape[:3])
    return tile, (q, k, v, lists, counts, md.kernel_block_sizes, scale, False, md.token_rows)


def distance(found, wanted, token_rows) -> float:
    """The worst relative L2 of any query block and head.   found, wanted: [1, S, H, D], token_rows: [slots]"""
    rows = token_rows.long().view(-1, BLOCK)

    def squares(x):
        return torch.where(rows[..., None] < 0, 0, x.square().sum(-1)[0, rows.clamp(min=0)]).sum(1)

    wanted = wanted.float()
    whole = squares(wanted)
    ratio = torch.where(whole == 0, 0, squares(found.float() - wanted) / whole)
    return float(ratio.max().sqrt())


def compare(launch, present, token_rows, tolerance, deadline) -> dict:
    """For every candidate, the present entry first: how far its result is off, or the reason why it is not timed.

    launch: a candidate -> the result [1, S, H, D].
    """
    from pack.kernels.triton.configs import CANDIDATES
    wanted, rows = None, {}
    for config in dict.fromkeys((present, *CANDIDATES)):
        try:
            if time.monotonic() > deadline:
                raise TimeoutError(NO_TIME)
            found = launch(config)
            wanted = found if config == present else wanted
            if wanted is None:
                raise RuntimeError("the present entry gave nothing to compare with")
            off = distance(found, wanted, token_rows)
            if not off <= tolerance:
                raise ArithmeticError(f"off by {off:.1e}, wanted at most {tolerance:.0e}")
            rows[config] = {"relative_l2": off}
        except Exception as error:
            rows[config] = {"reason": (str(error).strip().splitlines() or [type(error).__name__])[0][:300]}
    return rows


def one_round(launch, configs, device) -> list[float]:
    """Milliseconds of one launch each."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for config in configs:
            launch(config)
            marks.append(time.perf_counter())
        return [(end - start) * 1e3 for start, end in itertools.pairwise(marks)]
    # Not counted: it keeps the GPU busy while the others are queued, else the first would be timed with its launch.
    launch(configs[0])
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in configs]
    for config, (before, after) in zip(configs, events, strict=True):
        before.record()
        launch(config)
        after.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in events]


def measure(run, operands, present, rounds, share_ends, deadline) -> list[dict]:
    """A row for every candidate. They are timed in rounds, one launch each, so that a drifting clock hits all alike."""
    def launch(config):
        return run(*operands, config=config)[0]

    query, *_, token_rows = operands
    rows = compare(launch, present, token_rows, TOLERANCE[query.dtype], deadline)
    able = [config for config, row in rows.items() if "reason" not in row]
    times: list[list[float]] = []
    while able and len(times) < rounds:
        if time.monotonic() > (deadline if len(times) < FEWEST_ROUNDS else share_ends):
            break
        times.append(one_round(launch, able, query.device))
    for place, config in enumerate(able):
        if len(times) < min(rounds, FEWEST_ROUNDS):
            rows[config] = {"reason": NO_TIME}
        else:
            rows[config] |= summary([turn[place] for turn in times])
    return [{"num_warps": config.num_warps, "num_stages": config.num_stages, "present": config == present} | row
            for config, row in rows.items()]


def summary(times) -> dict:
    """Median and spread, which is the distance between the quartiles."""
    quartiles = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    low, median, high = quartiles.tolist()
    return {"ms": median, "spread": high - low, "ms_lowest": min(times), "ms_highest": max(times),
            "rounds": len(times)}


def winner(rows) -> dict | None:
    """The row whose candidate belongs in the table, or None where the present entry stays.

    rows: those of one head_dim and dtype, of every shape. The candidate that is fastest over all shapes wins if it
    beats the present entry on each by more than the larger spread of the two.
    """
    options = {}
    for row in rows:
        options.setdefault((row["num_warps"], row["num_stages"]), []).append(row)
    present = next(mine for mine in options.values() if mine[0]["present"])
    timed = [mine for mine in options.values() if all("ms" in row for row in mine)]
    if present not in timed:
        return None
    best = min(timed, key=lambda mine: math.prod(row["ms"] for row in mine))
    beaten = all(old["ms"] - new["ms"] > max(old["spread"], new["spread"])
                 for old, new in zip(present, best, strict=True))
    return best[0] if beaten else None


def verdicts(rows, capability) -> list[dict]:
    """For every head_dim and dtype the line that should change in CONFIGS, as it stands there, or why none should."""
    found = []
    for (dim, dtype), group in itertools.groupby(rows, lambda row: (row["head_dim"], row["dtype"])):
        mine = list(group)
        best = winner(mine)
        verdict: dict = {"head_dim": dim, "dtype": dtype}
        if capability is None:
            verdict["reason"] = "a CPU has no entry"
        elif any(row["present"] and "ms" not in row for row in mine):
            verdict["reason"] = "the present entry has no time"
        elif best is None:
            verdict["reason"] = "no candidate beats the present entry on every shape by more than the spread"
        else:
            verdict["line"] = (f"    ({tuple(capability)}, {dim}, {dtype.upper()}): "
                               f"Config({best['num_warps']}, {best['num_stages']}),")
        found.append(verdict)
    return found


def table(report) -> str:
    """The report as Markdown."""
    hardware = report["hardware"]["gpu"] or "CPU, dry run: numbers mean nothing"
    lines = [f"# Launch options on {hardware}, {report['date']}", "",
             ", ".join(f"{name} {version or 'absent'}" for name, version in report["versions"].items()), "",
             f"Sparsity {report['sparsity']}. Spread is the distance between the quartiles.", "",
             "| head_dim | dtype | shape | tile | warps | stages | | median ms | spread | lowest to highest | rounds |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for row in report["rows"]:
        mark = "present" if row["present"] else ""
        head = (f"| {row['head_dim']} | {row['dtype']} | {row['shape']} | {'x'.join(map(str, row['tile']))} | "
                f"{row['num_warps']} | {row['num_stages']} | {mark} |")
        if "ms" not in row:
            lines.append(f"{head} {row['reason']} | | | |")
            continue
        lines.append(f"{head} {row['ms']:.3f} | {row['spread']:.3f} | "
                     f"{row['ms_lowest']:.3f} to {row['ms_highest']:.3f} | {row['rounds']} |")
    lines += ["", "CONFIGS in kernels/triton/configs.py:", ""]
    for verdict in report["verdicts"]:
        says = f"`{verdict['line'].strip()}`" if "line" in verdict else f"stays: {verdict['reason']}"
        lines.append(f"- head_dim {verdict['head_dim']}, {verdict['dtype']}: {says}")
    return "\n".join(lines) + "\n"


def main(arguments=None) -> Path:
    """Measure and write; returns the JSON file."""
    args = parse(arguments)
    device, deadline = prepare_to_measure(args), time.monotonic() + args.seconds
    from pack.kernels import Call
    from pack.kernels.spec import fingerprint
    from pack.kernels.triton import SPEC
    from pack.kernels.triton.configs import config_for
    run = load_kernel(device)
    report = start(args, device, files=fingerprint(SPEC.files), sparsity=args.sparsity)
    shapes = [shape for shape in SHAPES if shape.name in args.shapes]
    problems = list(itertools.product(sorted(set(args.head_dims)), dict.fromkeys(args.dtypes), shapes))
    for place, (dim, dtype, shape) in enumerate(problems):
        share_ends = time.monotonic() + (deadline - time.monotonic()) / (len(problems) - place)
        shape = (TINY._replace(name=shape.name) if args.dry_run else shape)._replace(dim=dim)
        tile, operands = make_operands(shape, args.sparsity, DTYPES[dtype], device)
        present = config_for(Call.of(operands[0]).capability, dim, DTYPES[dtype])
        problem = {"shape": shape.name, "heads": shape.heads, "tokens": math.prod(shape.grid), "tile": list(tile),
                   "head_dim": dim, "dtype": dtype}
        report["rows"] += [problem | row for row in measure(
            run, operands, present, args.rounds, share_ends, deadline)]
        print(f"measured {place + 1} of {len(problems)}: {shape.name}, head_dim {dim}, {dtype}", flush=True)
    report["verdicts"] = verdicts(report["rows"], report["hardware"]["capability"])
    return save(report, table(report), args.out, "-tune")


if __name__ == "__main__":
    main()
