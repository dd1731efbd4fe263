"""Which kernels have been proven on which card: asked in this process, then on disk, then of the kernel itself."""
from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from . import guarded, problems, proof, tile_problems
from .machine import machine_of
from .proof import Proof, run_proof
from .proof_store import ProofStore
from .spec import Call, KernelSpec, KernelUnusable, fingerprint

log = logging.getLogger(__name__)

PROOF_FILES = tuple(Path(module.__file__) for module in (guarded, problems, proof, tile_problems))
PROVE_COMMAND = "python -m kernels.prove"
"""Run in the pack's folder: proves every kernel of the machine in a process of its own."""

SECONDS_BETWEEN_LOOKS = 5.0
"""An attention call asks what is known; the disk is asked this often, so that a proof made meanwhile is found."""


def facts_of(spec: KernelSpec, call: Call) -> dict[str, str]:
    """Everything that a proof of `spec` for such calls depends on."""
    return {"kernel": spec.name, "files": fingerprint(spec.files), "problems": fingerprint(PROOF_FILES),
            "dtype": str(call.dtype).removeprefix("torch."), "head_dim": str(call.head_dim),
            **machine_of(call.device)._asdict()}


class Proofs:
    """The proofs of this process. Safe to use from several threads."""

    def __init__(self, store: ProofStore | None = None):
        self.store = store or ProofStore()
        self._known: dict[tuple, Proof] = {}
        self._look_again: dict[tuple, float] = {}
        self._lock = threading.RLock()

    def known(self, spec: KernelSpec, call: Call) -> Proof | None:
        """The proof of `spec` for such calls, where there is one already; runs nothing."""
        key = _key(spec, call)
        found = self._known.get(key)
        if found is None and call.device is not None and time.monotonic() >= self._look_again.get(key, 0.0):
            found = self.store.read(facts_of(spec, call))
            if found is None:
                self._look_again[key] = time.monotonic() + SECONDS_BETWEEN_LOOKS
            else:
                self._known[key] = found
        return found

    def prove(self, spec: KernelSpec, call: Call, announce: Callable[[str], object] | None = None) -> Proof:
        """The proof of `spec` for such calls, made now where there is none.

        announce: told a sentence before that takes time. Raises torch.OutOfMemoryError, which is no verdict, and
        KernelUnusable while a CUDA graph is recorded.
        """
        found = self._known.get(_key(spec, call))
        if found is not None:
            return found
        if call.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise KernelUnusable("it cannot be proven while a CUDA graph is recorded: run once before")
        with self._lock:
            found = self._known.get(_key(spec, call))
            if found is None:
                facts = facts_of(spec, call)
                with self.store.locked(facts):
                    found = self.store.read(facts) or self._made(spec, call, announce)
                    if found.lasting:
                        self.store.write(facts, found)
                self._known[_key(spec, call)] = found
        for remark in self.store.remarks:
            log.warning("%s", remark)
        return found

    def _made(self, spec: KernelSpec, call: Call, announce) -> Proof:
        where = f"{spec.name} on this {call.card}"
        if announce is not None:
            announce(f"proving {where} for {call.words}" + (", in a process of its own" if spec.proven_apart else ""))
        if spec.proven_apart:
            from .prove import prove_apart
            found = prove_apart(spec, call)
        else:
            found = run_proof(spec, call, call.device)
        if found.passed:
            log.info("%s: %s", where, words(found))
        else:
            log.warning("%s for %s is not used: %s", where, call.words, found.reason)
        return found

    def record(self, spec: KernelSpec, call: Call, found: Proof) -> None:
        """Take a proof that was made elsewhere, in place of an older one, and keep it if it lasts."""
        with self._lock:
            self._known[_key(spec, call)] = found
            if found.lasting:
                facts = facts_of(spec, call)
                with self.store.locked(facts):
                    self.store.write(facts, found)


def words(found: Proof) -> str:
    """A proof in a user's words, the card left to the caller."""
    if found.passed:
        return f"proven ({found.cases} problems, worst error {found.worst:.1e})"
    return f"failed its proof ({found.reason})"


def _key(spec: KernelSpec, call: Call) -> tuple:
    return spec.name, spec.files, call


PROOFS = Proofs()
