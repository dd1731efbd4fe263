"""In which transformer block of a model every sparse call was really made, seen from its modules."""
from contextlib import contextmanager

import torch


def blocks_of(net):
    """The transformer blocks that hold the clip's self-attention, in the order in which they run."""
    for names in (("double_blocks", "single_blocks"), ("visual_transformer_blocks",), ("transformer_blocks",),
                  ("blocks",)):
        if hasattr(net, names[0]):
            found = [getattr(net, name) for name in names]
            return [block for blocks in found
                    for block in (blocks.values() if isinstance(blocks, torch.nn.ModuleDict) else blocks)]


class Witness:
    """A method that also notes in which transformer block of the model every call was made."""

    def __init__(self, method, net):
        self.method = method
        self.running, self.seen, self.handles = None, [], []
        for i, block in enumerate(blocks_of(net)):
            for module in block.modules():
                self.handles.append(module.register_forward_pre_hook(self.enter(i)))

    def enter(self, i):
        def hook(*_):
            self.running = i
        return hook

    def __getattr__(self, name):
        return getattr(self.method, name)

    def attend(self, plan, q, k, v, call):
        self.seen.append((call.layer, self.running))
        return self.method.attend(plan, q, k, v, call)


@contextmanager
def witnessed(patched):
    """Lists (layer that the method was told, block that was running) of the sparse calls of a patched model."""
    from pack.nodes.hook.hook import SparseAttentionHook
    hook = SparseAttentionHook.of(patched)[0]
    hook.calls.method = witness = Witness(hook.method, patched.model.diffusion_model)
    try:
        yield witness.seen
    finally:
        hook.calls.method = witness.method
        for handle in witness.handles:
            handle.remove()
