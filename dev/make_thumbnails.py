"""Draw the cards of the example graphs for the template browser, and the README's picture. Needs Pillow.

    python dev/make_thumbnails.py

A card names method, family, task and size, and shows which tiles the outlined one looks at: as many as the graph's own
sparsity or window keeps, at places that are drawn, not measured.
"""
import json
import math
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
INK, PAPER, EMPTY, OUTLINE = (32, 36, 44), (250, 250, 247), (214, 218, 224), (226, 74, 51)
SIDE = 640
FRAMES, ROWS, COLUMNS = 3, 8, 6
QUERY = 1, 4, 3
FAMILIES = {
    "wan_t2v_14b": ("Wan 2.1 14B", (12, 52, 110)), "wan_t2v": ("Wan 2.1", (18, 78, 138)),
    "wan_i2v": ("Wan 2.1 14B", (28, 104, 168)), "wan_sta": ("Wan 2.1", (52, 66, 92)),
    "wan_vsa": ("Wan 2.1", (52, 66, 92)),
    "wan22": ("Wan 2.2 14B", (70, 52, 140)), "fastwan": ("FastWan", (166, 92, 20)),
    "turbowan22": ("TurboWan 2.2", (20, 88, 128)), "turbowan": ("TurboWan", (14, 112, 122)),
    "hunyuan_video15": ("HunyuanVideo 1.5", (25, 110, 84)), "ltx2": ("LTX-2", (132, 62, 120)),
    "minimax_h3": ("MiniMax H3", (158, 46, 58)),
}
"""How a graph's name starts: the family it shows, and a colour."""
TASKS = {"t2v": "text to video", "i2v": "image to video"}
EXTRAS = {"4step": "4 steps", "3step": "3 steps", "attach_gates": "gates attached", "720p": "720p",
          "raylight": "Raylight", "long": "20 seconds", "ltx2": "sound", "minimax": "sound",
          "strategy_search": "search a strategy", "strategy_load": "use a strategy", "calibrated": "use a calibration",
          "vsa_calibrate": "calibrate"}
WINDOWS = ((18, 78, 138), (86, 142, 196), (176, 206, 232), (238, 178, 74), (226, 74, 51))
"""Colours of a strategy's windows, small to large."""


def graph_of(name):
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def widgets(graph, *kinds):
    """{widget: value} of the first node of these types; a seed's companion is not there. None without such a node."""
    for node in graph["nodes"]:
        if node["type"] in kinds:
            names = [entry["name"] for entry in node["inputs"] if "widget" in entry]
            return dict(zip(names, node["widgets_values"], strict=False))
    return None


def clip_size(graph):
    """(width, height, frames) of the clip that the graph makes."""
    for node in graph["nodes"]:
        names = [entry["name"] for entry in node["inputs"] if "widget" in entry]
        if {"width", "height", "length"} <= set(names):
            found = dict(zip(names, node["widgets_values"], strict=False))
            return found["width"], found["height"], found["length"]
    raise ValueError("wanted a node with width, height and length")


def kept(method, share=0.2, window=(1.0, 0.5, 0.5), seed=7):
    """The tiles (t, h, w) that the query tile looks at: the `share` nearest to it and to a subject that moves (VSA), or
    a window as parts of the clip (STA)."""
    everything = [(t, h, w) for t in range(FRAMES) for h in range(ROWS) for w in range(COLUMNS)]
    if method == "dense":
        return set(everything)
    if method == "STA":
        sides = [max(1, round(part * side)) for part, side in zip(window, (FRAMES, ROWS, COLUMNS), strict=True)]
        first = [min(max(at - side // 2, 0), whole - side)
                 for at, side, whole in zip(QUERY, sides, (FRAMES, ROWS, COLUMNS), strict=True)]
        return {tile for tile in everything
                if all(low <= at < low + side for at, low, side in zip(tile, first, sides, strict=True))}
    chance = random.Random(seed)
    row, column, step = chance.uniform(1, 6), chance.uniform(0.5, 2), chance.uniform(1, 2)

    def far(tile):
        t, h, w = tile
        to_query = math.hypot(h - QUERY[1], w - QUERY[2], 1.2 * (t - QUERY[0]))
        to_subject = math.hypot(h - row, w - column - step * t) * 1.3
        return min(to_query, to_subject) + chance.uniform(0, 1.4)
    return set(sorted(everything, key=lambda tile: (tile != QUERY, far(tile)))[:math.ceil(share * len(everything))])


def font(size):
    return ImageFont.load_default(size=size)


def fitting(draw, text, size, width):
    """The largest font up to `size` in which the text is no wider than `width`."""
    while draw.textlength(text, font=font(size)) > width:
        size -= 2
    return font(size)


def draw_clip(draw, left, top, cell, tiles, colour, words=()):
    """Moments of a clip beside each other, each a grid of tiles; those that are looked at in `colour`."""
    for t in range(FRAMES):
        x0 = left + t * (COLUMNS * cell + cell // 2)
        if words:
            draw.text((x0, top), words[t], fill=INK, font=font(22))
        for h in range(ROWS):
            for w in range(COLUMNS):
                x, y = x0 + w * cell, top + 34 * bool(words) + h * cell
                box = (x, y, x + cell - 3, y + cell - 3)
                draw.rectangle(box, fill=colour if (t, h, w) in tiles else EMPTY)
                if (t, h, w) == QUERY:
                    draw.rectangle(box, outline=OUTLINE, width=5)


def draw_strategy(draw, left, top, seed):
    """A strategy: a window, as a colour, for every layer (across) and head (down)."""
    chance = random.Random(seed)
    for head in range(12):
        leaning = chance.triangular(-0.5, 4, 0.5)
        for layer in range(30):
            window = min(4, max(0, round(leaning + chance.gauss(0, 0.7) + (layer < 3))))
            x, y = left + layer * 19, top + head * 19
            draw.rectangle((x, y, x + 16, y + 16), fill=WINDOWS[window])


def draw_heads(draw, left, top, cell):
    """Three heads of a strategy, each with a window of its own."""
    for place, (window, colour) in enumerate((((0, 0.9, 0.2), 0), ((0, 0.4, 0.5), 3), ((0, 0.25, 1.0), 4))):
        tiles = {(place, h, w) for _, h, w in kept("STA", window=window)}
        for h in range(ROWS):
            for w in range(COLUMNS):
                x, y = left + (place * COLUMNS + w) * cell + place * cell // 2, top + h * cell
                draw.rectangle((x, y, x + cell - 3, y + cell - 3),
                               fill=WINDOWS[colour] if (place, h, w) in tiles else EMPTY)


def draw_image_sign(draw, left, top):
    """A framed picture: the graph starts from one."""
    draw.rectangle((left, top, left + 92, top + 68), outline=PAPER, width=6)
    draw.polygon([(left + 14, top + 56), (left + 40, top + 24), (left + 56, top + 42), (left + 64, top + 34),
                  (left + 80, top + 56)], fill=PAPER)
    draw.ellipse((left + 62, top + 14, left + 76, top + 28), fill=PAPER)


def described(name):
    """(family, colour, task with what is special) of a graph, from its name and its nodes."""
    family, colour = next(words for start, words in FAMILIES.items() if name.startswith(start))
    task = next((words for key, words in TASKS.items() if key in name.split("_")), "")
    if name.startswith("fastwan"):
        task = TASKS["t2v"]
    extra = [words for key, words in EXTRAS.items() if key in name]
    return family, colour, " · ".join(filter(None, [task, *extra]))


def card(name):
    """The picture of one graph."""
    graph = graph_of(name)
    family, colour, task = described(name)
    vsa = widgets(graph, "VideoSparseAttentionPatch", "SparseAttentionForRaylight")
    sta = widgets(graph, "SlidingTileAttentionPatch")
    sla = widgets(graph, "SparseLinearAttentionPatch")
    moba = widgets(graph, "VideoMixtureOfBlockAttentionPatch")
    method = "VSA" if vsa else "SLA" if sla else "VMoBA" if moba else "STA"
    width, height, frames = clip_size(graph)
    image = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, SIDE, 190), fill=colour)
    draw.text((32, 22), family, fill=PAPER, font=fitting(draw, family, 72, SIDE - 64), stroke_width=1,
              stroke_fill=PAPER)
    draw.text((34, 122), task, fill=PAPER, font=fitting(draw, task, 44, SIDE - 64))
    draw.text((28, 190), method, fill=colour, font=fitting(draw, method, 150, 310), stroke_width=5, stroke_fill=colour)
    draw.text((360, 232), f"{width} x {height}", fill=INK, font=font(42))
    draw.text((360, 286), f"{frames} frames", fill=INK, font=font(42))
    if task.startswith(TASKS["i2v"]):
        draw_image_sign(draw, 516, 104)
    if name.endswith(("strategy_search", "calibrate", "calibrated")):
        draw_strategy(draw, 36, 384, name)
    elif name.endswith("strategy_load"):
        draw_heads(draw, 34, 378, 30)
    else:
        window = [float(part) for part in sta["window"].split("x")] if sta else ()
        share = 1 - vsa["sparsity"] if vsa else sla["ratio"] if sla else moba["threshold"] if moba else None
        tiles = kept("STA", window=window) if sta else kept("VSA", share, seed=name)
        draw_clip(draw, 34, 378, 30, tiles, colour)
    return image


def explanation():
    """Dense, VSA and STA beside each other."""
    image = Image.new("RGB", (1560, 300), PAPER)
    draw = ImageDraw.Draw(image)
    for place, (method, words) in enumerate((
            ("dense", "Dense: every tile looks at the whole clip"),
            ("VSA", "VSA: at the tiles that matter to it"), ("STA", "STA: at a window around it"))):
        left = 24 + place * 520
        draw.text((left, 20), words, fill=INK, font=font(24))
        draw_clip(draw, left, 62, 23, kept(method), (18, 78, 138), ("earlier", "now", "later"))
    return image


def main():
    for path in sorted((ROOT / "workflows").glob("*.json")):
        card(path.stem).save(path.with_suffix(".jpg"), quality=88)
        print(path.with_suffix(".jpg").relative_to(ROOT))
    explanation().save(ROOT / "docs" / "sparse_attention.png", optimize=True)
    print("docs/sparse_attention.png")


if __name__ == "__main__":
    main()
