"""The ops of this package only run forward: whoever asks them for a gradient is told so, with what to do."""
from __future__ import annotations

from typing import NoReturn


def refuse_backward(op, name: str) -> None:
    """From now on a backward pass through `op`, one of torch.library.custom_op, raises RuntimeError: found, wanted."""
    def backward(context, *gradients) -> NoReturn:
        raise RuntimeError(f"{name} has no backward pass: found operands that require a gradient. It is for sampling: "
                           "run it under torch.no_grad(), or train with dense attention (torch's "
                           "scaled_dot_product_attention)")

    op.register_autograd(backward)
