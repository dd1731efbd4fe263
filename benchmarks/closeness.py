"""What measuring the closeness to exact attention costs beside sparse attention, on a CPU.

    python benchmarks/closeness.py [--tokens 21x30x52] [--heads 12] [--computed 1] [--sparsity 0.9] [--repeats 3]

Times one sparse call and the tiles that a measured call takes, and sets them against each other at the rate of a run
of 1500 such calls. Only some heads are computed: the time of a sparse call is proportional to them.
"""
import argparse
import json
import platform
import statistics

import torch
from reference_vs_sdpa import load_pack, seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="21x30x52")
    parser.add_argument("--heads", type=int, default=12, help="of the model")
    parser.add_argument("--computed", type=int, default=1, help="heads that are computed")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    load_pack()
    from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder
    from pack.vsa_core.closeness import Launch, Place, closeness_of, sampling_rate
    from pack.vsa_core.tiling import auto_tile_size
    thw = tuple(map(int, args.tokens.split("x")))
    md = VideoSparseAttentionMetadataBuilder().build(
        0, thw, (1, 1, 1), args.sparsity, torch.device("cpu"), auto_tile_size(thw), cache_tile_buf=False)
    q, k, v = torch.randn(3, 1, md.total_seq_length, args.computed, args.dim,
                          generator=torch.Generator().manual_seed(0))
    impl, launches = VideoSparseAttentionImpl(args.computed, args.dim, backend="reference"), []
    impl.on_lists = lambda heads, indices, counts, _: launches.append(Launch(heads, indices, counts))
    out = impl.attend(q, k, v, md)
    impl.on_lists = None
    tiles, every = sampling_rate(md.total_seq_length, args.heads, 1500)
    places = [Place(0, i % args.computed, 17 * i) for i in range(tiles)]
    sparse = statistics.median(seconds(lambda: impl.attend(q, k, v, md), args.repeats)) * args.heads / args.computed
    measure = statistics.median(seconds(
        lambda: closeness_of(q, k, v, out, places, launches[:1], md, args.dim ** -0.5), args.repeats))
    print(json.dumps({
        "tokens": md.total_seq_length, "heads": args.heads, "sparsity": args.sparsity, "tiles": tiles,
        "one_call_in": every, "sparse_call_seconds": round(sparse, 3), "measure_seconds": round(measure, 4),
        "share_of_attention": round(measure / (every * sparse), 6), "torch": torch.__version__,
        "threads": torch.get_num_threads(), "machine": platform.processor() or platform.machine()}))


if __name__ == "__main__":
    main()
