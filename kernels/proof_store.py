"""Proofs on disk, one small JSON each, so that a card proves a kernel once. Nothing else is read from these files."""
from __future__ import annotations

import hashlib
import json
import math
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from .proof import Proof
from .user_cache import user_cache_folder, write_whole

LARGEST_FILE = 16384
LOCK_SECONDS = 180
"""How long a process waits for another one that proves the same kernel."""


class ProofStore:
    """A folder of proofs. Every fault of it costs a new proof and a sentence in `remarks`, never an error."""

    def __init__(self, folder: Path | None = None):
        """folder None: "proofs" in the user's cache folder of this pack."""
        self._folder = folder
        self.remarks: dict[str, None] = {}

    @property
    def folder(self) -> Path:
        return self._folder or user_cache_folder("proofs")

    def read(self, facts: dict[str, str]) -> Proof | None:
        """The proof for exactly these facts, or None."""
        try:
            path = self._path(facts)
            with path.open("rb") as file:
                content = file.read(LARGEST_FILE + 1)
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError) as error:
            return self._remark(f"kept proofs cannot be read: {error}")
        try:
            if len(content) > LARGEST_FILE:
                raise ValueError("too large")
            stored = json.loads(content)
            if not isinstance(stored, dict) or stored.get("facts") != facts:
                raise ValueError("it is about something else")
            return _as_proof(stored["proof"])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            return self._remark(f"the kept proof {path} is not one ({error}): the kernel is proven again")

    def write(self, facts: dict[str, str], proof: Proof) -> None:
        """Keep a proof, all of it or nothing."""
        stored = {"facts": facts, "proof": asdict(proof)}
        try:
            problem = write_whole(self._path(facts), (json.dumps(stored, indent=1) + "\n").encode())
        except RuntimeError as error:
            problem = f"not kept on disk: {error}"
        if problem:
            self._remark(f"proof of {facts.get('kernel')} {problem}")

    @contextmanager
    def locked(self, facts: dict[str, str]):
        """One process at a time proves the same thing; where no lock can be had, each proves for itself."""
        lock = None
        try:
            from filelock import FileLock, Timeout
            path = self._path(facts).with_suffix(".lock")
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(str(path))
            try:
                lock.acquire(timeout=LOCK_SECONDS)
            except Timeout:
                lock = None
                self._remark(f"another process has held {path} for {LOCK_SECONDS} s: not waiting any longer")
        except (ImportError, OSError, RuntimeError, NotImplementedError) as error:
            lock = None
            self._remark(f"kept proofs cannot be locked: {error}")
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def _path(self, facts: dict[str, str]) -> Path:
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{facts.get('kernel', 'kernel')}-{digest[:24]}.json"

    def _remark(self, text: str) -> None:
        self.remarks[text] = None


def _as_proof(stored: dict) -> Proof:
    """Raises TypeError, KeyError or ValueError for anything that `Proof` does not hold."""
    kinds = {"passed": bool, "cases": int, "worst": (int, float), "seconds": (int, float), "date": str, "reason": str,
             "lasting": bool}
    values = {field.name: stored[field.name] for field in fields(Proof)}
    for name, kind in kinds.items():
        if not isinstance(values[name], kind) or (kind is int and isinstance(values[name], bool)):
            raise ValueError(f"{name} is {values[name]!r}")
    if values["passed"] and (values["reason"] or values["cases"] < 1 or not math.isfinite(values["worst"])):
        raise ValueError("it contradicts itself")
    return Proof(**values)
