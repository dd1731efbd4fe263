"""What the packs that are used most beside this one do to a Wan model, each as a stand-in that makes a clone of it.

Written after what those packs do, not after how. Where the neighbour is a node of core, the node itself is taken.
"""
import types
from dataclasses import dataclass

import torch

OVERRIDE = "optimized_attention_override"


def sage_attention(model):
    """Selects another attention for the whole model and asks nobody who was there."""
    from comfy.ldm.modules.attention import attention_basic
    clone = model.clone()
    clone.model_options["transformer_options"][OVERRIDE] = lambda func, *args, **kwargs: (
        attention_basic.__wrapped__(*args, **kwargs))
    return clone


def patched_parts(model, part, forward):
    """A clone whose blocks' `part` runs forward(module, ...) instead of its own."""
    clone = model.clone()
    for n, block in enumerate(model.model.diffusion_model.blocks):
        clone.add_object_patch(f"diffusion_model.blocks.{n}.{part}.forward",
                               types.MethodType(forward, getattr(block, part)))
    return clone


def nag(model):
    """Guides inside of cross-attention: away from what a second prompt, attended to as well, would give."""
    def forward(self, x, context, **kwargs):
        other = torch.linspace(-1, 1, context[:1].numel()).view_as(context[:1]).expand_as(context)
        wanted, unwanted = (type(self).forward(self, x, text, **kwargs) for text in (context, other))
        guided = wanted * 3 - unwanted * 2
        return guided * (wanted.norm(p=1, dim=-1, keepdim=True) / guided.norm(p=1, dim=-1, keepdim=True)).clamp(max=1)
    return patched_parts(model, "cross_attn", forward)


def enhance_a_video(model):
    """Scales what self-attention gives by how much the frames look at each other, from queries and keys of its own."""
    def forward(self, x, freqs, **kwargs):
        q, k = self.norm_q(self.q(x)), self.norm_k(self.k(x))
        scale = 1 + torch.nn.functional.cosine_similarity(q, k, dim=-1).mean().abs()
        return type(self).forward(self, x, freqs, **kwargs) * scale
    return patched_parts(model, "self_attn", forward)


def ffn_chunks(model):
    """Runs the feed-forward part over a piece of the tokens at a time."""
    def forward(self, x):
        return torch.cat([type(self).forward(self, piece) for piece in x.chunk(3, dim=1)], dim=1)
    return patched_parts(model, "ffn", forward)


def easy_cache(model):
    from comfy_extras.nodes_easycache import EasyCacheNode
    return EasyCacheNode.execute(model, 1.0, 0.15, 0.95, False)[0]


def lazy_cache(model):
    from comfy_extras.nodes_easycache import LazyCacheNode
    return LazyCacheNode.execute(model, 1.0, 0.15, 0.95, False)[0]


def context_windows(model):
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode
    return WanContextWindowsManualNode.execute(model, 17, 8, "standard_static", 1, False, "pyramid", True)[0]


def skip_layer_guidance(model):
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiTSimple
    return SkipLayerGuidanceDiTSimple.execute(model, 0.0, 1.0, "0", "")[0]


def block_swap(model):
    """Keeps the blocks away from where they run, and fetches each for its turn: here away is float64."""
    from comfy.patcher_extension import WrappersMP

    def fetch(module, args):
        module.to(torch.float32)

    def put_away(module, args, out):
        module.to(torch.float64)

    def swapping(executor, *args, **kwargs):
        blocks = executor.class_obj.blocks.to(torch.float64)
        handles = [register(hook) for block in blocks for register, hook in (
            (block.register_forward_pre_hook, fetch), (block.register_forward_hook, put_away))]
        try:
            return executor(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            blocks.to(torch.float32)
    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "block_swap", swapping)
    return clone


def merged(model):
    """Half of this model and half of another."""
    from comfy_extras.nodes_model_merging import ModelMergeSimple
    other, key = model.clone(), "diffusion_model.blocks.0.self_attn.q.weight"
    shape = model.model.diffusion_model.blocks[0].self_attn.q.weight.shape
    other.add_patches({key: (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.2,)}, 1.0)
    return ModelMergeSimple().merge(model, other, 0.5)[0]


class LazyLinear(torch.nn.Module):
    """A linear layer whose weight is bytes until it is called, and no matrix that anyone else could use."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax() / 127
        self.weight = (linear.weight.detach() / self.scale).round().to(torch.int8).flatten()
        self.bias, self.shape = linear.bias, linear.weight.shape

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.view(self.shape) * self.scale, self.bias)


def lazy_weights(model):
    """As a GGUF loader does: quantised layers in the place of the model's, dequantised when they are called."""
    import comfy.model_management
    comfy.model_management.unload_all_models()      # which takes patches of other clones off the weights read here
    clone = model.clone()
    for n in range(len(model.model.diffusion_model.blocks)):
        for name in "qkvo":
            key = f"diffusion_model.blocks.{n}.self_attn.{name}"
            clone.add_object_patch(key, LazyLinear(clone.get_model_object(key)))
    return clone


def deep_clone(model):
    """A clone that owns a copy of the model itself, as core's work units for several GPUs make it."""
    return model.deepclone_multigpu(model.load_device)


def core_sparse(model):
    """Takes large self-attention over, hands on the rest, and puts itself on top again before every step."""
    from comfy.ldm.modules.attention import attention_basic
    from comfy.patcher_extension import CallbacksMP
    clone = model.clone()
    before = clone.model_options["transformer_options"].get(OVERRIDE)

    def override(func, q, k, v, heads, **kwargs):
        if q.shape[-2] == k.shape[-2] > 32:
            return attention_basic.__wrapped__(q, k * 0.9, v, heads, **kwargs)
        return (before or (lambda func, *args, **kwargs: func(*args, **kwargs)))(func, q, k, v, heads, **kwargs)

    def put_on_top(patcher, timestep, model_options=None, *_):
        if model_options is not None:
            model_options.setdefault("transformer_options", {})[OVERRIDE] = override
    clone.model_options["transformer_options"][OVERRIDE] = override
    clone.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, "core_sparse", put_on_top)
    return clone


@dataclass(frozen=True)
class Neighbour:
    """One of them, and what is true of it."""

    name: str
    patch: object
    exact: bool = False
    """Whether it changes nothing in the result."""
    named: bool = False
    """Whether it takes the override's place when it comes last, which the notes have to say."""
    steps: int = 2
    latent: tuple = (5, 10, 12)


NEIGHBOURS = (
    Neighbour("SageAttention", sage_attention, exact=True, named=True),
    Neighbour("NAG", nag),
    Neighbour("EnhanceAVideo", enhance_a_video),
    Neighbour("FFN chunking", ffn_chunks, exact=True),
    Neighbour("EasyCache", easy_cache, steps=5),
    Neighbour("LazyCache", lazy_cache, steps=5),
    Neighbour("context windows", context_windows, latent=(9, 10, 12)),
    Neighbour("skip-layer guidance", skip_layer_guidance),
    Neighbour("block swap", block_swap, exact=True),
    Neighbour("model merging", merged),
    Neighbour("GGUF", lazy_weights),
    Neighbour("clones for several GPUs", deep_clone, exact=True),
    Neighbour("core's Model Sparse Attention", core_sparse, named=True),
)
