"""The attention layer: the selected backend, the metadata of the forward pass, rotary embedding."""
import threading

import pytest
import torch

from oracles import dense_attention_oracle
from pack.vsa_core.backends.sdpa import SDPABackend, SDPAImpl, SDPAMetadata, SDPAMetadataBuilder
from pack.vsa_core.backends.sliding_tile_attn import (
    SlidingTileAttentionImpl,
    SlidingTileAttentionMetadataBuilder,
)
from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder
from pack.vsa_core.forward_context import get_forward_context, set_forward_context
from pack.vsa_core.layer import LocalAttention
from pack.vsa_core.rotary import apply_rotary_emb
from pack.vsa_core.selector import AttentionBackendEnum, global_force_attn_backend_context_manager
from sta_oracle import sta_attention_oracle

DENSE, VSA, STA = (AttentionBackendEnum.TORCH_SDPA, AttentionBackendEnum.VIDEO_SPARSE_ATTN,
                   AttentionBackendEnum.SLIDING_TILE_ATTN)
THW = (5, 6, 7)


def inputs(count=3, tokens=210, heads=2, dim=8, seed=0):
    return torch.randn(count, 2, tokens, heads, dim, generator=torch.Generator().manual_seed(seed))


def sta_metadata(window=(1, 1, 1)):
    return SlidingTileAttentionMetadataBuilder().build(window, 0, raw_latent_shape=THW, tile_size=(2, 4, 4))


def vsa_metadata():
    return VideoSparseAttentionMetadataBuilder().build(0, THW, (1, 1, 1), 0.7, torch.device("cpu"))


def relative_l2(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_a_sliding_tile_layer_is_the_oracles():
    q, k, v = inputs()
    layer = LocalAttention(2, 8, supported_attention_backends=(STA, DENSE), backend="reference")
    with set_forward_context(sta_metadata((3, 1, 1))):
        out = layer(q, k, v)
    assert relative_l2(out, sta_attention_oracle(q, k, v, THW, (2, 4, 4), [(3, 1, 1)] * 2)) <= 1e-5
    assert (layer.backend, layer.num_heads, layer.head_size, layer.num_kv_heads) == (STA, 2, 8, 2)
    assert layer.attn_impl.backend == "reference" and layer.dtype is torch.float32


def test_a_video_sparse_layer_runs_with_and_without_its_gate():
    q, k, v, gate = inputs(4)
    layer, impl = LocalAttention(2, 8, supported_attention_backends=(VSA,)), VideoSparseAttentionImpl(2, 8)
    md = vsa_metadata()
    with set_forward_context(md):
        for given in (None, gate):
            parts = (q, k, v) if given is None else (q, k, v, gate)
            tiled = impl.preprocess_qkv(torch.cat(parts), md).chunk(len(parts))
            wanted = impl.postprocess_output(impl.forward(*tiled[:3], None if given is None else tiled[3], md), md)
            assert torch.equal(layer(q, k, v, gate_compress=given), wanted)


@pytest.mark.parametrize("scale", [None, 0.2])
def test_a_dense_layer_needs_no_grid(scale):
    q, k, v = inputs()
    layer = LocalAttention(2, 8, softmax_scale=scale)
    assert layer.backend is DENSE and layer.attn_backend is SDPABackend
    for metadata in (None, SDPAMetadataBuilder().build()):
        with set_forward_context(metadata):
            assert relative_l2(layer(q, k, v), dense_attention_oracle(q, k, v, scale)) <= 1e-5


def test_the_dense_backend_shares_key_heads_masks_and_looks_back_only_when_causal():
    q, k, v = inputs(heads=4)
    grouped = SDPAImpl(4, 8, num_kv_heads=2).forward(q, k[:, :, :2], v[:, :, :2])
    repeated = (x[:, :, :2].repeat_interleave(2, 2) for x in (k, v))
    assert relative_l2(grouped, dense_attention_oracle(q, *repeated)) <= 1e-5
    causal = SDPAImpl(4, 8, causal=True).forward(q, k, v)
    mask = torch.ones(210, 210, dtype=torch.bool).tril()
    assert relative_l2(causal, SDPAImpl(4, 8).forward(q, k, v, SDPAMetadata(0, mask))) <= 1e-6
    assert relative_l2(causal[:, :1], v[:, :1]) <= 1e-6
    fewer = SDPAImpl(4, 8).forward(q, k[:, :9], v[:, :9])
    assert fewer.shape == q.shape
    with pytest.raises(ValueError, match="3 key heads for 4 query heads"):
        SDPAImpl(4, 8, num_kv_heads=3)


def test_the_backend_is_chosen_when_the_layer_is_made():
    with global_force_attn_backend_context_manager(DENSE):
        layer = LocalAttention(2, 8, supported_attention_backends=(STA, DENSE))
    assert layer.backend is DENSE
    assert LocalAttention(2, 8, supported_attention_backends=(STA, DENSE)).backend is STA


def test_rotary_embedding_turns_every_pair_by_its_angle():
    x, angle = inputs(1)[0], torch.rand(210, 4, generator=torch.Generator().manual_seed(1)) * 6
    turned = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (4, 2)))
                                * torch.polar(torch.ones(210, 1, 4).double(), angle.double()[:, None])).flatten(-2)
    assert relative_l2(apply_rotary_emb(x, angle.cos(), angle.sin()), turned) <= 1e-6
    half = apply_rotary_emb(x.bfloat16(), angle.cos(), angle.sin())
    assert half.dtype is torch.bfloat16 and relative_l2(half, turned) <= 4e-3
    with pytest.raises(ValueError, match=r"cos \[209, 4\].*wanted.*\[210, 4\]"):
        apply_rotary_emb(x, angle[:209].cos(), angle[:209].sin())


def test_a_layer_turns_queries_and_keys_and_leaves_values():
    q, k, v = inputs()
    angle = torch.rand(210, 4, generator=torch.Generator().manual_seed(1)) * 6
    cos, sin = angle.cos(), angle.sin()
    layer = LocalAttention(2, 8, supported_attention_backends=(STA,))
    with set_forward_context(sta_metadata()):
        wanted = layer(apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin), v)
        assert torch.equal(layer(q, k, v, (cos, sin)), wanted)
        assert relative_l2(layer(q, k, v), wanted) > 0.1


def test_contexts_nest_and_belong_to_their_thread():
    seen = []
    with set_forward_context(sta_metadata()) as outer:
        with set_forward_context(None) as inner:
            assert get_forward_context() is inner and inner.attn_metadata is None
        assert get_forward_context() is outer

        def look():
            with pytest.raises(RuntimeError, match="no forward pass in progress"):
                get_forward_context()
            seen.append(True)

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [True]
    with pytest.raises(RuntimeError, match="wanted `with set_forward_context"):
        LocalAttention(2, 8)(*inputs())


def test_operands_and_metadata_of_another_kind_are_refused():
    q, k, v = inputs()
    layer = LocalAttention(2, 8, supported_attention_backends=(STA,))
    with set_forward_context(vsa_metadata()), pytest.raises(
            ValueError, match="SLIDING_TILE_ATTN: found VideoSparseAttentionMetadata, wanted SlidingTileAttention"):
        layer(q, k, v)
    with set_forward_context(None), pytest.raises(ValueError, match="found NoneType"):
        layer(q, k, v)
    with set_forward_context(sta_metadata()):
        with pytest.raises(ValueError, match=r"found q \[210, 2, 8\].*wanted \[batch"):
            layer(q[0], k[0], v[0])
        with pytest.raises(ValueError, match="no coarse branch"):
            layer(q, k, v, gate_compress=q)
    with pytest.raises(ValueError, match="not causal"):
        LocalAttention(2, 8, causal=True, supported_attention_backends=(STA,))
    with pytest.raises(ValueError, match="no coarse branch"), set_forward_context(None):
        LocalAttention(2, 8)(q, k, v, gate_compress=q)


def test_a_layer_made_once_serves_every_step_and_layer_of_a_strategy():
    q, k, v = inputs()
    table = [[[(1, 1, 1)] * 2, [(3, 1, 1), (1, 1, 1)]], [[(3, 2, 2)] * 2, [(1, 2, 1)] * 2]]
    plan, layer = sta_metadata(table), LocalAttention(2, 8, supported_attention_backends=(STA,))
    for step in range(2):
        for block in range(2):
            with set_forward_context(plan.at(step, block)):
                out = layer(q, k, v)
            assert relative_l2(out, sta_attention_oracle(q, k, v, THW, (2, 4, 4), table[step][block])) <= 1e-5
    assert isinstance(layer.attn_impl, SlidingTileAttentionImpl)


@pytest.mark.parametrize(("backend", "metadata"), [(VSA, vsa_metadata), (STA, sta_metadata)], ids=["VSA", "STA"])
def test_a_backward_pass_is_refused_with_what_to_do(backend, metadata):
    q, k, v = inputs().requires_grad_()
    with set_forward_context(metadata()):
        out = LocalAttention(2, 8, supported_attention_backends=(backend,))(q, k, v)
    with pytest.raises(RuntimeError, match="has no backward pass.*torch.no_grad.*train with dense attention"):
        out.sum().backward()
