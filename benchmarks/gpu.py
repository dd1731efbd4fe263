"""The sparse kernels on a GPU against dense attention and other block-sparse kernels, all in this run.

    python benchmarks/gpu.py [--shapes NAME ...] [--sparsities 0.8 0.9] [--seconds 480] [--out benchmarks/results]
    python benchmarks/gpu.py --dry-run --out FOLDER      the same steps on a CPU with a tiny problem

Writes DATE-GPU.json and a Markdown table beside it. A kernel or peer that cannot run has its reason in place of
numbers; what the time did not suffice for says so. TFLOPS count valid queries and selected valid keys only.
"""
from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import platform
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "dev")]

from block_problem import LISTS, SHAPES, TINY, make_problem, sampled_error  # noqa: E402
from peers import PEERS, absent  # noqa: E402

from load_pack import load_pack  # noqa: E402

DENSE = "dense SDPA, cuDNN"
NO_TIME = "not measured: no time left"
TOLERANCE, INT8_TOLERANCE = 4e-3, 3e-2
"""Relative L2 of a bfloat16 result against float64: above it the kernel has failed, whatever its speed."""


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--shapes", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.8, 0.9])
    parser.add_argument("--lists", nargs="+", choices=LISTS, default=list(LISTS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=480, help="start no measurement after this long")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args(arguments)


def milliseconds(function, repeats: int, device) -> list[float]:
    """One time per run, after two that are not counted."""
    for _ in range(2):
        function()
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            times.append((time.perf_counter() - start) * 1e3)
        return times
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def contestants(problem):
    """(name, dense, whether it takes the given lists, prepare) of the pack's kernels, then of the peers."""
    from pack.kernels import KERNELS, Call, block_sparse_attention, explain_kernels
    reasons = explain_kernels(Call.of(problem.q))
    for spec in KERNELS:
        if not spec.files and problem.q.is_cuda:
            continue

        def prepare(problem, name=spec.name):
            if reasons[name]:
                raise RuntimeError(reasons[name])
            return lambda: block_sparse_attention(*problem.operands(), backend=name)
        yield spec.name, False, True, prepare
    for peer in PEERS:
        def prepare_peer(problem, peer=peer):
            if reason := absent(peer):
                raise RuntimeError(reason)
            return peer.prepare(problem)
        yield peer.name, peer.dense, not peer.own_selection, prepare_peer


def measure(problem, dense, comparable, prepare, repeats) -> dict:
    """The numbers of one contestant, or {"reason": why there are none}."""
    try:
        function = prepare(problem)
        result = function()
        result = getattr(function, "in_tiles", lambda x: x)(result)
        row = {"relative_l2": sampled_error(result, problem, dense) if comparable else None}
        del result
        times = milliseconds(function, repeats, problem.q.device)
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return {"reason": lines[0][:300]}
    median = statistics.median(times)
    valid = float(problem.sizes.sum())
    flop = 4 * problem.shape.dim * problem.shape.heads * valid * valid if dense else problem.useful_flop()
    return row | {"ms": median, "ms_lowest": min(times), "ms_highest": max(times), "tflops": flop / median / 1e9}


def measure_pass(peers: bool, problems, args, device, deadline, rows: dict) -> None:
    """A row per problem and contestant, either of the pack's kernels and dense attention or of the other peers."""
    dense_rows: dict = {}
    for place in problems:
        shape, sparsity, lists = place
        problem = make_problem(size_of(shape, args), sparsity, lists, device)
        for number, (name, dense, comparable, prepare) in enumerate(contestants(problem)):
            if peers != (not dense and name in {peer.name for peer in PEERS}):
                continue
            row = {"reason": NO_TIME}
            if time.monotonic() <= deadline:
                row = dense_rows.get((shape, name)) or measure(problem, dense, comparable, prepare, args.repeats)
            if dense:
                dense_rows[shape, name] = row
            rows[(*place, number)] = {"shape": shape.name, "sparsity": sparsity, "lists": lists, "name": name} | row
            print(rows[(*place, number)], flush=True)


def size_of(shape, args):
    return TINY._replace(name=shape.name, dim=shape.dim) if args.dry_run else shape


def whole_op(shape, sparsity, kernel, device, repeats) -> dict:
    """Milliseconds of the attention call that the node makes, with the automatic tile: means, scores, top-k, lists,
    attention, everything, from sequence order to sequence order. Its stages: benchmarks/stages.py."""
    place = {"shape": shape.name, "sparsity": sparsity, "kernel": kernel}
    try:
        from pack.vsa_core.backends.video_sparse_attn import (
            VideoSparseAttentionImpl,
            VideoSparseAttentionMetadataBuilder,
        )
        from pack.vsa_core.tiling import auto_tile_size
        tokens = shape.grid[0] * shape.grid[1] * shape.grid[2]
        q, k, v = torch.randn(3, 1, tokens, shape.heads, shape.dim, device=device, dtype=torch.bfloat16)
        tile = auto_tile_size(shape.grid)
        impl = VideoSparseAttentionImpl(shape.heads, shape.dim, backend=kernel)
        plan = VideoSparseAttentionMetadataBuilder().build(
            0, shape.grid, (1, 1, 1), sparsity, device, tile_size=tile, cache_tile_buf=False)
        times = milliseconds(lambda: impl.attend(q, k, v, plan), repeats, device)
        return place | {"tile": list(tile), "ms": statistics.median(times), "ms_lowest": min(times),
                        "ms_highest": max(times)}
    except Exception as error:
        return place | {"reason": (str(error).splitlines() or [type(error).__name__])[0][:300]}


def own_kernels(device) -> list[str]:
    """The pack's kernels that are compiled for a GPU; on a CPU the reference stands in for them."""
    from pack.kernels import KERNELS
    return [spec.name for spec in KERNELS if spec.files] if device.type == "cuda" else ["reference"]


def facts(device) -> dict:
    """Hardware and versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    for name in ("triton", "fastvideo-kernel", "flashinfer-python", "comfy-kitchen", "sageattention"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    if device.type != "cuda":
        return {"hardware": {"gpu": None, "capability": None}, "versions": versions}
    card = torch.cuda.get_device_properties(device)
    versions["cudnn"] = torch.backends.cudnn.version()
    return {"hardware": {"gpu": card.name, "capability": [card.major, card.minor],
                         "multiprocessors": card.multi_processor_count}, "versions": versions}


def verdicts(rows) -> dict:
    """For every kernel that is compiled for a GPU the hash of its files, and whether all of its results were right."""
    from pack.kernels import KERNELS
    from pack.kernels.spec import fingerprint
    found = {}
    for spec in KERNELS:
        if spec.files:
            errors = [row["relative_l2"] for row in rows if row["name"] == spec.name and "ms" in row]
            allowed = TOLERANCE if spec.exact else INT8_TOLERANCE
            found[spec.name] = {"files": fingerprint(spec.files), "results": len(errors),
                                "passed": bool(errors) and max(errors) <= allowed}
    return found


def table(report) -> str:
    """The report as Markdown."""
    hardware = report["hardware"]["gpu"] or "CPU, dry run: numbers mean nothing"
    lines = [f"# {hardware}, {report['date']}", "",
             ", ".join(f"{name} {version or 'absent'}" for name, version in report["versions"].items()), "",
             "| shape | sparsity | lists | kernel | ms (lowest to highest) | TFLOPS | over dense cuDNN | relative L2 |",
             "|---|---|---|---|---|---|---|---|"]
    for row in report["rows"]:
        head = f"| {row['shape']} | {row['sparsity']} | {row['lists']} | {row['name']} |"
        if "ms" not in row:
            lines.append(f"{head} {row['reason']} | | | |")
            continue
        ratio = "" if row["speedup"] is None else f"{row['speedup']:.2f}"
        error = "own selection" if row["relative_l2"] is None else f"{row['relative_l2']:.1e}"
        lines.append(f"{head} {row['ms']:.3f} ({row['ms_lowest']:.3f} to {row['ms_highest']:.3f}) | "
                     f"{row['tflops']:.1f} | {ratio} | {error} |")
    lines += ["", "| shape | sparsity | kernel | tile | whole op, ms (lowest to highest) | over dense cuDNN |",
              "|---|---|---|---|---|---|"]
    for row in report["whole_op"]:
        head = f"| {row['shape']} | {row['sparsity']} | {row['kernel']} |"
        if "ms" not in row:
            lines.append(f"{head} | {row['reason']} | |")
            continue
        ratio = "" if row["speedup"] is None else f"{row['speedup']:.2f}"
        lines.append(f"{head} {'x'.join(map(str, row['tile']))} | {row['ms']:.3f} ({row['ms_lowest']:.3f} to "
                     f"{row['ms_highest']:.3f}) | {ratio} |")
    return "\n".join(lines) + "\n"


def save(report, text: str, folder: Path, suffix: str = "") -> Path:
    """Write DATE-GPU{suffix}.json and, with the text, .md beside it; returns the JSON file."""
    name = (report["hardware"]["gpu"] or "dry-run").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{report['date']}-{name}{suffix}.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    title, _, rest = text.partition("\n")
    text = f"{title}\n\n`{report['command']}`\n{rest}"
    target.with_suffix(".md").write_text(text)
    print(text)
    return target


def start(args, device, **more) -> dict:
    """A report with nothing measured yet."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    report = {"date": datetime.date.today().isoformat(), "command": command, **facts(device), **more, "rows": []}
    return report | ({"dry_run": True} if args.dry_run else {})


def prepare_to_measure(args) -> torch.device:
    """Load the pack and name the device to measure on. Exits without a GPU, unless nothing is measured."""
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("no CUDA device: use --dry-run to go through the steps on a CPU")
    load_pack()
    return torch.device("cpu" if args.dry_run else "cuda")


def main(arguments=None) -> Path:
    """Measure and write; returns the JSON file."""
    args = parse(arguments)
    device, deadline = prepare_to_measure(args), time.monotonic() + args.seconds
    report = start(args, device, whole_op=[])
    shapes = [shape for shape in SHAPES if shape.name in args.shapes]
    problems, rows = list(itertools.product(shapes, args.sparsities, args.lists)), {}
    measure_pass(False, problems, args, device, deadline, rows)
    for shape, sparsity, kernel in itertools.product(shapes, args.sparsities, own_kernels(device)):
        row = {"shape": shape.name, "sparsity": sparsity, "kernel": kernel, "reason": NO_TIME}
        if time.monotonic() <= deadline:
            row = whole_op(size_of(shape, args), sparsity, kernel, device, args.repeats)
        report["whole_op"].append(row)
    # Peers come last: should the time not suffice, what the pack is judged by is there.
    measure_pass(True, problems, args, device, deadline, rows)
    report["rows"] = [rows[key] for key in sorted(rows, key=lambda key: (problems.index(key[:3]), key[3]))]
    dense = {row["shape"]: row.get("ms") for row in report["rows"] if row["name"] == DENSE}
    for row in report["rows"] + report["whole_op"]:
        if "ms" in row:
            row["speedup"] = dense[row["shape"]] / row["ms"] if dense[row["shape"]] else None
    report["kernels"] = verdicts(report["rows"])
    return save(report, table(report), args.out)


if __name__ == "__main__":
    main()
