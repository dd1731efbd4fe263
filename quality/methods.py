"""What the quality table compares: dense and its noise floor, and the pack's nodes with their settings."""
from __future__ import annotations

from dataclasses import dataclass

TILES = 32                   # of 64 tokens, in the 8 x 16 x 16 tokens of the clips
STEPS = 16


@dataclass(frozen=True)
class Case:
    """One row of the table."""
    method: str
    keep: int = 100          # percent of the tiles
    dense: int = 0           # steps at the start

    @property
    def title(self):
        if self.method in PRESETS:
            return f"preset {self.method}"
        return METHODS[self.method][0] + (f", {self.keep} %" if self.keep < 100 else "") if self.method in METHODS \
            else self.method

    @property
    def slug(self):
        return f"{self.method.replace(' ', '_')}_{self.keep}_{self.dense}"


# name: title, widgets of the VSA node beside sparsity and start
METHODS = {
    "raster": ("runs of 64 tokens", {"tile_size": "1x4x16"}),
    "tiles": ("tiles", {"tile_size": "4x4x4"}),
    "raster_far": ("runs of 64 tokens + far field", {"tile_size": "1x4x16", "far_field": "on"}),
    "far": ("tiles + far field", {"tile_size": "4x4x4", "far_field": "on"}),
    "mass": ("tiles by mass", {"tile_size": "4x4x4", "attention_mass": 0.999}),     # as many as sparsity allows
    "spread": ("tiles + far field, spread by noise", {"tile_size": "4x4x4", "far_field": "on", "spread": "by noise"}),
    "calibrated": ("calibrated budgets + far field", {}),
    "both": ("tiles by mass + far field", {"tile_size": "4x4x4", "attention_mass": 0.999, "far_field": "on"}),
}
PRESETS = ("safe", "balanced", "fast")
"""Of the VSA node, everything else as a new node has it."""
CALIBRATED_ON = 20_000
"""The seed of the clip that budgets are measured on: none that is judged."""
DENSE = Case("dense")
FLOOR = (Case("bf16 attention"), Case("other seed"))


def cases(names, keeps, denses):
    return [Case(name, keep, dense) for keep in keeps for dense in denses for name in names]


def sample(clips, case, seed):
    """The latent of one clip, and what the run says of itself."""
    model = clips.load("dense")
    if case == DENSE:
        return clips.sample(model, seed), {}
    if case.method == "other seed":
        return clips.sample(model, seed, noise=seed + 500_000), {}
    if case.method == "bf16 attention":
        model = model.clone()
        model.model_options["transformer_options"]["optimized_attention_override"] = clips.rounded
        return clips.sample(model, seed), {}
    if case.method in PRESETS:
        return clips.sparse(model, seed, sparsity=0.8, preset=case.method, far_field="auto", spread="auto")
    if case.method == "calibrated":
        kept = round(case.keep / 100 * TILES) / TILES
        work = (case.dense + (STEPS - case.dense) * kept) / STEPS
        return clips.sparse(model, seed, sparsity=0.0, far_field="on", start_percent=0.0, preset="custom",
                            tile_size="4x4x4", strategy=clips.calibrated(model, CALIBRATED_ON, work, STEPS))
    return clips.sparse(model, seed, sparsity=1 - round(case.keep / 100 * TILES) / TILES,
                        start_percent=case.dense / STEPS, **METHODS[case.method][1])
