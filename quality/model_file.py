"""The tiny models as files that ComfyUI loads as Wan 2.1, with how they are to be sampled in their metadata.

    python quality/model_file.py         writes every trained course that is a model for use
"""
import json
import sys
from pathlib import Path

import safetensors
import safetensors.torch
import torch

sys.path.append(str(Path(__file__).parents[1] / "dev"))
from load_pack import load_pack  # noqa: E402

load_pack()
from pack.checkpoints.trained import METADATA_KEY, Trained  # noqa: E402
from pack.quality import gated, scenes, train  # noqa: E402

FOLDER = Path(__file__).parent / "models"
FILES = {"dense": FOLDER / "tiny_wan_shapes.safetensors", "gated": FOLDER / "tiny_wan_shapes_vsa.safetensors"}
SAMPLING = {"steps": 16, "cfg": 3.0, "shift": 3.0, "sampler": "euler", "scheduler": "simple",
            "latent": [16, *train.COURSES["dense"].stages[-1][2:]]}
EXAMPLE = 8                  # the scene whose words are in the file as `conditioning`


def scene_of(seed):
    """The scene that clips of this seed are asked for."""
    return scenes.draw_scene(torch.Generator().manual_seed(seed), *SAMPLING["latent"][1:])


def write(name):
    """Half precision: what rounding moves is far below what training left open."""
    weights = {f"model.diffusion_model.{k}": v.half().contiguous() for k, v in train.finished(name).items()}
    weights["conditioning"] = scenes.words(scene_of(EXAMPLE))[None]
    metadata = {"config": json.dumps({"transformer": {"text_dim": scenes.TEXT_WIDTH}}),
                "sampling": json.dumps(SAMPLING)}
    if train.COURSES[name].gated:
        metadata[METADATA_KEY] = Trained("Tiny Wan of shapes", gated.SPARSITY, gated.TILE, steps=SAMPLING["steps"],
                                         shift=SAMPLING["shift"], sampler=SAMPLING["sampler"]).to_json()
    path = FILES[name]
    path.parent.mkdir(exist_ok=True)
    safetensors.torch.save_file(weights, path, metadata=metadata)
    print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB")


def sampling_of(path):
    """steps, cfg, shift, sampler, scheduler and latent [C, T, H, W] of a file."""
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["sampling"])


if __name__ == "__main__":
    for name in sys.argv[1:] or FILES:
        write(name)
