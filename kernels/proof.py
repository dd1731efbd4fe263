"""A kernel's proof on a card: every problem of its set three times, right each time and the same bits."""
from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .machine import multiprocessors_of
from .problems import ATTENTION_PROBLEMS
from .spec import Call, KernelSpec, KernelUnusable
from .tile_problems import MEANS_PROBLEMS, SELECTION_PROBLEMS

SETS = {"attention": ATTENTION_PROBLEMS, "tile means": MEANS_PROBLEMS, "tile selection": SELECTION_PROBLEMS}
RUNS = 3


@dataclass(frozen=True)
class Proof:
    """What a kernel has shown on a card for one dtype and head_dim."""

    passed: bool
    cases: int
    """Problems solved."""
    worst: float
    """Largest error of any of them: relative L2 of a block of queries for attention."""
    seconds: float
    date: str
    reason: str = ""
    """What went wrong; empty when all is well."""
    lasting: bool = True
    """Whether it would come out the same another time; what is not is not kept."""


def run_proof(spec: KernelSpec, call: Call, device: torch.device) -> Proof:
    """Give `spec` its problems on `device`. Never raises, except torch.OutOfMemoryError, which is no verdict."""
    start, solved, worst = time.perf_counter(), 0, 0.0

    def proof(reason: str = "", lasting: bool = True) -> Proof:
        today = datetime.date.today().isoformat()
        return Proof(not reason, solved, worst, round(time.perf_counter() - start, 3), today, reason, lasting)

    try:
        run = spec.load()
        for problem in SETS[spec.proves]:
            prepared = problem.prepare(spec, call, device, multiprocessors_of(device))
            error, sentence = _solve(prepared, run)
            worst = max(worst, error)
            if sentence:
                return proof(f"{problem.shows}: {sentence}")
            solved += 1
    except torch.OutOfMemoryError:
        raise
    except KernelUnusable as error:
        return proof(str(error), lasting=False)
    except Exception as error:
        return proof(_first_line(error) or type(error).__name__, lasting=False)
    return proof()


def _solve(prepared, run: Callable) -> tuple[float, str | None]:
    worst, first = 0.0, None
    for _ in range(RUNS):
        found, misdeed = prepared.attempt(run)
        if misdeed:
            return worst, misdeed
        error, sentence = prepared.error(found)
        worst = max(worst, error)
        if sentence:
            return worst, sentence
        if first is None:
            first = found
        elif not all(_equal_bits(a, b) for a, b in zip(first, found, strict=True)):
            return worst, "not the same bits every time"
    return worst, None


def _equal_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")[:300]
