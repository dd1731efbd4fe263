"""Run the self-test of every kernel on the first GPU: what `make gpu` puts under compute-sanitizer.

Exits 1 when a kernel that this GPU could run fails, and when there is no GPU.
"""
import torch

from load_pack import load_pack


def main():
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device")
    load_pack()
    from pack.kernels import KERNELS, Call, KernelUnusable, reference, self_test
    device, failed = torch.device("cuda", 0), False
    for spec in KERNELS:
        for dtype in (torch.bfloat16, torch.float16):
            for head_dim in (64, 128):
                call = Call.on(device, dtype, head_dim)
                reason = spec.refusal(call)
                if spec.source is None or reason:
                    print(f"{spec.name}: {reason or 'is what the others are compared with'}")
                    continue
                try:
                    self_test.ready(spec, call, device, reference.run)
                    print(f"{spec.name}: {dtype} head_dim {head_dim} agrees with the reference")
                except KernelUnusable as error:
                    failed = True
                    print(error)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
