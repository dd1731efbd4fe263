"""The nodes in a real ComfyUI: a model of Wan's size with random weights is sampled dense and with every method.

    python benchmarks/comfyui_sampling.py [--comfyui PATH] [--models NAME ...] [--cases NAME ...] [--steps 8]
    python benchmarks/comfyui_sampling.py --dry-run --out FOLDER     the same steps on a CPU with a tiny model

Needs ComfyUI's own requirements in this Python. Writes DATE-GPU-sampling.json and a Markdown table beside it: the
median step, dense and sparse, its spread and memory, and what stands on the node afterwards. The first sampling of a
case proves and compiles and is not counted. Random weights tell nothing of quality, nor of how peaked attention is.
"""
from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "dev")]

from gpu import NO_TIME, ROOT, prepare_to_measure, save, start  # noqa: E402


class Model(NamedTuple):
    """A Wan 2.1 model and its clip."""

    name: str
    heads: int
    ffn: int
    layers: int
    """Less than a real one has where it would not fit the time: a step grows with it, its parts' shares do not."""
    latent: tuple[int, int, int]
    """Frames, height and width in latent cells; tokens are half as many along height and width."""
    text: int = 4096


MODELS = (Model("Wan 1.3B 480p 81 frames", 12, 8960, 30, (21, 60, 104)),
          Model("Wan 14B 720p 81 frames, 10 of 40 layers", 40, 13824, 10, (21, 90, 160)))
TINY = Model("tiny", 2, 64, 2, (5, 16, 24))
VSA, STA = "VideoSparseAttentionPatch", "SlidingTileAttentionPatch"
MOBA = "VideoMixtureOfBlockAttentionPatch"
CASES: dict[str, tuple[str, dict] | None] = {
    "dense": None,
    "VSA 0.8": (VSA, {"sparsity": 0.8}),
    "VSA 0.9": (VSA, {"sparsity": 0.9}),
    "VSA 0.9, triton": (VSA, {"sparsity": 0.9, "backend": "triton"}),
    "VSA 0.9, int8 scores": (VSA, {"sparsity": 0.9, "precision": "int8 scores"}),
    "VSA 0.9, far field": (VSA, {"sparsity": 0.9, "far_field": "on"}),
    "VSA 0.8, attention mass 0.9": (VSA, {"sparsity": 0.8, "attention_mass": 0.9}),
    "STA, default window": (STA, {}),
    "STA, far field": (STA, {"far_field": "on"}),
    "VMoBA pooled": (MOBA, {"form": "pooled"}),
    "VMoBA exact": (MOBA, {}),
}
"""Name -> node and widgets; start_percent is 0, so that every step is sparse."""


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [model.name for model in MODELS]
    parser.add_argument("--comfyui", help="checkout (default: as comfy_boot.locate finds it)")
    parser.add_argument("--models", nargs="+", choices=names, default=names[:1], metavar="NAME", help=", ".join(names))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME",
                        help=", ".join(CASES))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=300, help="start no case after this long")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--dry-run", action="store_true")
    return parser.parse_args(arguments)


def make_model(size: Model, device):
    """A ModelPatcher as ComfyUI's loader makes it, of random bfloat16 weights (float32 on a CPU)."""
    import comfy.ldm.wan.model as wan
    import comfy.ops
    import comfy.sd
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    net = wan.WanModel(dim=128 * size.heads, ffn_dim=size.ffn, num_heads=size.heads, num_layers=size.layers,
                       text_dim=size.text, in_dim=16, out_dim=16, device="meta", dtype=dtype,
                       operations=comfy.ops.disable_weight_init)
    generator, weights = torch.Generator(device).manual_seed(0), {}
    for name, blank in net.state_dict().items():
        std = 0.02 if blank.ndim == 1 else blank[0].numel() ** -0.5 if name.endswith("weight") else 0.5
        drawn = torch.randn(blank.shape, generator=generator, device=device, dtype=dtype) * std
        weights[name] = (1 + drawn if blank.ndim == 1 and "norm" in name and name.endswith("weight") else drawn).cpu()
    found = comfy.sd.load_diffusion_model_state_dict(weights, metadata=None)
    if found is None:
        raise RuntimeError("ComfyUI does not know this model")
    return found


def patched(model, case):
    """The model as the node of the case returns it, or as it is."""
    import importlib
    if case is None:
        return model
    places = {VSA: "video_sparse_attention", STA: "sliding_tile_attention", MOBA: "video_mixture_of_block_attention"}
    node, widgets = case
    module = importlib.import_module(f"pack.nodes.methods.{places[node]}")
    return getattr(module, node).execute(model, **{"start_percent": 0.0, "min_tokens": 0, **widgets})[0]


def step_times(model, size: Model, steps: int, device) -> list[float]:
    """Seconds of every step of one sampling at cfg 1."""
    from sampling import sample
    marks: list[float] = []

    def mark(*_):
        if device.type == "cuda":
            torch.cuda.synchronize()
        marks.append(time.perf_counter())
    sample(model, "wan", size.latent, steps=steps + 1, cfg=1.0, callback=mark)
    return [after - before for before, after in itertools.pairwise(marks)]


def measure(make: Callable, size: Model, steps: int, device) -> dict:
    """The numbers of one case and what the node says, or {"reason": why there are none}."""
    from pack.nodes.hook.hook import SparseAttentionHook
    from pack.nodes.hook.status import status_text
    try:
        begin = time.perf_counter()
        model = make()
        step_times(model, size, 2, device)
        first = time.perf_counter() - begin
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = step_times(model, size, steps, device)
        row = {"seconds": statistics.median(times), "lowest": min(times), "highest": max(times), "steps": len(times),
               "until_warm": first}
        if device.type == "cuda":
            row["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
        hooks = SparseAttentionHook.of(model)
        if hooks:
            row["node"] = status_text(hooks[-1].last_run, verbose=False)
            row["summary"] = [{key: value for key, value in entry.items() if isinstance(value, (int, float, str))}
                              for entry in hooks[-1].last_run.summary()]
        return row
    except Exception as error:
        return {"reason": (str(error).splitlines() or [type(error).__name__])[0][:300]}


def table(report) -> str:
    """The report as Markdown."""
    hardware = report["hardware"]["gpu"] or "CPU, dry run: numbers mean nothing"
    lines = [f"# Sampling on {hardware}, {report['date']}", "",
             ", ".join(f"{name} {version or 'absent'}" for name, version in report["versions"].items()), "",
             "| model | case | seconds per step (lowest to highest) | over dense | peak MB | warm after, s |",
             "|---|---|---|---|---|---|"]
    for row in report["rows"]:
        head = f"| {row['model']} | {row['case']} |"
        if "seconds" not in row:
            lines.append(f"{head} {row['reason']} | | | |")
            continue
        ratio = f"{row['speedup']:.2f}" if row.get("speedup") else ""
        lines.append(f"{head} {row['seconds']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f}) | {ratio} | "
                     f"{row.get('peak_mb', 0):.0f} | {row['until_warm']:.1f} |")
    for row in report["rows"]:
        if "node" in row:
            lines += ["", f"{row['model']}, {row['case']}, as the node tells it:", "", row["node"]]
    return "\n".join(lines) + "\n"


def main(arguments=None) -> Path:
    """Measure and write; returns the JSON file."""
    args = parse(arguments)
    device, deadline = prepare_to_measure(args), time.monotonic() + args.seconds
    from comfy_boot import boot, version
    comfyui = boot(args.comfyui, cpu=args.dry_run)
    report = start(args, device)
    report["versions"]["comfyui"] = version(comfyui)
    for size in MODELS:
        if size.name not in args.models:
            continue
        used = TINY._replace(name=size.name) if args.dry_run else size
        model = make_model(used, device)
        for name in args.cases:
            row = {"reason": NO_TIME}
            if time.monotonic() <= deadline:
                row = measure(lambda case=CASES[name], model=model: patched(model, case), used, args.steps, device)
            report["rows"].append({"model": size.name, "case": name} | row)
            print({key: value for key, value in report["rows"][-1].items() if key not in ("node", "summary")},
                  flush=True)
        del model
    dense = {row["model"]: row.get("seconds") for row in report["rows"] if row["case"] == "dense"}
    for row in report["rows"]:
        if "seconds" in row and dense.get(row["model"]):
            row["speedup"] = dense[row["model"]] / row["seconds"]
    return save(report, table(report), args.out, "-sampling")


if __name__ == "__main__":
    main()
