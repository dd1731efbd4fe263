"""Whether what Calibrate Sparse Attention finds on one clip holds on others: other prompts, another size, more frames.

    python quality/transfer.py [--steps 8] [--out FILE]

Every clip of the tiny model is sampled densely once and measured as the node does. Budgets are chosen on the first one
alone; the others' own measurements then tell what these budgets would have computed, kept and moved there. Measurements
are kept in .cache/quality, so that an interrupted run goes on.
"""
import argparse
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "dev"))
from load_pack import load_pack  # noqa: E402

load_pack()
from pack.quality import methods, model_file, scenes  # noqa: E402
from pack.quality.table import KEPT, begin  # noqa: E402

SHARES = "0.03125 0.0625 0.125 0.1875 0.25 0.375 0.5 0.75"
SIZES = {"as trained": (8, 32, 32), "wider": (8, 32, 48), "longer": (12, 32, 32)}
"""Latents, of which 2 x 2 pixels are a token."""
CLIPS = (("as trained", methods.CALIBRATED_ON), *(("as trained", seed) for seed in range(1000, 1004)),
         ("wider", 1000), ("wider", 1001), ("longer", 1000), ("longer", 1001))
GOALS = (("work", 0.2), ("work", 0.3), ("error", 0.1), ("error", 0.3), ("attention", 0.9), ("attention", 0.95))


def measured(size, seed, steps):
    """The measurement of one clip, made now or earlier."""
    import folder_paths

    from pack.nodes.strategies.budget_measurement import BudgetSearch
    from pack.nodes.strategies.dense_sampling import Sampling, measure
    from pack.nodes.strategies.strategy_files import register_folders
    from pack.quality import clips
    told = model_file.sampling_of(model_file.FILES["dense"])
    words = scenes.words(model_file.scene_of(seed))[None]
    folder_paths.set_output_directory(str(KEPT))
    register_folders()
    sampling = Sampling([[words, {}]], [[torch.zeros_like(words), {}]],
                        {"samples": torch.zeros(1, 16, *SIZES[size])}, seed, told["steps"], told["cfg"],
                        told["sampler"], told["scheduler"])
    with torch.inference_mode():
        found, _ = measure(clips.load("dense"), sampling, steps, ("transfer", SHARES), "reference",
                           lambda layers, heads, unfinished: BudgetSearch(
                               SHARES, (4, 4, 4), steps, layers, heads, unfinished, lambda text: None, far_field=True))
    return found.table


def chosen(table, goal, bound):
    """The places in `table.shares` that the node would choose. int64 [steps, layers, heads]"""
    from pack.vsa_core.choosing import choose_under_density, choose_under_error
    if goal == "work":
        return choose_under_density(table.emphasised(4), table.densities, bound)
    errors, bound = (table.relative(), bound) if goal == "error" else (table.unkept(), 1 - bound + 1e-9)
    return choose_under_error(errors, table.densities, bound)


def become(table, choice, goal, bound):
    """What a choice is on a clip: share of the work, mean error and loss of the heads, and of those that the goal
    bounds the share that meets it to a tenth."""
    from pack.vsa_core.budget_search import budget_result
    result = budget_result(table, choice)
    held = ""
    if goal != "work":
        values, allowed = (table.relative(), bound) if goal == "error" else (table.unkept(), 1 - bound)
        taken = values.gather(-1, choice[..., None])
        held = f"{(taken <= 1.1 * allowed).double().mean():.1%}"
    return result.density, result.error, 1 - result.kept, held


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8, help="measured steps, of 16")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=KEPT / "transfer.md")
    args = parser.parse_args()
    KEPT.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    with ProcessPoolExecutor(args.jobs, initializer=begin) as pool:
        tables = []
        for done, table in enumerate(pool.map(measured, *zip(*CLIPS, strict=True), [args.steps] * len(CLIPS)), 1):
            tables.append(table)
            print(f"\rclip {done} of {len(CLIPS)}, {time.time() - begun:.0f} s\x1b[K", end="", flush=True)
    print()
    lines = ["| goal | clip | work | mean error of a head | loss of attention | heads that meet the goal to a tenth |",
             "| --- | --- | --- | --- | --- | --- |"]
    for goal, bound in GOALS:
        choice = chosen(tables[0], goal, bound)
        assert all(table.shares == tables[0].shares for table in tables)
        for size in SIZES:
            for own in (True, False):
                rows = [become(table, choice, goal, bound) for place, ((where, _), table) in enumerate(
                    zip(CLIPS, tables, strict=True)) if where == size and (place == 0) == own]
                if rows:
                    means = [statistics.mean(row[column] for row in rows) for column in range(3)]
                    held = " ".join(row[3] for row in rows)
                    name = "the calibrated one" if own else f"{size}, {len(rows)} other prompts"
                    lines.append(f"| {goal} {bound:g} | {name} | {means[0]:.1%} | {means[1]:.3f} | {means[2]:.2%} | "
                                 f"{held} |")
    text = "\n".join(lines)
    args.out.write_text(f"`{' '.join(['python quality/transfer.py', *sys.argv[1:]])}`, torch {torch.__version__}\n\n"
                        f"{text}\n")
    print(text)


if __name__ == "__main__":
    main()
