"""Prove every kernel of this machine, each in a process that it may end, and keep the proofs.

    python -m kernels.prove [--kernels cuda_sm90 ...] [--seconds 120]

Run it in the pack's folder, with the Python of ComfyUI; `python kernels/prove.py` works from anywhere.

Prints a table and exits with 1 when a kernel that this machine could run failed. `auto` takes what is proven; a kernel
whose faults would end the process, such as cuda_sm90, only after this.
"""
from __future__ import annotations

if __package__ in (None, ""):
    # Run as a file: its folder, which holds a package called triton, must not be where imports are looked up.
    import sys
    from pathlib import Path
    _HERE = Path(__file__).resolve().parent
    sys.path[:] = [str(_HERE.parent), *(entry for entry in sys.path if Path(entry or ".").resolve() != _HERE)]
    from kernels.prove import main
    sys.exit(main())

import argparse
import datetime
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from . import KERNELS, PROOFS, tile_ops
from .proof import Proof, run_proof
from .spec import Call, KernelSpec

SECONDS = 120
"""How long one kernel may take for one dtype and head_dim, its compilation included."""
COMMAND = (sys.executable, str(Path(__file__).resolve()), "--child")
MARK = "proof: "
"""Begins the lines in which a child tells its parent what it has found."""

Job = tuple[KernelSpec, Call]


def prove_apart(spec: KernelSpec, call: Call, command: Sequence[str] = COMMAND, seconds: float = SECONDS) -> Proof:
    """The proof of one kernel for such calls, made in a process of its own."""
    return next(found for _, found in prove_jobs([(spec, call)], command, seconds))


def prove_jobs(jobs: Sequence[Job], command: Sequence[str] = COMMAND, seconds: float = SECONDS,
               begun: Callable[[Job], object] = lambda job: None) -> Iterator[tuple[Job, Proof]]:
    """(job, proof) for every job, in order. A process that a kernel ends or hangs is followed by another one.

    command: what is run, with the jobs as JSON behind it.   seconds: for one job, and for the start of a process.
    """
    left = list(jobs)
    while left:
        child = _Child(command, left, seconds)
        try:
            while left:
                begun(left[0])
                found = child.next_proof()
                yield left.pop(0), found
                if child.ended:
                    break
        finally:
            child.stop()


class _Child:
    """A process that proves jobs, and what it says."""

    def __init__(self, command: Sequence[str], jobs: Sequence[Job], seconds: float):
        told = json.dumps([_as_json(job) for job in jobs])
        self.ended, self.seconds = False, seconds
        self._process = subprocess.Popen([*command, told], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                         stderr=subprocess.STDOUT, text=True, errors="replace")
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._last_words: list[str] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in self._process.stdout:
            self._lines.put(line.rstrip())
        self._lines.put(None)

    def next_proof(self) -> Proof:
        """What the next job has shown; a failure where the process ended or said nothing for too long."""
        start = time.monotonic()
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, start + self.seconds - time.monotonic()))
            except queue.Empty:
                self.ended = True
                return _failure(f"it was not done after {self.seconds:.0f} s and was stopped", start)
            if line is None:
                self.ended = True
                status = self._process.wait()
                words = f": {' | '.join(self._last_words)[-300:]}" if self._last_words else ""
                return _failure(f"it ended the process with status {status}{words}", start)
            if not line.startswith(MARK):
                self._last_words = [*self._last_words, *filter(None, [line.strip()])][-3:]
                continue
            told = json.loads(line.removeprefix(MARK))
            if "out_of_memory" in told:
                raise torch.OutOfMemoryError(told["out_of_memory"])
            return Proof(**told)

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def _failure(reason: str, start: float) -> Proof:
    today = datetime.date.today().isoformat()
    return Proof(False, 0, 0.0, round(time.monotonic() - start, 3), today, reason)


def _as_json(job: Job) -> dict:
    spec, call = job
    return {"kernel": spec.name, "device": str(call.device), "dtype": str(call.dtype).removeprefix("torch."),
            "head_dim": call.head_dim}


def tables() -> tuple[KernelSpec, ...]:
    """Every kernel that is proven, best first in each table."""
    return tuple(spec for spec in (*KERNELS, *tile_ops.MEANS_KERNELS, *tile_ops.SELECT_KERNELS) if spec.files)


def devices() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def jobs_of(specs: Sequence[KernelSpec]) -> tuple[list[Job], dict[str, str]]:
    """What can be proven on this machine's GPUs, and per kernel and device why something cannot."""
    jobs, reasons = [], {}
    for spec in specs:
        if not devices():
            reasons[spec.name] = "no GPU that torch can use"
        for device in devices():
            for dtype in spec.dtypes:
                for head_dim in spec.head_dims or (64, 128):
                    call = Call.on(device, dtype, head_dim)
                    if reason := spec.refusal(call):
                        reasons[f"{spec.name} on {device} ({call.card})"] = reason
                    else:
                        jobs.append((spec, call))
    return jobs, reasons


def child(told: str) -> None:
    """Prove the jobs that a parent names, and tell it of each."""
    by_name = {spec.name: spec for spec in tables()}
    for job in json.loads(told):
        device = torch.device(job["device"])
        call = Call.on(device, getattr(torch, job["dtype"]), job["head_dim"])
        try:
            found = asdict(run_proof(by_name[job["kernel"]], call, device))
        except torch.OutOfMemoryError as error:
            found = {"out_of_memory": str(error)}
        print(f"\n{MARK}{json.dumps(found)}", flush=True)


def main(arguments: Sequence[str] | None = None, command: Sequence[str] = COMMAND) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["--child"]:
        child(arguments[1])
        return 0
    parser = argparse.ArgumentParser(prog="python -m kernels.prove", description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=[spec.name for spec in tables()], help="default: all")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for one kernel, dtype and head_dim")
    options = parser.parse_args(arguments)
    jobs, reasons = jobs_of([spec for spec in tables() if not options.kernels or spec.name in options.kernels])
    for name, reason in reasons.items():
        print(f"{name}: not here, {reason}")
    failed = False
    try:
        for (spec, call), found in prove_jobs(jobs, command, options.seconds):
            PROOFS.record(spec, call, found)
            failed |= not found.passed
            verdict = f"right, {found.cases} problems, worst error {found.worst:.1e}" if found.passed else "FAILED"
            print(f"{spec.name:20} {call.card:32} {call.words:24} {verdict} ({found.seconds:.1f} s)"
                  + (f"\n    {found.reason}" if found.reason else ""), flush=True)
    except torch.OutOfMemoryError as error:
        print(f"not enough free GPU memory to go on: {error}\nClose what uses the GPU and run this again.")
        return 1
    for remark in PROOFS.store.remarks:
        print(remark)
    if jobs:
        print(f"kept in {PROOFS.store.folder}{os.sep}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
