"""Turn a sparse-trained Wan model, such as FastWan or TurboWan, into one file that ComfyUI reads.

    python -m checkpoints.convert FastWan2.1-T2V-1.3B-Diffusers fastwan2.1_t2v_1.3B_vsa.safetensors

Run it in the folder of this pack. FOLDER is a diffusers pipeline, its transformer folder, a safetensors file, or a
PyTorch file (.pth): that one needs ComfyUI's Python, everything else nothing but Python. No weight is changed, only
the names are, but that int8 weights of TurboDiffusion (-quant) become the bf16 weights that they stand for. Gates and
SLA projections stay beside the weights, and what is known of the training goes into the metadata, where Load Sparse
Diffusion Model reads it. The SHA-256 of the file is printed and kept beside it in FILE.sha256, as sha256sum -c reads
it.
"""
from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from .describe import describe
from .gate_names import GATE
from .plan import Plan, plan_of
from .projection_names import NATIVE_NAME
from .safetensors_file import CheckpointError
from .torch_source import bytes_of, open_for_conversion
from .trained import CHOICES, METADATA_KEY

CHUNK = 16 << 20


def native_header(plan: Plan) -> tuple[bytes, list[tuple[str, str]]]:
    """(header bytes with its length in front, [(name in the source, name in the new file)] in the order of the data).

    Order: as the tensors lie in the source, so that every source file is read once from start to end.
    """
    targets = {**plan.names, **{name: GATE.sub(_native_gate, name) for parts in plan.gates.values()
                                for name in parts.values()},
               **{name: NATIVE_NAME.format(layer=layer, part=part) for layer, parts in plan.projections.items()
                  for part, name in parts.items()}}
    files = {file: place for place, file in enumerate(plan.checkpoint.files)}
    tensors = plan.checkpoint.tensors
    order = sorted(targets, key=lambda name: (files[tensors[name].file], tensors[name].info.start))
    metadata = {"format": "pt", **plan.metadata}
    if plan.trained is not None:
        metadata[METADATA_KEY] = plan.trained.to_json()
    entries, offset = {"__metadata__": metadata}, 0
    for name in order:
        info = tensors[name].info
        size = info.end - info.start
        entries[targets[name]] = {"dtype": info.dtype, "shape": list(plan.shape_of(name)),
                                  "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, [(name, targets[name]) for name in order]


def _native_gate(match) -> str:
    attention = ".attn" if ".attn.to_gate" in match.group(0) else ""
    return f"blocks.{match['layer']}{attention}.to_gate_compress.{match['part']}"


def convert(source: Path, target: Path, force: bool = False, progress=lambda done, total: None,
            trained_as: str | None = None) -> str:
    """Write `target` from the checkpoint at `source`; returns its SHA-256 in hex.

    `target` appears complete or not at all: everything is written beside it under a temporary name first.
    progress(bytes done, bytes in all) is called after every chunk. trained_as: as for `Plan.told_as`.
    Raises CheckpointError for a source that is no whole Wan model, FileExistsError when `target` exists and `force`
    is not set.
    """
    plan, target = _plan(source, trained_as), Path(target)
    if not plan.layers:
        raise CheckpointError(f"{source}: found a model that is neither Wan nor MiniMax H3")
    if target.suffix.lower() != ".safetensors":
        raise CheckpointError(f"{target}: wanted a name that ends in .safetensors")
    _refuse_existing(target, force)
    header, order = native_header(plan)
    total = len(header) + sum(place.info.end - place.info.start for place in plan.checkpoint.tensors.values())
    handle, part = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as out:
            digest = _stream(plan, header, order, out, lambda done: progress(done, total))
            out.flush()
            os.fsync(out.fileno())
        _refuse_existing(target, force)
        os.chmod(part, 0o666 & ~_umask())
        os.replace(part, target)
    except BaseException:
        os.unlink(part)
        raise
    target.with_name(target.name + ".sha256").write_text(f"{digest}  {target.name}\n", encoding="utf-8")
    return digest


def _plan(source: Path, trained_as: str | None) -> Plan:
    plan = plan_of(open_for_conversion(source))
    return plan if trained_as is None else plan.told_as(trained_as)


def _refuse_existing(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists: give another name, or --force to replace it")


def _stream(plan: Plan, header: bytes, order: list[tuple[str, str]], out, report) -> str:
    digest, done, source, opened = hashlib.sha256(header), out.write(header), None, None
    try:
        for name, _ in order:
            place = plan.checkpoint.tensors[name]
            if place.read is not None:
                data = bytes_of(place.read())
                for first in range(0, len(data), CHUNK):
                    digest.update(data[first:first + CHUNK])
                    done += out.write(data[first:first + CHUNK])
                    report(done)
                continue
            if place.file != opened:
                if source is not None:
                    source.close()
                source, opened = open(place.file, "rb"), place.file
            source.seek(place.info.start)
            left = place.info.end - place.info.start
            while left:
                chunk = source.read(min(CHUNK, left))
                if not chunk:
                    raise CheckpointError(f"{place.file} ended while it was read: {left} bytes of {name} are missing")
                digest.update(chunk)
                done += out.write(chunk)
                left -= len(chunk)
                report(done)
    finally:
        if source is not None:
            source.close()
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Progress:
    """A bar on a terminal, a line every ten seconds elsewhere."""

    def __init__(self, stream=sys.stderr):
        self.stream, self.started, self.shown = stream, time.monotonic(), 0.0

    def __call__(self, done: int, total: int) -> None:
        now, terminal = time.monotonic(), self.stream.isatty()
        if done < total and now - self.shown < (0.2 if terminal else 10):
            return
        self.shown = now
        share, speed = done / total, done / max(now - self.started, 1e-9) / 1e6
        bar = f"[{'#' * int(30 * share):30}] " if terminal else ""
        self.stream.write(f"{chr(13) if terminal else ''}{bar}{share:4.0%}  {done / 1e9:.2f} of {total / 1e9:.2f} GB  "
                          f"{speed:.0f} MB/s{'' if terminal and done < total else chr(10)}")
        self.stream.flush()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m checkpoints.convert", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="FOLDER", help="diffusers folder, safetensors file or .pth")
    parser.add_argument("target", type=Path, metavar="FILE", nargs="?", help="new file, ending in .safetensors")
    parser.add_argument("--force", action="store_true", help="replace FILE when it exists")
    parser.add_argument("--trained-as", choices=CHOICES, help="what FOLDER is, where nothing in it tells")
    parser.add_argument("--describe", action="store_true", help="say what FOLDER holds and write nothing")
    args = parser.parse_args(arguments)
    if args.target is None and not args.describe:
        parser.error("FILE is missing (or use --describe)")
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        print(describe(_plan(args.source, args.trained_as)))
        if args.describe:
            return 0
        digest = convert(args.source, args.target, args.force, Progress(), args.trained_as)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.target}: {args.target.stat().st_size} bytes, sha256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
