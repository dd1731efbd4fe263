"""Sample the tiny model dense and sparse over paired seeds, and judge the finished clips.

    make quality                          the table at one dense step and 20 % of the tiles, 16 seeds, and strips
    make quality ARGS="--all"             every share of the tiles and every dense start
    python quality/table.py --seeds 32 --methods tiles,far --keep 10,20 --dense 0,3

Every sparse clip is compared with the dense clip of the same seed and prompt. A clip keeps its content when it shows
shapes of the same colours, as many pieces of each, as its dense twin. Results are kept in .cache/quality/ per seed and
version of the code, so that an interrupted run goes on.
"""
import argparse
import hashlib
import json
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "dev"))
from load_pack import load_pack  # noqa: E402

load_pack()
from pack.quality import judge, methods, model_file, scenes  # noqa: E402

KEPT = ROOT / ".cache" / "quality"
SEED = 1000                  # of the first clip; training drew its scenes elsewhere


def folder_of(case):
    """Where the clips of a case are kept: a folder per model, and per version of the pack's sources if it uses them."""
    digest = hashlib.sha256(model_file.FILES["dense"].read_bytes() + (ROOT / "quality" / "clips.py").read_bytes())
    for room in ("kernels", "vsa_core", "nodes") if case.method in (*methods.METHODS, *methods.PRESETS) else ():
        for path in sorted((ROOT / room).rglob("*.py")):
            digest.update(path.read_bytes())
    folder = KEPT / digest.hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def begin():
    """Makes this process one that samples."""
    torch.set_num_threads(1)
    from comfy_boot import boot
    boot(None, "--use-pytorch-cross-attention")
    import comfy.utils
    comfy.utils.set_progress_bar_enabled(False)


def clip(seed, case, path):
    """One clip and what its run said, in a file. Sampled unless it is there."""
    if not path.exists():
        from pack.quality import clips
        begun = time.time()
        latent, facts = methods.sample(clips, case, seed)
        part = path.with_suffix(".part")
        torch.save({"latent": latent, "seconds": time.time() - begun, **facts}, part)
        os.replace(part, path)
    return seed, case


def judged(seed, path, dense_path):
    """What became of one clip, against its dense twin and against its prompt."""
    kept, dense = (torch.load(p, weights_only=True) for p in (path, dense_path))
    rgb, reference = scenes.to_rgb(kept["latent"]), scenes.to_rgb(dense["latent"])
    asked = judge.judge(rgb, model_file.scene_of(seed))
    return {"error": judge.relative(kept["latent"], dense["latent"]), **judge.likeness(reference, rgb),
            "content": judge.content(rgb) == judge.content(reference), "count": asked.count_right,
            "kinds": asked.kinds, "flicker": judge.flicker(rgb) / judge.flicker(reference),
            **{key: kept.get(key) for key in ("density", "sparse_steps", "seconds", "work")}}


def row(case, results):
    n, kept = len(results), sum(r["content"] for r in results)
    low, high = judge.interval(kept, n)
    middle = {key: statistics.median(r[key] for r in results) for key in ("error", "psnr", "ssim", "flicker")}
    density = [r["density"] for r in results if r["density"] is not None]
    steps = results[0]["sparse_steps"]
    dense = case.dense if steps is None else methods.STEPS - steps
    work = [r["work"] for r in results if r["work"] is not None]
    return [case.title, str(dense), f"{statistics.mean(density):.1%}" if density else "",
            f"{statistics.mean(work):.1%}" if work else "", f"{middle['error']:.3f}",
            f"{middle['psnr']:.1f}", f"{middle['ssim']:.3f}", f"{kept / n:.0%} ({low:.0%}-{high:.0%})",
            f"{sum(r['count'] for r in results) / n:.0%}", f"{middle['flicker']:.2f}", str(n)]


HEAD = ["method", "dense steps", "pairs computed", "of dense attention", "latent error", "PSNR", "SSIM",
        "content of dense kept", "count as asked", "flicker", "clips"]


def markdown(rows):
    return "\n".join("| " + " | ".join(r) + " |" for r in [HEAD, ["---"] * len(HEAD), *rows])


def _start(case):
    return "" if case.method in methods.PRESETS else f"{case.dense or 'no'} dense steps"


def strips(seeds, cases, paths, path):
    """A picture: for every seed the dense clip, and below it each case's; every second frame."""
    from PIL import Image, ImageDraw
    rows = []
    for seed in seeds:
        for case in cases:
            latent = torch.load(paths[seed, case], weights_only=True)["latent"]
            images = judge.as_images(scenes.to_rgb(latent), 3)[::2]
            image = Image.fromarray((torch.cat(list(images), 1) * 255).byte().numpy())
            framed = Image.new("RGB", (image.width + 190, image.height + 4), "white")
            framed.paste(image, (190, 2))
            ImageDraw.Draw(framed).text((4, 8), f"seed {seed}\n{case.title}\n{_start(case)}", "black")
            rows.append(framed)
    whole = Image.new("RGB", (rows[0].width, sum(r.height for r in rows)), "white")
    for place, image in enumerate(rows):
        whole.paste(image, (0, sum(r.height for r in rows[:place])))
    whole.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--methods", default=",".join(methods.METHODS))
    parser.add_argument("--keep", default="20", help="tiles kept, in percent")
    parser.add_argument("--dense", default="1", help="dense steps at the start, of 16")
    parser.add_argument("--presets", action="store_true", help="the presets of the VSA node, and nothing else")
    parser.add_argument("--all", action="store_true", help="10, 20 and 30 %%, 0, 1 and 3 dense steps")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=KEPT / "quality.md")
    args = parser.parse_args()
    keep, dense = ("10,20,30", "0,1,3") if args.all else (args.keep, args.dense)
    cases = methods.cases(args.methods.split(","), *([int(n) for n in some.split(",")] for some in (keep, dense)))
    if args.presets:
        cases = [methods.Case(name) for name in methods.PRESETS]
    seeds = range(SEED, SEED + args.seeds)
    everything = methods.DENSE, *methods.FLOOR, *cases
    folders = {case: folder_of(case) for case in everything}
    paths = {(seed, case): folders[case] / f"{seed}_{case.slug}.pt" for seed in seeds for case in everything}
    begun = time.time()
    with ProcessPoolExecutor(args.jobs, initializer=begin) as pool:
        waiting = [pool.submit(clip, seed, case, path) for (seed, case), path in paths.items()]
        for done, future in enumerate(as_completed(waiting), 1):
            future.result()
            print(f"\rclip {done} of {len(paths)}, {time.time() - begun:.0f} s\x1b[K", end="", flush=True)
    print()
    rows = [row(case, [judged(seed, paths[seed, case], paths[seed, methods.DENSE]) for seed in seeds])
            for case in (*methods.FLOOR, *cases)]
    told = {"model": model_file.FILES["dense"].name, "sampling": model_file.SAMPLING, "seeds": [SEED, args.seeds],
            "torch": torch.__version__}
    command = " ".join(["python quality/table.py", *sys.argv[1:]])
    args.out.write_text(f"`{command}`\n\n{json.dumps(told)}\n\n{markdown(rows)}\n")
    print(markdown(rows))
    picture = args.out.with_suffix(".png")
    strips(seeds[:3], (methods.DENSE, *cases), paths, picture)
    print(f"\ntable: {args.out}\nstrips: {picture}")


if __name__ == "__main__":
    main()
