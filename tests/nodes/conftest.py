"""Tiny models of a real ComfyUI, loaded once, and the node applied to them."""
import pytest


@pytest.fixture(scope="session")
def load_tiny(tiny):
    """load_tiny("tiny_wan_t2v") -> ModelPatcher; the same object for the same name."""
    from sampling import load
    loaded = {}

    def model(name):
        if name not in loaded:
            loaded[name] = load(tiny(name))
        return loaded[name]
    return model


@pytest.fixture
def wan(load_tiny):
    return load_tiny("tiny_wan_t2v")


@pytest.fixture
def vsa(comfyui):
    """vsa(model, sparsity=..., ...) -> the clone that the node returns; tiny clips are not too small for it."""
    from pack.nodes.video_sparse_attention import VideoSparseAttentionPatch

    def patch(model, sparsity=0.5, **widgets):
        widgets = {"min_tokens": 0, "start_percent": 0.0, **widgets}
        return VideoSparseAttentionPatch.execute(model, sparsity, **widgets)[0]
    return patch


@pytest.fixture
def run_of(comfyui):
    """run_of(patched model) -> what its last sampling did."""
    from pack.nodes.hook import SparseAttentionHook
    return lambda model: SparseAttentionHook.of(model)[-1].last_run


@pytest.fixture
def draw(comfyui):
    """draw(model, (t, h, w), ...) -> the sampled latent."""
    from sampling import kind_of, sample
    return lambda model, thw=(5, 10, 12), **knobs: sample(model, kind_of(model), latent_thw=thw, **knobs)


@pytest.fixture
def kernel_table(comfyui, monkeypatch):
    """kernel_table(spec, ...) puts another table of kernels in place for one test."""
    from pack import kernels
    return lambda *specs: monkeypatch.setattr(kernels, "KERNELS", specs)
