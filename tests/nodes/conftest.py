"""Tiny models of a real ComfyUI, loaded once, and the node applied to them."""
from pathlib import Path

import pytest
import safetensors.torch
import torch

import make_checkpoints


@pytest.fixture(scope="session")
def load_tiny(tiny):
    """load_tiny("tiny_wan_t2v") -> ModelPatcher; the same object for the same name. bare_...: see dev/bare_models."""
    from bare_models import make_bare
    from make_tiny import Unavailable
    from sampling import load
    loaded = {}

    def model(name):
        if name not in loaded:
            try:
                loaded[name] = make_bare(name) if name.startswith("bare_") else load(tiny(name))
            except Unavailable as error:
                pytest.skip(str(error))
        return loaded[name]
    return model


@pytest.fixture(autouse=True)
def known_to_this_comfyui(request):
    """Skips a case whose condition this ComfyUI does not know yet."""
    case = getattr(request.node, "callspec", None) and request.node.callspec.params.get("case")
    if needs := getattr(case, "needs", ""):
        text = Path(request.getfixturevalue("comfyui"), "comfy", "model_base.py").read_text()
        if needs not in text:
            pytest.skip(f"this ComfyUI knows no {needs}")


@pytest.fixture
def wan(load_tiny):
    return load_tiny("tiny_wan_t2v")


@pytest.fixture
def vsa(comfyui):
    """vsa(model, sparsity=..., ...) -> the clone that the node returns; tiny clips run sparse, however slow that is."""
    from pack.nodes.methods.video_sparse_attention import VideoSparseAttentionPatch

    def patch(model, sparsity=0.5, **widgets):
        widgets = {"min_tokens": 0, "start_percent": 0.0, "backend": "reference", **widgets}
        return VideoSparseAttentionPatch.execute(model, sparsity, **widgets)[0]
    return patch


@pytest.fixture
def sta(comfyui):
    """sta(model, window, ...) -> the clone that the node returns; tiny clips run sparse, however slow that is."""
    from pack.nodes.methods.sliding_tile_attention import SlidingTileAttentionPatch

    def patch(model, window="1x1x1", **widgets):
        widgets = {"min_tokens": 0, "start_percent": 0.0, "backend": "reference", **widgets}
        return SlidingTileAttentionPatch.execute(model, window, **widgets)[0]
    return patch


@pytest.fixture
def sla(comfyui):
    """sla(model, ratio, ...) -> the clone that the node returns; tiny clips run sparse, however slow that is."""
    from pack.nodes.methods.sparse_linear_attention import SparseLinearAttentionPatch

    def patch(model, ratio=0.3, **widgets):
        widgets = {"min_tokens": 0, "start_percent": 0.0, "backend": "reference", **widgets}
        return SparseLinearAttentionPatch.execute(model, ratio, **widgets)[0]
    return patch


@pytest.fixture
def vmoba(comfyui):
    """vmoba(model, ...) -> the clone that the node returns; tiny clips run sparse, however slow that is."""
    from pack.nodes.methods.video_mixture_of_block_attention import VideoMixtureOfBlockAttentionPatch

    def patch(model, **widgets):
        widgets = {"min_tokens": 0, "start_percent": 0.0, "backend": "reference", **widgets}
        return VideoMixtureOfBlockAttentionPatch.execute(model, **widgets)[0]
    return patch


# The fixture that patches a model with the method: settings that keep every pair, settings that drop most.
METHODS = {
    "vsa": ({"sparsity": 0.0}, {"sparsity": 0.9}),
    "sta": ({"window": "1.0x1.0x1.0"}, {"window": "1x1x1"}),
    "sla": ({"ratio": 1.0}, {"ratio": 0.1}),
    "vmoba": ({"threshold": 1.0}, {"threshold": 0.0, "temporal_chunk": 1}),
}


@pytest.fixture(params=METHODS)
def method(request):
    """(patch a model so that every pair is kept, patch it so that most are dropped), both with further widgets."""
    patch, (full, sparse) = request.getfixturevalue(request.param), METHODS[request.param]
    return (lambda model, **widgets: patch(model, **full, **widgets),
            lambda model, **widgets: patch(model, **sparse, **widgets))


@pytest.fixture
def run_of(comfyui):
    """run_of(patched model) -> what its last sampling did."""
    from pack.nodes.hook.hook import SparseAttentionHook
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


@pytest.fixture(scope="session")
def gate_file(tiny):
    """A file with the weights of tiny_wan_t2v and VSA gates."""
    return tiny("tiny_wan_vsa")


@pytest.fixture(scope="session")
def state(gate_file):
    return safetensors.torch.load_file(gate_file)


@pytest.fixture(scope="session")
def sla_state(state):
    """The weights of tiny_wan_t2v and random SLA projections, under TurboDiffusion's names."""
    from make_sla_checkpoints import with_projections
    return with_projections(state)


@pytest.fixture
def write_sla(sla_state, tmp_path):
    """write_sla(kind) -> the path to load."""
    from make_sla_checkpoints import write_sla
    return lambda kind, changed=None: write_sla(kind, changed or sla_state, tmp_path)


@pytest.fixture
def write(state, tmp_path):
    return lambda kind, changed=None: make_checkpoints.write(kind, changed or state, tmp_path)


@pytest.fixture
def load(comfyui):
    """load(path, weight_dtype) -> (model, description), as the node loads it: ComfyUI executes in inference mode."""
    from pack.nodes.trained.load_sparse_diffusion_model import WEIGHT_DTYPES
    from pack.nodes.trained.sparse_model import load_sparse_model
    return torch.inference_mode()(lambda path, dtype="default": load_sparse_model(path, dict(WEIGHT_DTYPES[dtype])))


@pytest.fixture
def with_gates(comfyui):
    """with_gates(model, path) -> a clone with the gates of that file."""
    from pack.nodes.trained.gate_files import with_gates
    return with_gates


@pytest.fixture
def gated(wan, gate_file, with_gates):
    return with_gates(wan, gate_file)


@pytest.fixture
def own_proofs(comfyui, tmp_path, monkeypatch):
    from pack import kernels
    from pack.kernels import prove, tile_ops
    from pack.kernels.proof_store import ProofStore
    from pack.kernels.proofs import Proofs
    for module in (kernels, prove, tile_ops):
        monkeypatch.setattr(module, "PROOFS", Proofs(ProofStore(tmp_path / "proofs")))


@pytest.fixture
def fakes(kernel_table):
    """fakes(run, ...) puts these kernels first in the table, with head_dim 128 as the tiny models have."""
    import fake_kernels
    from pack.kernels import reference

    def put(*runs, **fields):
        specs = [fake_kernels.spec_of(run, f"fake{i}", **fields) for i, run in enumerate(runs)]
        kernel_table(*specs, reference.SPEC)
    return put
