"""Train the tiny video models that quality is judged with: Wan 2.1's architecture on clips of known content.

    make train-tiny                     all courses, resumed where they were interrupted, then the files
    python quality/train.py dense       one course
    python quality/train.py --validate  losses on clips that none of them has seen

Deterministic for one version of torch and one number of threads; state is kept in .cache/quality every 100 steps.
"""
import argparse
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "dev"))
from load_pack import load_pack  # noqa: E402

load_pack()
from pack.quality import gated, scenes  # noqa: E402

STATE = Path(__file__).parents[1] / ".cache" / "quality"
MODEL = dict(model_type="t2v", dim=256, ffn_dim=640, num_heads=2, num_layers=4, text_dim=scenes.TEXT_WIDTH, in_dim=16,
             out_dim=16, qk_norm=True, cross_attn_norm=True)
WITHOUT_PROMPT = 0.1         # of the clips, so that cfg works
KEEP_EVERY = 100             # steps
UNSEEN = 0.05                # weight of the 13 latent directions that no preview shows


@dataclass(frozen=True)
class Course:
    """What a model is taught, and from which other one it starts."""
    after: str | None
    rate: float              # the highest; it warms up for 100 steps and falls as a cosine
    shift: float             # of the noise levels: 1 is as much of each, above 1 more of the high ones
    woven: bool              # grounds that are the same in every patch
    stages: tuple            # (steps, clips per step, frames, height, width)
    gated: bool = False      # with the gates of Video Sparse Attention, at its sparsity
    seed: int = 1

    @property
    def steps(self):
        return sum(steps for steps, *_ in self.stages)

    def stage(self, step):
        for steps, *shape in self.stages:
            if step < steps:
                return shape
            step -= steps
        raise ValueError(f"the course has {self.steps} steps")


# Small clips first: they teach shapes, colours and prompts for little. How many shapes a clip holds is learned at
# its full size only, from its high noise levels.
COURSES = {
    "sketch": Course(None, 1.5e-3, 2.0, False, ((2000, 6, 4, 16, 16), (1200, 2, 8, 24, 24), (900, 1, 8, 32, 32))),
    "dense": Course("sketch", 1.2e-3, 3.0, True, ((1800, 1, 8, 32, 32),)),
    "gated": Course("dense", 4e-4, 3.0, True, ((600, 1, 8, 32, 32),), gated=True, seed=2),
}


def build(with_gates=False):
    """The untrained model, as ComfyUI's own class, and its `Gates` or None."""
    import comfy.ldm.wan.model as wan
    wan.apply_rope1 = rotate             # comfy_kitchen's has no gradient on a CPU
    wan.optimized_attention = attention
    model = wan.WanModel(**MODEL, operations=torch.nn, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "modulation" in name:
            p.data = 0.02 * torch.randn(p.shape, generator=generator)
        elif p.dim() > 1:
            p.data = torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5
        else:
            p.data = torch.full_like(p, float("norm" in name and name.endswith("weight")))
    torch.nn.init.zeros_(model.head.head.weight)
    gates = gated.Gates(model) if with_gates else None
    if gates:
        wan.optimized_attention = gates.attention
    return model, gates


def rotate(x, freqs):
    pairs = x.float().reshape(*x.shape[:-1], -1, 1, 2)
    return (freqs[..., 0] * pairs[..., 0] + freqs[..., 1] * pairs[..., 1]).reshape(x.shape).type_as(x)


def attention(q, k, v, heads, mask=None, **_):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def batch(generator, woven, count, frames, height, width):
    """Latents [count, 16, T, H, W] and prompts [count, tokens, width]."""
    drawn = [scenes.draw_scene(generator, frames, height, width, woven=woven) for _ in range(count)]
    prompts = torch.stack([scenes.words(s) for s in drawn])
    prompts[torch.rand(count, generator=generator) < WITHOUT_PROMPT] = 0
    return scenes.to_latent(torch.stack([scenes.render(s) for s in drawn])), prompts


def loss_of(model, clean, prompts, generator, seen, shift):
    """Rectified flow: the error of the predicted velocity, that of the directions which are seen weighing most."""
    noise = torch.randn(clean.shape, generator=generator)
    u = torch.sigmoid(torch.randn(len(clean), generator=generator))
    s = shift * u / (1 + (shift - 1) * u)
    at = s[:, None, None, None, None]
    error = model((1 - at) * clean + at * noise, s * 1000, prompts) - (noise - clean)
    inside = torch.einsum("bdthw,dc->bcthw", error, seen)
    outside = error - torch.einsum("bcthw,dc->bdthw", inside, seen)
    return inside.square().mean(), outside.square().sum() / (inside.numel() / 3 * 13)


def train(name):
    """Runs the course from the kept state on; returns the averaged weights."""
    course = COURSES[name]
    model, gates = build(course.gated)
    seen = torch.linalg.qr(scenes.FACTORS).Q
    generator = torch.Generator().manual_seed(course.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=course.rate, betas=(0.9, 0.98), weight_decay=0.01)
    if course.after:
        model.load_state_dict(finished(course.after), strict=not course.gated)
    average = {k: v.clone() for k, v in model.state_dict().items()}
    step, shown = 0, 2.0
    path = STATE / f"{name}.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        generator.set_state(kept["generator"])
        average, step, shown = kept["average"], kept["step"], kept["loss"]

    def keep():
        part = path.with_suffix(".part")
        torch.save(dict(model=model.state_dict(), optimizer=optimizer.state_dict(), generator=generator.get_state(),
                        average=average, step=step, loss=shown), part)
        os.replace(part, path)

    begun, first = time.time(), step
    while step < course.steps:
        if step % KEEP_EVERY == 0 and step > first:
            keep()
        for group in optimizer.param_groups:
            group["lr"] = course.rate * min(1, (step + 1) / 100) * (
                0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / course.steps)))
        clean, prompts = batch(generator, course.woven, *course.stage(step))
        if gates:
            gates.grid = gated.grid_of(clean)
        inside, outside = loss_of(model, clean, prompts, generator, seen, course.shift)
        optimizer.zero_grad(set_to_none=True)
        (inside + UNSEEN * outside).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        blend = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            for k, v in model.state_dict().items():
                average[k].lerp_(v, 1 - blend)
        shown += max(0.02, 1 / (step + 1)) * (inside.item() - shown)
        step += 1
        if step % 20 == 0 or step == course.steps:
            pace = (time.time() - begun) / (step - first)
            shape = 'x'.join(map(str, course.stage(step - 1)))
            print(f"{name}: step {step} of {course.steps}, {shape}, loss {shown:.4f} "
                  f"(unseen {outside.item():.4f}), {pace:.2f} s a step", flush=True)
    keep()
    return average


@torch.no_grad()
def validate(clips=48):
    """Losses on the same unseen clips and noise, as means with the standard error of the difference to dense."""
    seen, losses = torch.linalg.qr(scenes.FACTORS).Q, {}
    for title, name, sparse in (("dense", "dense", False), ("dense model, VSA at 0.9", "dense", True),
                                ("gated model, VSA at 0.9", "gated", True)):
        model, gates = build(with_gates=sparse)
        model.load_state_dict(finished(name), strict=name == "gated")
        generator, losses[title] = torch.Generator().manual_seed(99), []
        for _ in range(clips):
            clean, prompts = batch(generator, True, *COURSES["dense"].stages[-1][1:])
            if gates:
                gates.grid = gated.grid_of(clean)
            losses[title].append(loss_of(model, clean, prompts, generator, seen, COURSES["dense"].shift)[0])
        loss, first = torch.stack(losses[title]), torch.stack(losses["dense"])
        more = (loss - first) / first.mean()
        print(f"{title}: {loss.mean():.4f}, {more.mean():+.1%} +- {more.std() / len(more) ** 0.5:.1%}", flush=True)


def finished(name):
    """The averaged weights of a course that was completed."""
    path = STATE / f"{name}.pt"
    kept = torch.load(path, weights_only=True) if path.exists() else {"step": 0}
    if kept["step"] < COURSES[name].steps:
        raise SystemExit(f"{path}: {kept['step']} of {COURSES[name].steps} steps done; run `{Path(sys.argv[0]).name} "
                         f"{name}` first")
    return kept["average"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(COURSES))
    parser.add_argument("--comfyui", help="checkout (default: as comfy_boot.locate finds it)")
    parser.add_argument("--validate", action="store_true", help="train nothing, print losses")
    args = parser.parse_args()
    from comfy_boot import boot
    boot(args.comfyui)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    STATE.mkdir(parents=True, exist_ok=True)
    if args.validate:
        return validate()
    for name in args.names:
        train(name)
    return None


if __name__ == "__main__":
    main()
