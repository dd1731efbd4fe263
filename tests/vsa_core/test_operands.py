"""Tensors of any strides, for every method alike; and the keywords that a builder takes."""
import pytest
import torch

from pack.vsa_core.backends import BACKENDS
from pack.vsa_core.backends.abstract import UPSTREAM_NAMES
from pack.vsa_core.backends.sdpa import SDPABackend
from pack.vsa_core.forward_context import set_forward_context
from pack.vsa_core.layer import LocalAttention
from pack.vsa_core.lowering import readable
from pack.vsa_core.selector import AttentionBackendEnum

THW, SHAPE = (5, 6, 7), (2, 217, 2, 16)
METHODS = (SDPABackend, *BACKENDS)
ASKED = {
    "TORCH_SDPA": {"current_timestep": 0},
    "VIDEO_SPARSE_ATTN": {"current_timestep": 0, "raw_latent_shape": THW, "patch_size": (1, 1, 1), "VSA_sparsity": 0.7,
                          "device": torch.device("cpu"), "suffix": 7},
    "SLIDING_TILE_ATTN": {"STA_param": (1, 1, 1), "current_timestep": 0, "raw_latent_shape": THW,
                          "tile_size": (2, 4, 4), "suffix": 7},
    **dict.fromkeys(("SLA_ATTN", "SAGE_SLA_ATTN"), {"current_timestep": 0, "topk_ratio": 0.6}),
    **dict.fromkeys(("VMOBA_ATTN", "POOLED_CHUNK_ATTN"), {
        "current_timestep": 0, "raw_latent_shape": THW, "patch_size": (1, 1, 1), "temporal_chunk_size": 1,
        "temporal_topk": 2, "spatial_chunk_size": (2, 4), "spatial_topk": 3, "st_chunk_size": (2, 3, 4), "st_topk": 4,
        "suffix": 7}),
}
STRIDES = {
    "channels before tokens": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "every second channel": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "one channel for all": lambda x: x[..., :1].expand(x.shape),
    "channels backwards in memory": lambda x: x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0),
}


def named(backends):
    return pytest.mark.parametrize("backend", backends, ids=lambda backend: backend.get_name())


def metadata(backend):
    return backend.get_builder_cls()().build(**ASKED[backend.get_name()])


def inputs(count):
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(1)).unbind()


def layer(backend):
    return LocalAttention(2, 16, supported_attention_backends=(AttentionBackendEnum[backend.get_name()],),
                          backend="reference", prefix="blocks.2.attn1.impl")


@named(METHODS)
@pytest.mark.parametrize("strides", STRIDES)
def test_every_method_takes_tensors_whose_channels_are_not_side_by_side(backend, strides):
    odd = [STRIDES[strides](x) for x in inputs(3)]
    assert all(x.stride(3) != 1 for x in odd)
    with set_forward_context(metadata(backend)):
        assert torch.equal(layer(backend)(*odd), layer(backend)(*(x.contiguous() for x in odd)))


@named(METHODS)
@pytest.mark.parametrize("place", range(3))
def test_one_such_tensor_among_others_is_enough(backend, place):
    plain = list(inputs(3))
    odd = list(plain)
    odd[place] = STRIDES["channels before tokens"](plain[place])
    with set_forward_context(metadata(backend)):
        assert torch.equal(layer(backend)(*odd), layer(backend)(*plain))


@named(BACKENDS)
def test_tiled_tensors_may_have_such_strides_too(backend):
    md, impl = metadata(backend), backend.get_impl_cls()(2, 16, backend="reference", prefix="blocks.2.attn1.impl")
    tiled = impl.preprocess_qkv(torch.cat(inputs(3)), md).clone().chunk(3)
    odd = [STRIDES["channels before tokens"](x) for x in tiled]
    gate = (None,) if backend.get_name() == "VIDEO_SPARSE_ATTN" else ()
    assert torch.equal(impl.forward(*odd, *gate, md), impl.forward(*tiled, *gate, md))


@pytest.mark.parametrize("strides", STRIDES)
def test_a_gate_may_have_such_strides_too(strides):
    backend = next(b for b in BACKENDS if b.get_name() == "VIDEO_SPARSE_ATTN")
    *qkv, gate = inputs(4)
    gate = STRIDES[strides](gate)
    with set_forward_context(metadata(backend)):
        wanted = layer(backend)(*qkv, gate_compress=gate.contiguous())
        assert torch.equal(layer(backend)(*qkv, gate_compress=gate), wanted)


def test_tensors_that_kernels_can_read_are_not_copied():
    x = torch.zeros(SHAPE)
    views = (x, x.transpose(1, 2), x[:, ::2], x[..., 3:9], x[..., :1])
    assert all(y is x for x, y in zip(views, readable(*views))) and readable(None) == (None,)


@named(METHODS)
def test_a_misspelt_keyword_of_a_builder_is_an_error_that_names_the_right_ones(backend):
    with pytest.raises(TypeError, match="build: found text_length, wanted .*current_timestep") as error:
        backend.get_builder_cls()().build(**ASKED[backend.get_name()], text_length=7)
    assert "self" not in str(error.value) and "kwargs" not in str(error.value)


@named(METHODS)
@pytest.mark.parametrize("name", ["VSA_sparcity", "sta_param", "raw_latent_shapes"])
def test_a_keyword_that_is_almost_one_is_an_error(backend, name):
    with pytest.raises(TypeError, match=f"build: found {name}, wanted"):
        backend.get_builder_cls()().build(**ASKED[backend.get_name()], **{name: 1})


@named(METHODS)
def test_a_builder_takes_what_fastvideos_pipelines_say_to_all_of_them(backend):
    asked = ASKED[backend.get_name()]
    others = {name: "another method's" for name in UPSTREAM_NAMES if name not in asked}
    if backend is not SDPABackend:
        others = {name: value for name, value in others.items() if name in ("STA_param", "VSA_sparsity", "topk_ratio")}
    found = backend.get_builder_cls()().build(**asked, **others)
    assert isinstance(found, backend.get_metadata_cls()) and "another" not in str(getattr(found, "STA_param", ""))
