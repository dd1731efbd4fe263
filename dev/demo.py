"""Run the shipped graph in a real ComfyUI server, dense and at several sparsities, and compare the clips.

    make demo          or, in an environment made by `make setup`:   python dev/demo.py

The model is a tiny Wan that this project trained on moving coloured shapes, and everything runs on the CPU: this shows
that the nodes work and what they do to a clip, not how fast they are. Same seed everywhere.
"""
import argparse
import io
import json
import sys
import textwrap
import time
from pathlib import Path

from comfy_boot import PACK, find, version
from comfy_server import Server, ServerError, stop_on_signals

GRAPH = PACK / "workflows" / "api" / "wan_t2v_vsa.json"
OUT = PACK / ".cache" / "demo"
MODELS = PACK / "quality" / "models"
PATCH, REPORT, SAMPLER, SAVE = "VideoSparseAttentionPatch", "SparseAttentionReport", "KSampler", "SaveLatent"
FRAMES = "SaveImage"
KERNEL = "reference"   # by name: auto would leave a clip this small to dense attention, which is faster on it
MEANING = (
    "What the numbers say: at sparsity 0 every tile is kept, so the clip is the dense one but for rounding. Above it "
    "tiles are left out, each of them counting as one averaged token, and the clip moves away from the dense one: the "
    "pictures show how far. A model of 4 million weights is no measure of a real one, and seconds on a CPU say nothing "
    "about a GPU.")
SAME = 1e-4   # sparsity 0 keeps every tile: only the order of summation differs from dense


def shown(path):
    path = Path(path)
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def node(graph, class_type):
    """The id of the one node of that class."""
    ids = [key for key, value in graph.items() if value["class_type"] == class_type]
    if len(ids) != 1:
        raise SystemExit(f"{shown(GRAPH)}: wanted one {class_type} node, found {len(ids)}")
    return ids[0]


def bypass(graph, class_type, through):
    """The graph without that node: what read its first output reads what was plugged into `through`."""
    gone = node(graph, class_type)
    source = graph[gone]["inputs"][through]
    return {key: {**value, "inputs": {name: source if link == [gone, 0] else link
                                      for name, link in value["inputs"].items()}}
            for key, value in graph.items() if key != gone}


def variants(graph, sparsities):
    """(name, graph) for the dense run and for every sparsity."""
    yield "dense", bypass(bypass(graph, REPORT, "latent"), PATCH, "model")
    patch = node(graph, PATCH)
    for sparsity in sparsities:
        inputs = {**graph[patch]["inputs"], "sparsity": sparsity, "backend": KERNEL}
        yield f"sparsity {sparsity:g}", {**graph, patch: {**graph[patch], "inputs": inputs}}


class Progress:
    """One line per run, rewritten in place on a terminal; remembers when the sampler started and ended."""

    def __init__(self, name, sampler):
        self.name, self.sampler, self.start, self.end = name, sampler, None, None

    def __call__(self, node, value, maximum):
        if node == self.sampler and self.start is None:
            self.start = time.time()
        elif node != self.sampler and self.start and self.end is None:
            self.end = time.time()
        if value is not None and sys.stdout.isatty():
            print(f"\r{self.name}: step {value} of {maximum}\x1b[K", end="", flush=True)

    def done(self):
        self.end = self.end or time.time()
        seconds = self.end - self.start
        print(f"{chr(13) if sys.stdout.isatty() else ''}{self.name}: sampled in {seconds:.1f} s", flush=True)
        return seconds


def run(server, name, graph):
    """(latent, PNG per frame, seconds, what the report node recorded or None, PNG of the tile map or None)"""
    import safetensors.torch
    progress = Progress(name, node(graph, SAMPLER))
    outputs = server.run(graph, progress)["outputs"]
    seconds = progress.done()
    latent = safetensors.torch.load(server.view(outputs[node(graph, SAVE)]["latents"][0]))["latent_tensor"]
    clip = [server.view(image) for image in outputs[node(graph, FRAMES)]["images"]]
    if name == "dense":
        return latent, clip, seconds, None, None
    report = outputs.get(node(graph, REPORT), {})
    if not report.get("sparse_attention"):
        raise server.error(f"{name}: {REPORT} recorded nothing, its output was {json.dumps(report)[:500]}")
    picture = server.view(report["images"][0]) if report.get("images") else None
    return latent, clip, seconds, report["sparse_attention"][0], picture


def row(name, seconds, record, difference, likeness):
    if record is None:
        return [name, "", "", "", "", "", "", "", "", "", f"{seconds:.1f}"]
    return [name, "x".join(map(str, record["grid"])), "x".join(map(str, record["tile"])),
            f"{record['kept']} of {record['tiles']}", f"{record['density']:.1%}", record["backend"],
            f"{record['sparse_calls']} / {sum(record['dense_calls'].values())}", f"{difference:.2e}",
            f"{likeness['psnr']:.1f} dB", f"{likeness['ssim']:.3f}", f"{seconds:.1f}"]


def table(rows):
    head = ["run", "token grid", "tile", "tiles kept", "density", "kernel", "sparse/dense calls",
            "latent differs", "PSNR", "SSIM", "seconds"]
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    for r in [head, ["-" * w for w in widths], *rows]:
        print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w)
                        for i, (cell, w) in enumerate(zip(r, widths, strict=True))).rstrip())


def verdict(results):
    """What is wrong with the results, as sentences; empty when all is well."""
    wrong = []
    for name, (difference, record) in results.items():
        if name == "sparsity 0":
            if not difference <= SAME:
                wrong.append(f"{name}: keeps every tile, so wanted the dense result within {SAME:g}, "
                             f"found {difference:.2e}")
        elif record["sparse_calls"] == 0:
            wrong.append(f"{name}: no attention call ran sparse; dense because: {record['dense_calls']}")
        elif not 0 < difference < float("inf"):
            wrong.append(f"{name}: wanted a finite result that differs from the dense one, found {difference}")
    return wrong


def likeness(dense, clip):
    """{"psnr", "ssim"} of two clips of PNG frames."""
    import numpy as np
    import torch

    from load_pack import load_pack
    load_pack()
    from pack.quality import judge
    both = (torch.from_numpy(np.stack([np.asarray(opened(png)) for png in frames])) for frames in (dense, clip))
    return judge.likeness(*(frames.permute(3, 0, 1, 2) / 127.5 - 1 for frames in both))


def opened(png):
    from PIL import Image
    return Image.open(io.BytesIO(png)).convert("RGB")


def pictures(clips):
    """Writes the clips below each other, a frame beside the next, and as a film; returns both paths."""
    from PIL import Image, ImageDraw
    frames = {name: [opened(png) for png in clip] for name, clip in clips.items()}
    length, (width, height) = len(clips["dense"]), frames["dense"][0].size
    strip = Image.new("RGB", (110 + length * (width + 2), len(frames) * (height + 2)), "white")
    film = [Image.new("RGB", (len(frames) * (width + 4), height + 16), "white") for _ in range(length)]
    for place, (name, clip) in enumerate(frames.items()):
        ImageDraw.Draw(strip).text((6, place * (height + 2) + height // 2), name, "black")
        for t, frame in enumerate(clip):
            strip.paste(frame, (110 + t * (width + 2), place * (height + 2)))
            film[t].paste(frame, (place * (width + 4), 16))
            ImageDraw.Draw(film[t]).text((place * (width + 4) + 4, 2), name, "black")
    paths = OUT / "demo_clips.png", OUT / "demo_clips.webp"
    strip.save(paths[0])
    film[0].save(paths[1], save_all=True, append_images=film[1:], duration=250, loop=0, lossless=True)
    return paths


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui", help="checkout (default: as comfy_boot.locate finds it)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.0, 0.5, 0.8], metavar="X")
    parser.add_argument("--steps", type=int, help="of the sampler (default: as in the graph)")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for everything (default %(default)s)")
    args = parser.parse_args()
    stop_on_signals()
    comfyui = find(args.comfyui)
    OUT.mkdir(parents=True, exist_ok=True)
    graph, rows, results, tiles, clips = json.loads(GRAPH.read_text()), [], {}, None, {}
    graph[node(graph, SAMPLER)]["inputs"]["steps"] = args.steps or graph[node(graph, SAMPLER)]["inputs"]["steps"]
    try:
        print(f"starting ComfyUI {version(comfyui)}", flush=True)
        with Server(comfyui, models=MODELS, timeout=args.timeout, log=OUT / "server.log",
                    flags=["--use-pytorch-cross-attention"]) as server:
            for name, variant in variants(graph, args.sparsity):
                latent, clips[name], seconds, record, picture = run(server, name, variant)
                if record is None:
                    dense = latent.double()
                    rows.append(row(name, seconds, None, None, None))
                    continue
                difference = float((latent.double() - dense).norm() / dense.norm())
                rows.append(row(name, seconds, record, difference, likeness(clips["dense"], clips[name])))
                results[name] = difference, record
                tiles = picture or tiles
    except ServerError as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1
    print()
    table(rows)
    for path in pictures(clips):
        print(f"{'' if path.suffix == '.webp' else chr(10)}clips side by side: {shown(path)}")
    if tiles:
        (OUT / "demo_tiles.png").write_bytes(tiles)
        print(f"tile map of the last run: {shown(OUT / 'demo_tiles.png')}")
    wrong = verdict(results)
    if not wrong:
        print(f"\n{textwrap.fill(MEANING, 110)}")
    for sentence in wrong:
        print(f"demo failed: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nstopped, the server too")
