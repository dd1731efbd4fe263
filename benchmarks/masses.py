"""What it costs on a CPU to find the lists that hold a share of the attention, beside the attention that reads them.

    python benchmarks/masses.py [--tokens 9x30x52] [--target 0.95]

One head of smooth q, k and v. Prints one JSON line: seconds of the masses from tile means, of exact masses from all
tokens and from every eighth, of making lists, and of the sparse attention; the share of the attention that the lists of
either source hold by the exact masses.
"""
import argparse
import json
import platform
import statistics
from functools import partial

import torch
from reference_vs_sdpa import load_pack, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="9x30x52")
    parser.add_argument("--target", type=float, default=0.95)
    parser.add_argument("--sparsity", type=float, default=0.0, help="bounds the mean length of the lists")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    load_pack()
    from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder
    from pack.vsa_core.mass import pooled_masses, tile_masses
    from pack.vsa_core.mass_lists import keep_mass
    from pack.vsa_core.tiling import auto_tile_size
    thw = tuple(map(int, args.tokens.split("x")))
    md = VideoSparseAttentionMetadataBuilder().build(
        0, thw, (1, 1, 1), 0.0, torch.device("cpu"), auto_tile_size(thw), cache_tile_buf=False)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(3, args.dim, *(max(2, n // 3) for n in thw), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=thw, mode="trilinear")
    noisy = (smooth + 0.3 * torch.randn(smooth.shape, generator=generator)).flatten(2)
    q, k, v = noisy.transpose(1, 2).contiguous()[:, None, :, None].unbind(0)
    q = 4 * q                       # else attention is spread and every list is long
    scale, tiles = args.dim ** -0.5, len(md.variable_block_sizes)
    most = max(1.0, (1 - args.sparsity) * tiles)
    sources = {"means": lambda: pooled_masses(q, k, md, scale), "exact": lambda: tile_masses(q, k, md, scale),
               "exact_every_8th": lambda: tile_masses(q, k, md, scale, every=8)}
    exact, _ = tile_masses(q, k, md, scale)
    impl, row = VideoSparseAttentionImpl(1, args.dim, backend="reference"), {}
    for name, masses in sources.items():
        found = masses()
        lists = partial(keep_mass, target=args.target, most=most, layout=md)
        impl.kept = kept = lists(found[0].clone(), found[1])
        row[name] = {
            "mass_seconds": round(statistics.median(seconds(masses, args.repeats)), 4),
            "list_seconds": round(statistics.median(seconds(partial(lists, found[0].clone(), found[1]), 1)), 4),
            "attention_seconds": round(statistics.median(seconds(lambda: impl.attend(q, k, v, md), args.repeats)), 3),
            "held": round((exact * kept.mask(exact.device)).sum(-1).mean().item(), 4),
            "read": round(kept.mean / tiles, 4)}
    print(json.dumps({"tokens": md.total_seq_length, "tiles": tiles, "target": args.target, **row,
                      "torch": torch.__version__, "threads": torch.get_num_threads(),
                      "machine": platform.processor() or platform.machine()}))


if __name__ == "__main__":
    main()
