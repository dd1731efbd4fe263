"""Sliding Tile Attention with a strategy: searched and saved in one graph, loaded in the other."""
from __future__ import annotations

from . import one_model, parts
from .files import WAN_VAE
from .notes import PROMPT
from .page import GREEN

SIZE = (832, 480, 81)
MODEL = "wan2.1_t2v_1.3B_fp16.safetensors"
NAME = "wan2.1_1.3b_480p"
SEARCH = (
    "**STA Strategy Search** samples your clip densely once and measures, in four of the steps, what each head of each "
    "layer loses under each candidate window. Then every head gets the cheapest window it can live with.\n\n"
    "- `goal` bounds the error of every head, or the density of the whole.\n"
    "- The seed is fixed: an interrupted search goes on where it stopped, a finished one is not done again.\n"
    "- The node shows the strategy as a map of steps, layers and heads.\n\n"
    "**Save Sparse Attention Strategy** writes it to `output/sta_strategies`, from where the graph "
    "*wan_sta_strategy_load* takes it. It fits the same model at other sizes and lengths.")
LOAD = (
    "**Sliding Tile Attention** with a strategy: every step, layer and head has a window of its own, and `window` is "
    f"not used.\n\n- Run *wan_sta_strategy_search* first: it makes `{NAME}_00001_.json`. FastVideo's files load too, "
    "from `models/sta_strategies`.\n- `start_percent` is 0, because the search has measured the noisy steps too.\n\n"
    "**What to expect**: {:,} tokens. After a run the sparse node says *ON*, *OFF* or *SLOWER*, with the reason.")

CALIBRATE = (
    "**Calibrate Sparse Attention** samples your clip densely once and measures what each head of each layer loses "
    "when it sees a part of the clip only, in every part of the denoising. Then it shares the work out: noisy steps "
    "and heads that look far get more.\n\n"
    "- `at_most` 0.3: at most 30 % of dense attention is computed, dense steps included.\n"
    "- `check` samples the clip sparse three times and takes the closest. The node says how far that is from dense.\n"
    "- The seed is fixed: an interrupted calibration goes on where it stopped, a finished one is not done again.\n\n"
    "**Save Sparse Attention Strategy** writes it to `output/sta_strategies`, from where the graph "
    "*wan_vsa_calibrated* takes it. It fits the same model at other sizes, lengths and prompts.")
CALIBRATED = (
    "**Video Sparse Attention** with a strategy: every step, layer and head keeps its own share of the tiles, and "
    f"`sparsity` is not used.\n\n- Run *wan_vsa_calibrate* first: it makes `{NAME}_vsa_00001_.json`.\n- The dense "
    "start is the strategy's own: noisy steps were measured too.\n\n"
    "**What to expect**: {:,} tokens. After a run the sparse node says *ON*, *OFF* or *SLOWER*, with the reason.")


def search(page):
    finder(page, SEARCH, NAME, lambda order: page.add(
        "STAStrategySearch", size=(560, 900), **order, steps=12, measured_steps=4, goal="error of every head",
        max_error=0.15, max_density=0.3))


def calibrate(page):
    finder(page, CALIBRATE, f"{NAME}_vsa", lambda order: page.add(
        "SparseAttentionCalibrate", size=(560, 900), **order, steps=20, measured_steps=8, goal="work of the whole",
        at_most=0.3))


def finder(page, text, name, add):
    """Models, prompt and size, the node that `add` makes of them, and its result saved."""
    clip, model = parts.wan_clip(page), parts.unet(page, MODEL)
    shifted = parts.shift(page, model[0], 8.0)
    a = page.group("Step 1 - Load models", (0, 0), [shifted, model, clip])
    positive, negative = parts.prompts(page, clip[0], PROMPT)
    b = page.group("Step 2 - Prompt", (a.right + 20, 80), [positive, negative])
    empty = page.add("EmptyHunyuanLatentVideo", size=(380, 0), width=SIZE[0], height=SIZE[1], length=SIZE[2],
                     batch_size=1)
    page.group("Step 3 - Video size", (b.left, b.bottom + 20), [empty])
    found = add({"model": shifted[0], "positive": positive[0], "negative": negative[0], "latent_image": empty[0],
                 "seed": 1, "cfg": 6.0, "sampler_name": "euler", "scheduler": "simple"})
    kept = page.add("SaveSTAStrategy", size=(380, 150), strategy=found[0], filename_prefix=name)
    note = page.note("What this does", text, (380, 420))
    page.group("Sparse attention: search and save", (b.right + 20, 0), [found], [kept, note], color=GREEN)
    parts.model_links(page, (a.left, a.bottom + 20), "Wan 2.1", size=(360, 480))


def load(page):
    one_model.text_to_video(
        page, "Wan 2.1", parts.wan_clip, MODEL, WAN_VAE, 8.0, "EmptyHunyuanLatentVideo", SIZE, "uni_pc", 30,
        6.0, 16.0, "sta", "wan_sta_strategy", LOAD.format(parts.tokens(*SIZE)), f"{NAME}_00001_.json",
        start_percent=0.0)


def calibrated(page):
    one_model.text_to_video(
        page, "Wan 2.1", parts.wan_clip, MODEL, WAN_VAE, 8.0, "EmptyHunyuanLatentVideo", SIZE, "uni_pc", 30,
        6.0, 16.0, "vsa", "wan_vsa_calibrated", CALIBRATED.format(parts.tokens(*SIZE)), f"{NAME}_vsa_00001_.json")
