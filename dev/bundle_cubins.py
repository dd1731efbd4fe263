"""Build every variant of the CUDA kernel and put it where the pack looks first, so that a user compiles nothing.

    python dev/bundle_cubins.py [--out FOLDER]

Needs NVRTC of CUDA 12 and no GPU. Files of an older source are removed. A test rebuilds them and compares, where it
finds the same NVRTC.
"""
import argparse
from pathlib import Path

from load_pack import load_pack


def main(arguments=None):
    load_pack()
    from pack.kernels.cuda_sm90 import SPEC, loader
    from pack.kernels.cuda_sm90.cache import Cache
    from pack.kernels.cuda_sm90.nvrtc import Nvrtc

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=loader.BUNDLED)
    folder = parser.parse_args(arguments).out
    nvrtc, shelf, kept = Nvrtc(majors=loader.BUNDLED_BY), Cache(folder), set()
    for head_dim in SPEC.head_dims:
        for dtype in (str(dtype).removeprefix("torch.") for dtype in SPEC.dtypes):
            name = loader.key(head_dim, dtype)
            cubin, _ = nvrtc.compile(loader.source(), loader.SOURCE.name, loader.options(head_dim, dtype))
            if problem := shelf.write(name, cubin):
                raise SystemExit(problem)
            kept.add(name)
            print(f"{name}: {len(cubin):,} bytes")
    for path in folder.glob("*.cubin"):
        if path.name not in kept:
            path.unlink()
    (folder / "NVRTC").write_text(nvrtc.version() + "\n")


if __name__ == "__main__":
    main()
