"""Synthetic clips whose content is known: coloured shapes that move, collide or pass over textured ground.

    scene = draw_scene(torch.Generator().manual_seed(1), frames=8, height=32, width=32)
    latent = to_latent(render(scene))          # [16, 8, 32, 32], Wan's latent space
    prompt = words(scene)                      # [4, 64], what a text encoder would have said

A pixel is a latent pixel: nothing here needs a VAE. Colours go through Wan's own latent preview backwards, so that
ComfyUI's preview of such a latent is the clip.
"""
import math
from dataclasses import dataclass

import torch

COLOURS = {"red": (0.85, -0.75, -0.75), "green": (-0.75, 0.75, -0.75), "blue": (-0.7, -0.55, 0.9),
           "yellow": (0.85, 0.8, -0.75), "magenta": (0.85, -0.7, 0.8), "cyan": (-0.75, 0.75, 0.8)}
KINDS = ("disc", "square")
GROUNDS = ("rows", "columns", "checks", "slope")
WOVEN = GROUNDS[:3], math.pi / 2, 2.0          # a period of two pixels, one patch of the model
MANNERS = ("solid", "passing")                 # shapes bounce off each other, or pass in front of each other
VOCABULARY = (*COLOURS, *KINDS, *GROUNDS, *MANNERS)
TEXT_TOKENS, TEXT_WIDTH, LOUDNESS = 4, 64, 8.0
MOST_SHAPES = TEXT_TOKENS - 1

# How ComfyUI previews a Wan 2.1 latent: rgb = FACTORS^T latent + BIAS (comfy/latent_formats.py, class Wan21).
FACTORS = torch.tensor([
    [-0.1299, -0.1692, 0.2932], [0.0671, 0.0406, 0.0442], [0.3568, 0.2548, 0.1747], [0.0372, 0.2344, 0.1420],
    [0.0313, 0.0189, -0.0328], [0.0296, -0.0956, -0.0665], [-0.3477, -0.4059, -0.2925], [0.0166, 0.1902, 0.1975],
    [-0.0412, 0.0267, -0.1364], [-0.1293, 0.0740, 0.1636], [0.0680, 0.3019, 0.1128], [0.0032, 0.0581, 0.0639],
    [-0.1251, 0.0927, 0.1699], [0.0060, -0.0633, 0.0005], [0.3477, 0.2275, 0.2950], [0.1984, 0.0913, 0.1861]])
BIAS = torch.tensor([-0.1835, -0.0868, -0.3360])


@dataclass(frozen=True)
class Shape:
    colour: str
    kind: str
    radius: float            # pixels; half the side of a square
    path: tuple              # (y, x) of the centre per frame


@dataclass(frozen=True)
class Scene:
    size: tuple              # frames, height, width
    ground: str
    tint: tuple              # rgb added to the ground
    phase: float
    period: float            # pixels
    manner: str
    shapes: tuple            # the last one is in front


def uniform(generator, low, high):
    return low + (high - low) * torch.rand((), generator=generator).item()


def pick(generator, among):
    return among[int(torch.randint(len(among), (), generator=generator))]


def draw_scene(generator, frames, height, width, shapes=None, woven=True):
    """A scene of 1 to 3 shapes (2 or 3 from 24 pixels on), each of another colour, all on the picture at all times.
    The ground is a weave, the same in every patch of the model (woven), or waves of any length and phase."""
    most = MOST_SHAPES if min(height, width) >= 24 else 2
    count = shapes or int(torch.randint(most - 1, most + 1, (), generator=generator))
    colours = torch.randperm(len(COLOURS), generator=generator)[:count].tolist()
    radii = [uniform(generator, 2.6, 4.6) for _ in range(count)]
    places = apart(generator, radii, height, width)
    speeds = []
    for _ in range(count):
        speed, angle = uniform(generator, 0.4, 1.8), uniform(generator, 0, 2 * math.pi)
        speeds.append([speed * math.sin(angle), speed * math.cos(angle)])
    manner = pick(generator, MANNERS)
    paths = move(places, speeds, radii, frames, height, width, solid=manner == "solid")
    made = tuple(Shape(list(COLOURS)[c], pick(generator, KINDS), r, path)
                 for c, r, path in zip(colours, radii, paths, strict=True))
    tint = tuple(uniform(generator, -0.12, 0.12) for _ in range(3))
    ground = WOVEN if woven else (GROUNDS, uniform(generator, 0, 2 * math.pi), uniform(generator, 5.0, 10.0))
    return Scene((frames, height, width), pick(generator, ground[0]), tint, *ground[1:], manner, made)


def apart(generator, radii, height, width, tries=200):
    """A place for every radius; no two touch where that can be had."""
    places = []
    for r in radii:
        for _ in range(tries):
            place = [uniform(generator, r, height - 1 - r), uniform(generator, r, width - 1 - r)]
            if all(math.dist(place, other) > r + s + 1 for other, s in zip(places, radii, strict=False)):
                break
        places.append(place)
    return places


def move(places, speeds, radii, frames, height, width, solid, substeps=8):
    """Paths of discs of equal mass between the walls, one (y, x) per frame and shape."""
    places, speeds = [list(p) for p in places], [list(v) for v in speeds]
    paths = [[tuple(p)] for p in places]
    for _ in range(1, frames):
        for _ in range(substeps):
            for p, v, r in zip(places, speeds, radii, strict=True):
                for axis, side in enumerate((height, width)):
                    p[axis] += v[axis] / substeps
                    if not r <= p[axis] <= side - 1 - r:
                        p[axis] = min(max(p[axis], r), side - 1 - r)
                        v[axis] = -v[axis]
            if solid:
                bounce(places, speeds, radii)
        for path, p in zip(paths, places, strict=True):
            path.append(tuple(p))
    return [tuple(path) for path in paths]


def bounce(places, speeds, radii):
    """Shapes that touch and approach each other swap the parts of their speeds along the line between them."""
    for i in range(len(places)):
        for j in range(i):
            line = [a - b for a, b in zip(places[i], places[j], strict=True)]
            far = math.hypot(*line)
            if not 0 < far < radii[i] + radii[j]:
                continue
            line = [x / far for x in line]
            closing = sum((a - b) * x for a, b, x in zip(speeds[i], speeds[j], line, strict=True))
            if closing < 0:
                for axis in range(2):
                    speeds[i][axis] -= closing * line[axis]
                    speeds[j][axis] += closing * line[axis]


def render(scene):
    """The clip of a scene: rgb [3, frames, height, width] in [-1, 1]."""
    frames, height, width = scene.size
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    turn = 2 * math.pi / scene.period
    waves = {"rows": torch.sin(turn * y + scene.phase), "columns": torch.sin(turn * x + scene.phase),
             "checks": torch.sin(turn * y + scene.phase) * torch.sin(turn * x + scene.phase),
             "slope": torch.sin(turn * (x + y) / math.sqrt(2) + scene.phase)}
    ground = -0.25 + 0.2 * waves[scene.ground] + torch.tensor(scene.tint)[:, None, None]
    out = ground[:, None].repeat(1, frames, 1, 1)
    for shape in scene.shapes:
        cover = covered(shape, y, x)[None]
        out = out * (1 - cover) + torch.tensor(COLOURS[shape.colour])[:, None, None, None] * cover
    return out


def covered(shape, y, x):
    """How much of every pixel the shape covers, [frames, height, width] in [0, 1]."""
    path = torch.tensor(shape.path)
    dy, dx = (y - path[:, 0, None, None]).abs(), (x - path[:, 1, None, None]).abs()
    far = torch.maximum(dy, dx) if shape.kind == "square" else torch.hypot(dy, dx)
    return torch.sigmoid(4 * (shape.radius - far))


def to_latent(rgb):
    """The smallest latent whose preview is that clip: [..., 3, T, H, W] -> [..., 16, T, H, W]."""
    return torch.einsum("...cthw,cd->...dthw", rgb - BIAS[:, None, None, None], torch.linalg.pinv(FACTORS))


def to_rgb(latent):
    """The clip that ComfyUI's latent preview shows: [..., 16, T, H, W] -> [..., 3, T, H, W]."""
    return torch.einsum("...dthw,dc->...cthw", latent, FACTORS) + BIAS[:, None, None, None]


def words(scene):
    """What there is to see, as the embedding of a prompt: [TEXT_TOKENS, TEXT_WIDTH], a token per shape, then one for
    the ground. Nothing about places or speeds."""
    said = [(s.colour, s.kind) for s in scene.shapes]
    said += [()] * (MOST_SHAPES - len(said)) + [(scene.ground, scene.manner)]
    out = torch.zeros(TEXT_TOKENS, TEXT_WIDTH)
    for token, names in enumerate(said):
        for name in names:
            out[token, VOCABULARY.index(name)] = LOUDNESS
    return out
