"""What several cards gain over one: predicted from stated rates, and the bytes they trade, measured.

    python benchmarks/split.py [--sparsity 0.9] [--devices cuda:0 cuda:1]

The prediction is arithmetic, no measurement: one layer of the model, one condition, nothing of the exchange hidden
behind anything, without packing copies, text encoder, VAE and loading. The rates are stated below it. The bytes are
counted in a run of the exchange on CPU threads and must be those of the formula (exit code 1 otherwise). With two or
more devices the VSA layer is timed on them, beside the same layer on the first one alone.
"""
import argparse
import math
import platform
import statistics
import sys
import time
from typing import NamedTuple

import torch
from reference_vs_sdpa import load_pack

CONTEXT = 512
"""Text tokens that cross-attention reads."""
CARDS = (2, 4, 8)


class Model(NamedTuple):
    """A transformer's shape and a clip's."""

    name: str
    width: int
    heads: int
    ffn: int
    layers: int
    grid: tuple[int, int, int]

    @property
    def tokens(self):
        return math.prod(self.grid)

    @property
    def operand(self):
        """Bytes of one of q, k, v and the output, in bfloat16."""
        return 2 * self.tokens * self.width


class Card(NamedTuple):
    """Rates that a card is assumed to reach: TFLOPS of projections, dense and sparse attention, TB/s of its memory."""

    name: str
    projections: float
    dense: float
    sparse: float
    memory: float


MODELS = (Model("Wan 1.3B, 480p, 81 frames", 1536, 12, 8960, 30, (21, 30, 52)),
          Model("Wan 14B, 480p, 81 frames", 5120, 40, 13824, 40, (21, 30, 52)),
          Model("Wan 14B, 720p, 81 frames", 5120, 40, 13824, 40, (21, 45, 80)),
          Model("HunyuanVideo, 720p, 129 frames", 3072, 24, 12288, 60, (33, 45, 80)))
RATES = (Card("H100", 600, 620, 400, 3.0), Card("RTX 4090", 150, 150, 120, 0.9), Card("RTX 3090", 65, 60, 48, 0.85))
LINKS = {"NVLink 4": 340, "PCIe 5 x16": 32, "PCIe 4 x16, card to card": 20.7, "PCIe 4 x16, through memory": 13,
         "PCIe 4 x8, through memory": 6.5}
"""Gigabytes per second that a card sends and receives at once."""
PAIRS = {"H100": ("NVLink 4", "PCIe 5 x16"),
         "RTX 4090": ("PCIe 4 x16, card to card", "PCIe 4 x16, through memory", "PCIe 4 x8, through memory"),
         "RTX 3090": ("PCIe 4 x16, through memory", "PCIe 4 x8, through memory")}


def stages(model: Model, card: Card, sparsity: float | None) -> tuple[float, float, float]:
    """Milliseconds of one layer on one card: projections, attention, what is done token by token."""
    d, s = model.width, model.tokens
    projections = ((12 * d * d + 4 * d * model.ffn) * s + 4 * s * CONTEXT * d) / (card.projections * 1e12)
    if sparsity is None:
        attention = 4 * s * s * d / (card.dense * 1e12)
    else:
        tiles = math.prod(-(-n // 4) for n in model.grid)
        kept = math.ceil(round((1 - sparsity) * tiles, 6))
        attention = (4 * 64 * tiles * 64 * kept * d / (card.sparse * 1e12)
                     + 5 * model.operand / (card.memory * 1e12))
    return 1e3 * projections, 1e3 * attention, 1e3 * 25 * model.operand / (card.memory * 1e12)


def sent(model: Model, cards: int, parts: int = 3) -> float:
    """Bytes that a card sends per layer and pass, where rows and heads divide: q, k, v (and gate), and the output."""
    return (parts + 1) * model.operand * (cards - 1) / cards ** 2


def split_ms(model: Model, card: Card, sparsity: float | None, cards: int, link: float) -> float:
    """Milliseconds of one layer on so many cards."""
    projections, attention, rest = stages(model, card, sparsity)
    heads = math.ceil(model.heads / cards) / model.heads
    return (projections + rest) / cards + attention * heads + 1e3 * sent(model, cards) / (link * 1e9)


def predictions(sparsity: float) -> list[str]:
    """The table, one line per model, card, link and kind of attention."""
    lines = ["| model | card | link | attention | one card, ms per step | "
             + " | ".join(f"{n} cards" for n in CARDS) + " |", "| --- " * (5 + len(CARDS)) + "|"]
    for model in MODELS:
        for card in RATES:
            for link in PAIRS[card.name]:
                for kind, of in (("dense", None), (f"VSA {sparsity:g}", sparsity)):
                    alone = model.layers * sum(stages(model, card, of))
                    times = [model.layers * split_ms(model, card, of, n, LINKS[link]) for n in CARDS]
                    cells = [f"{ms:.0f} (x{alone / ms:.2f})" for ms in times]
                    lines.append(f"| {model.name} | {card.name} | {link} | {kind} | {alone:.0f} | "
                                 + " | ".join(cells) + " |")
    return lines


def counted_bytes(cards: int, heads: int, tokens: int, gate: bool) -> tuple[list[int], list[int]]:
    """(bytes that each rank sent in one layer on CPU threads, the same by the formula for uneven shares)"""
    from pack.vsa_core.sequence_parallel import even_shares, get_sp_group, ranges_of
    from pack.vsa_core.thread_ranks import run_as_ranks
    dim, rows = 64, even_shares(tokens, cards)
    shares, parts = even_shares(heads, cards), 4 if gate else 3

    def work():
        group = get_sp_group()
        mine = ranges_of(rows)[group.rank_in_group]
        local = [torch.zeros(1, len(mine), heads, dim, dtype=torch.bfloat16) for _ in range(parts)]
        out = group.heads_from_sequence(local, rows)[0]
        group.sequence_from_heads(out, rows, heads)
        return group.sent_bytes

    formula = [2 * dim * (parts * rows[r] * (heads - shares[r]) + (tokens - rows[r]) * shares[r]) for r in range(cards)]
    return run_as_ranks([work] * cards), formula


def layer_ms(devices, model: Model, sparsity: float, repeats: int) -> dict[str, list[float]]:
    """Times of the VSA layer on the first device alone and on all of them, and of the exchange in the latter."""
    from pack.vsa_core import DistributedAttention
    from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionMetadataBuilder
    from pack.vsa_core.forward_context import set_forward_context
    from pack.vsa_core.selector import AttentionBackendEnum
    from pack.vsa_core.sequence_parallel import even_shares, get_sp_group, ranges_of, sp_group_or_one
    from pack.vsa_core.thread_ranks import run_as_ranks
    rows = even_shares(model.tokens, len(devices))

    def wait(device):
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def timed(run, device):
        found = []
        for _ in range(repeats + 2):
            wait(device)
            begun = time.perf_counter()
            run()
            wait(device)
            found.append(1e3 * (time.perf_counter() - begun))
        return found[2:]

    def on(rank: int, rows):
        device, group = devices[rank], sp_group_or_one()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        mine, kind = ranges_of(rows)[rank], torch.bfloat16 if device.type == "cuda" else torch.float32
        q, k, v = torch.randn(3, 1, len(mine), model.heads, model.width // model.heads, dtype=kind, device=device)
        layer = DistributedAttention(model.heads, q.shape[3], dtype=kind,
                                     supported_attention_backends=(AttentionBackendEnum.VIDEO_SPARSE_ATTN,))
        metadata = VideoSparseAttentionMetadataBuilder().build(0, model.grid, (1, 1, 1), sparsity, device)
        with torch.inference_mode(), set_forward_context(metadata):
            whole = timed(lambda: layer(q, k, v, sequence_rows=rows), device)
            if group.world_size == 1:
                return whole, []

            def exchange():
                group.sequence_from_heads(group.heads_from_sequence((q, k, v), rows)[0], rows, model.heads)
            return whole, timed(exchange, device)

    alone, _ = on(0, (model.tokens,))
    together = run_as_ranks([lambda rank=rank: (get_sp_group(), on(rank, rows))[1] for rank in range(len(devices))])
    return {"one device": alone, "all devices": together[0][0], "of it the exchange": together[0][1]}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--devices", nargs="+", type=torch.device, help="default: all GPUs")
    parser.add_argument("--tokens", default="", help="t x h x w of the timed layer; default: those of Wan 14B, 720p")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(arguments)
    load_pack()
    print(f"python {platform.python_version()}, torch {torch.__version__}\n\n## Predicted, not measured\n")
    print("\n".join(predictions(args.sparsity)))
    print("\nassumed rates, TFLOPS of projections / dense / sparse attention and TB/s of memory: "
          + "; ".join(f"{card.name} {card.projections:g} / {card.dense:g} / {card.sparse:g}, {card.memory:g}"
                      for card in RATES)
          + "\nassumed links, GB/s each way: " + "; ".join(f"{name} {rate:g}" for name, rate in LINKS.items()))
    print("\n## Bytes that a rank sends per layer, counted on CPU threads, and by the formula\n")
    wrong = False
    for cards, heads, tokens, gate in ((2, 12, 1560, False), (2, 5, 1001, True), (3, 40, 1000, False),
                                       (4, 6, 997, True), (8, 12, 1560, False)):
        counted, formula = counted_bytes(cards, heads, tokens, gate)
        wrong |= counted != formula
        print(f"{cards} ranks, {heads} heads, {tokens} tokens{', gate' if gate else ''}: {counted}"
              f"{'' if counted == formula else f', formula {formula}: WRONG'}")
    devices = args.devices or [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
    if len(devices) > 1:
        model = MODELS[2]
        if args.tokens:
            model = model._replace(name="the layer", grid=tuple(map(int, args.tokens.split("x"))))
        names = [torch.cuda.get_device_name(device) if device.type == "cuda" else str(device) for device in devices]
        print(f"\n## Measured: {model.name}, {model.tokens} tokens, {model.heads} heads, VSA {args.sparsity:g}, on "
              f"{', '.join(names)}\n")
        for name, times in layer_ms(devices, model, args.sparsity, args.repeats).items():
            print(f"{name}: {statistics.median(times):.2f} ms, {min(times):.2f} to {max(times):.2f}")
    else:
        print("\nnot measured: one GPU or none here")
    if wrong:
        sys.exit("the bytes are not those of the formula")


if __name__ == "__main__":
    main()
