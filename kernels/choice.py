"""Which kernel runs a call: what its data say, then what it has proven on this card. Then `contest`."""
from __future__ import annotations

from collections.abc import Callable, Sequence

from .proofs import PROVE_COMMAND, Proofs, words
from .spec import Call, KernelSpec, NoKernel

AUTO = "auto"


def refusal(spec: KernelSpec, call: Call, proofs: Proofs, auto: bool, rounds: bool = False) -> str | None:
    """Why `spec` is not taken for `call`, as far as is known without running anything, or None.

    rounds: whether `auto` may take a kernel that is not exact.
    """
    if reason := spec.refusal(call, auto):
        return reason
    if auto and not spec.exact and not rounds:
        return "it rounds scores to 8 bits: set precision to int8 scores to have it"
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
           exclude: dict[str, str] | None = None, announce: Callable[[str], object] | None = None,
           rounds: bool = False) -> KernelSpec:
    """The first kernel of `table` that is right for `call`, or the one that `backend` names; proven now if need be.

    exclude: kernels not to take, with the reason (one that failed earlier in this run).
    rounds: whether "auto" takes kernels that are not exact, and before those that are.
    Raises NoKernel with every reason when none can run, torch.OutOfMemoryError where there is no room for a proof.
    """
    reasons = {}
    for spec in sorted(table, key=lambda spec: spec.exact) if rounds else table:
        if backend not in (AUTO, spec.name) or backend == AUTO and not (spec.exact or rounds):
            continue
        reason = (exclude or {}).get(spec.name) or refusal(spec, call, proofs, backend == AUTO, rounds)
        if reason is None and spec.files and call.device is not None:
            proof = proofs.prove(spec, call, announce)
            reason = None if proof.passed else f"on this {call.card} it {words(proof)}"
        if reason is None:
            return spec
        reasons[spec.name] = reason
    raise NoKernel(reasons)
