"""Prove every kernel on the first GPU in this very process: what `make gpu` puts under compute-sanitizer.

Exits 1 when a kernel that this GPU could run fails, and when there is no GPU.
"""
import torch

from load_pack import load_pack


def main():
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    load_pack()
    from pack.kernels.proof import run_proof
    from pack.kernels.prove import jobs_of, tables
    jobs, reasons = jobs_of(tables())
    for name, reason in reasons.items():
        print(f"{name}: {reason}")
    failed = False
    for spec, call in jobs:
        if call.device.index == 0:
            found = run_proof(spec, call, call.device)
            failed |= not found.passed
            print(f"{spec.name}, {call.words}: {found.reason or f'right, {found.cases} problems'}")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
