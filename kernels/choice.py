"""Which kernel runs a call: what its data say, then what it has proven on this card. Then `contest`."""
from __future__ import annotations

from collections.abc import Callable, Sequence

from .proofs import PROVE_COMMAND, Proofs, words
from .spec import Call, KernelSpec, NoKernel

AUTO = "auto"


def refusal(spec: KernelSpec, call: Call, proofs: Proofs, auto: bool) -> str | None:
    """Why `spec` is not taken for `call`, as far as is known without running anything, or None."""
    if reason := spec.refusal(call, auto):
        return reason
    if not spec.files:
        return None
    proof = proofs.known(spec, call)
    if proof is not None:
        return None if proof.passed else f"on this {call.card} it {words(proof)}"
    if auto and spec.proven_apart and call.device is not None:
        return (f"not proven on this {call.card} yet: run `{PROVE_COMMAND}` in this pack's folder once (it takes a "
                "process of its own, which a fault would end)")
    return None


def choose(table: Sequence[KernelSpec], call: Call, proofs: Proofs, backend: str = AUTO,
           exclude: dict[str, str] | None = None, announce: Callable[[str], object] | None = None) -> KernelSpec:
    """The first kernel of `table` that is right for `call`, or the one that `backend` names; proven now if need be.

    exclude: kernels not to take, with the reason (one that failed earlier in this run).
    Raises NoKernel with every reason when none can run, torch.OutOfMemoryError where there is no room for a proof.
    """
    reasons = {}
    for spec in table:
        if backend not in (AUTO, spec.name):
            continue
        reason = (exclude or {}).get(spec.name) or refusal(spec, call, proofs, auto=backend == AUTO)
        if reason is None and spec.files and call.device is not None:
            proof = proofs.prove(spec, call, announce)
            reason = None if proof.passed else f"on this {call.card} it {words(proof)}"
        if reason is None:
            return spec
        reasons[spec.name] = reason
    raise NoKernel(reasons)
