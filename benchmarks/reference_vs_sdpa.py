"""The reference kernel on a CPU against torch's dense attention, both in this process on the same threads.

    python benchmarks/reference_vs_sdpa.py [--tokens 16x32x32] [--heads 2] [--dim 128] [--sparsity 0.9] [--repeats 7]

Times the call that the node makes: tile means, scores, selection and attention, in the order of the sequence. Checks
the result first: at sparsity 0 it must equal dense attention, or nothing is timed.
"""
import argparse
import json
import platform
import resource
import statistics
import sys
import threading
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "dev"))
from load_pack import load_pack  # noqa: E402


def resident_bytes():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()


class PeakMemory:
    """Resident memory above the start, sampled while the block runs."""

    def __enter__(self):
        self.start, self.peak, self.running = resident_bytes(), resident_bytes(), True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.peak = max(self.peak, resident_bytes())
            time.sleep(0.002)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        self.extra = self.peak - self.start


def seconds(function, repeats):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="16x32x32", type=lambda s: tuple(map(int, s.split("x"))), metavar="TxHxW")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    load_pack()
    from pack.vsa_core.backends.video_sparse_attn import (
        VideoSparseAttentionImpl,
        VideoSparseAttentionMetadataBuilder,
    )

    generator = torch.Generator().manual_seed(0)
    grid = args.tokens
    tokens = grid[0] * grid[1] * grid[2]
    q, k, v = (torch.randn(1, tokens, args.heads, args.dim, generator=generator) for _ in range(3))
    impl = VideoSparseAttentionImpl(args.heads, args.dim, backend="reference")

    def metadata(sparsity):
        return VideoSparseAttentionMetadataBuilder().build(0, grid, (1, 1, 1), sparsity, torch.device("cpu"))

    def sparse(md):
        return impl.attend(q, k, v, md)

    def dense():
        return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))

    wanted = dense().transpose(1, 2)
    error = ((sparse(metadata(0.0)) - wanted).norm() / wanted.norm()).item()
    if error > 1e-5:
        raise SystemExit(f"at sparsity 0 the result is {error:.1e} from dense, wanted at most 1e-5: not timed")

    md = metadata(args.sparsity)
    with PeakMemory() as memory:
        sparse(md)
    results = {"sparse": seconds(lambda: sparse(md), args.repeats), "dense": seconds(dense, args.repeats)}
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
          f"torch {torch.__version__}, Python {platform.python_version()}")
    print(f"grid {'x'.join(map(str, grid))} = {tokens} tokens, {args.heads} heads, D {args.dim}, float32, "
          f"sparsity {args.sparsity}: {md.topk} of {md.variable_block_sizes.numel()} tiles; "
          f"sparsity 0 is {error:.1e} from dense")
    for name, times in results.items():
        print(f"  {name:7s} median {statistics.median(times):.3f} s, {min(times):.3f} to {max(times):.3f} s "
              f"({len(times)} runs)")
    ratio = statistics.median(results["dense"]) / statistics.median(results["sparse"])
    print(f"  {ratio:.2f}x as fast as dense scaled_dot_product_attention, extra memory {memory.extra / 2**20:.0f} MiB")
    if args.json:
        Path(args.json).write_text(json.dumps(
            {"grid": grid, "heads": args.heads, "dim": args.dim, "sparsity": args.sparsity, "torch": torch.__version__,
             "threads": torch.get_num_threads(), "seconds": results, "speedup": ratio,
             "extra_bytes": memory.extra, "error_at_sparsity_0": error}, indent=1) + "\n")


if __name__ == "__main__":
    main()
