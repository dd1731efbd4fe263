"""Draw the cards of the example graphs for the template browser, and the README's picture. Needs Pillow.

    python dev/make_thumbnails.py

A card names family, task and method, and shows which tiles the outlined one looks at: drawn, not measured.
"""
import random
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
INK, PAPER, OUTLINE = (32, 36, 44), (250, 250, 247), (226, 74, 51)
SIDE = 640
FRAMES, ROWS, COLUMNS = 3, 10, 6
QUERY = 1, 4, 3
CARDS = {
    "wan_t2v": ("Wan 2.1", "text to video", (18, 78, 138)),
    "hunyuan_video15_t2v": ("HunyuanVideo 1.5", "text to video", (25, 110, 84)),
    "ltx2_t2v": ("LTX-2", "text to video and sound", (132, 62, 120)),
    "fastwan": ("FastWan", "text to video in 3 steps", (166, 92, 20)),
}
"""How a graph's name starts: what is said of it, and its colour."""


def kept(method):
    """The tiles (t, h, w) that the query tile looks at."""
    everything = [(t, h, w) for t in range(FRAMES) for h in range(ROWS) for w in range(COLUMNS)]
    if method == "dense":
        return set(everything)
    if method == "STA":
        return {(t, h, w) for t, h, w in everything if abs(h - QUERY[1]) <= 1 and abs(w - QUERY[2]) <= 1}
    chosen = random.Random(7)
    near = [(t, h, w) for t, h, w in everything if abs(h - QUERY[1]) + abs(w - QUERY[2]) <= 1]
    return {QUERY, *chosen.sample(near, 9), *chosen.sample(everything, 18)}


def font(size):
    return ImageFont.load_default(size=size)


def draw_clip(draw, left, top, cell, method, colour):
    """Moments of a clip beside each other, each a grid of tiles; those that are looked at in `colour`."""
    for t, words in enumerate(("earlier", "now", "later")):
        x0 = left + t * (COLUMNS * cell + cell // 2)
        draw.text((x0, top), words, fill=INK, font=font(22))
        for h in range(ROWS):
            for w in range(COLUMNS):
                x, y = x0 + w * cell, top + 34 + h * cell
                box = (x, y, x + cell - 3, y + cell - 3)
                draw.rectangle(box, fill=colour if (t, h, w) in kept(method) else (214, 218, 224))
                if (t, h, w) == QUERY:
                    draw.rectangle(box, outline=OUTLINE, width=5)


def card(name):
    """The picture of one graph."""
    family, task, colour = next(words for start, words in CARDS.items() if name.startswith(start))
    method = "STA" if name.endswith("sta") else "VSA"
    image = Image.new("RGB", (SIDE, SIDE), PAPER)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, SIDE, 196), fill=colour)
    draw.text((32, 26), family, fill=PAPER, font=font(64))
    draw.text((34, 118), f"{task} · {method}", fill=PAPER, font=font(40))
    draw_clip(draw, 32, 226, 30, method, colour)
    return image


def explanation():
    """Dense, VSA and STA beside each other."""
    image = Image.new("RGB", (1560, 340), PAPER)
    draw = ImageDraw.Draw(image)
    for place, (method, words) in enumerate((
            ("dense", "Dense: every tile looks at the whole clip"),
            ("VSA", "VSA: at the tiles that matter to it"), ("STA", "STA: at a window around it"))):
        left = 24 + place * 520
        draw.text((left, 20), words, fill=INK, font=font(24))
        draw_clip(draw, left, 62, 23, method, (18, 78, 138))
    return image


def main():
    for path in sorted((ROOT / "workflows").glob("*.json")):
        card(path.stem).save(path.with_suffix(".jpg"), quality=88)
        print(path.with_suffix(".jpg").relative_to(ROOT))
    explanation().save(ROOT / "docs" / "sparse_attention.png", optimize=True)
    print("docs/sparse_attention.png")


if __name__ == "__main__":
    main()
