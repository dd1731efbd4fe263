"""Attention layers over several ranks against the same layer on one, and against float64 answers."""
import pytest
import torch

from oracles import dense_attention_oracle, vsa_attention_oracle
from pack.vsa_core import DistributedAttention, DistributedAttention_VSA, LocalAttention
from pack.vsa_core.backends.sla import SLAAttentionMetadataBuilder
from pack.vsa_core.backends.sliding_tile_attn import SlidingTileAttentionMetadataBuilder
from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionMetadataBuilder
from pack.vsa_core.forward_context import set_forward_context
from pack.vsa_core.rotary import apply_rotary_emb
from pack.vsa_core.selector import AttentionBackendEnum
from pack.vsa_core.sequence_parallel import even_shares, ranges_of
from pack.vsa_core.thread_ranks import RankFailed
from rank_groups import ENGINES, by_copies
from sta_oracle import sta_attention_oracle

DENSE, VSA, STA, SLA = (AttentionBackendEnum[name] for name in
                        ("TORCH_SDPA", "VIDEO_SPARSE_ATTN", "SLIDING_TILE_ATTN", "SLA_ATTN"))
THW, TOKENS, TEXT, DIM = (5, 6, 7), 210, 9, 8
TABLE = [(1, 1, 1), (3, 1, 1), (3, 2, 2), (1, 2, 1), (2, 2, 2)]


def inputs(count, heads, tokens=TOKENS, seed=0):
    return torch.randn(count, 2, tokens, heads, DIM, generator=torch.Generator().manual_seed(seed))


def angles():
    angle = torch.rand(TOKENS, DIM // 2, generator=torch.Generator().manual_seed(1)) * 6
    return angle.cos(), angle.sin()


def metadata(backend, heads, suffix=0):
    """New on every call: each rank has its own, as each process would."""
    if backend is VSA:
        return VideoSparseAttentionMetadataBuilder().build(0, THW, (1, 1, 1), 0.7, torch.device("cpu"), suffix=suffix)
    if backend is STA:
        return SlidingTileAttentionMetadataBuilder().build([[TABLE[:heads]]], 0, raw_latent_shape=THW,
                                                           tile_size=(2, 4, 4), suffix=suffix, layer=0)
    return SLAAttentionMetadataBuilder().build(0, topk_ratio=0.4) if backend is SLA else None


def relative_l2(actual, expected):
    return float((actual.double() - expected.double()).detach().norm() / expected.detach().double().norm())


def layer_of(kind, backend, heads):
    layer = kind(heads, DIM, supported_attention_backends=(backend,), **({} if backend is DENSE else
                                                                         {"backend": "reference"}))
    if backend is SLA:
        layer.attn_impl.proj_l.weight.data = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(5))
    return layer


def shared(engine, world_size, backend, parts, text=(), freqs=None, padded=False, gated=False):
    """(output [B, S, H, D], text's output) of a layer whose rows are spread over ranks."""
    heads, suffix = parts[0].shape[2], text[0].shape[1] if len(text) else 0
    rows = even_shares(TOKENS, world_size)
    if padded:
        rows = (-(-TOKENS // world_size),) * world_size
        parts = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, sum(rows) - TOKENS), value=float("nan")) for x in parts]

    def work(group):
        mine = ranges_of(rows)[group.rank_in_group]
        layer = layer_of(DistributedAttention_VSA if gated else DistributedAttention, backend, heads)
        local = [x[:, mine.start:mine.stop] for x in parts]
        more = {"gate_compress": local[3]} if len(local) > 3 else {}
        with set_forward_context(metadata(backend, heads, suffix)):
            return layer(*local[:3], TOKENS if padded or gated else None, *text, **more, freqs_cis=freqs,
                         sequence_rows=None if padded else rows)

    results = ENGINES[engine](world_size, work)
    out = torch.cat([out for out, _ in results], dim=1)
    if padded:
        assert not out[:, TOKENS:].any()
    for _, replicated in results:
        assert replicated is None and not len(text) or torch.equal(replicated, results[0][1])
    return out[:, :TOKENS], results[0][1]


def on_one(backend, parts, text=(), freqs=None):
    """The same from the layer for one device, its tokens behind one another."""
    heads, suffix = parts[0].shape[2], text[0].shape[1] if len(text) else 0
    if freqs is not None:
        parts = [apply_rotary_emb(x, *freqs) if place < 2 else x for place, x in enumerate(parts)]
    if suffix:
        text = [*text, *[torch.zeros_like(text[0])] * (len(parts) - 3)]
        parts = [torch.cat(both, dim=1) for both in zip(parts, text, strict=True)]
    layer = layer_of(LocalAttention, backend, heads)
    with set_forward_context(metadata(backend, heads, suffix)):
        return layer(*parts[:3], gate_compress=parts[3] if len(parts) > 3 else None)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("world_size", "heads"), [(2, 5), (3, 4), (4, 4)])
@pytest.mark.parametrize(("backend", "gated"), [(DENSE, False), (VSA, False), (VSA, True), (STA, False), (SLA, False)])
def test_ranks_together_are_the_layer_on_one_device(engine, world_size, heads, backend, gated):
    parts, text = inputs(4 if gated else 3, heads), inputs(3, heads, TEXT, 3) if backend is not SLA else ()
    padded = (world_size + heads) % 2 == 1
    out, replicated = shared(engine, world_size, backend, parts, text, angles(), padded, gated)
    wanted = on_one(backend, parts, text, angles())
    assert relative_l2(out, wanted[:, :TOKENS]) <= 1e-6
    if len(text):
        assert relative_l2(replicated, wanted[:, TOKENS:]) <= 1e-6


def test_ranks_together_are_the_float64_answer():
    q, k, v, gate = inputs(4, 3)
    assert relative_l2(shared("copies", 2, DENSE, (q, k, v))[0], dense_attention_oracle(q, k, v)) <= 1e-6
    out, _ = shared("copies", 2, STA, (q, k, v), padded=True)
    assert relative_l2(out, sta_attention_oracle(q, k, v, THW, (2, 4, 4), TABLE[:3])) <= 1e-6
    out, _ = shared("copies", 3, VSA, (q, k, v, gate), gated=True)
    assert relative_l2(out, vsa_attention_oracle(q, k, v, gate, THW, (4, 4, 4), 0.7)[0]) <= 1e-6


def test_a_gate_of_none_is_no_coarse_branch():
    parts = inputs(3, 4)
    assert torch.equal(shared("copies", 2, VSA, parts, gated=True)[0], shared("copies", 2, VSA, parts)[0])


def test_outside_of_a_group_the_layer_is_the_local_one():
    parts, text = inputs(3, 3), inputs(3, 3, TEXT, 3)
    with set_forward_context(metadata(STA, 3, TEXT)):
        out, replicated = layer_of(DistributedAttention, STA, 3)(*parts, None, *text)
    wanted = on_one(STA, parts, text)
    assert torch.equal(out, wanted[:, :TOKENS]) and torch.equal(replicated, wanted[:, TOKENS:])


def test_a_projection_is_the_layers_own_and_the_prefix_tells_the_implementation_its_place():
    layer = DistributedAttention(2, 64, supported_attention_backends=(SLA,), prefix="blocks.7.attn1")
    assert "attn_impl.proj_l.weight" in layer.state_dict() and layer.attn_impl.prefix == "blocks.7.attn1.impl"
    assert layer_of(DistributedAttention, STA, 2).attn_impl.layer is None
    layer = DistributedAttention(2, DIM, supported_attention_backends=(STA,), prefix="blocks.7.attn1")
    assert layer.attn_impl.layer == 7


@pytest.mark.parametrize(("given", "match"), [
    ({"original_seq_len": 421}, "original_seq_len 421: the ranks have 420 rows"),
    ({"sequence_rows": (210, 209)}, r"sequence_rows \[210, 209\]: rank 1 of 2 has 210"),
    ({"sequence_rows": (210,)}, "sequence_rows"),
    ({"replicated_q": inputs(1, 3, TEXT)[0]}, r"replicated q, k, v: found \[\[2, 9, 3, 8\], None, None\], wanted all"),
    ({"freqs_cis": angles()}, "rotary embedding: found .*wanted"),
])
def test_operands_that_do_not_fit_are_refused_on_every_rank(given, match):
    def work(group):
        with set_forward_context(None):
            layer_of(DistributedAttention, DENSE, 3)(*inputs(3, 3), **given)

    with pytest.raises(RankFailed, match=match):
        by_copies(2, work)


def test_other_shapes_and_metadata_are_refused():
    layer, (q, k, v) = layer_of(DistributedAttention, DENSE, 3), inputs(3, 3)
    with set_forward_context(None):
        with pytest.raises(ValueError, match="wanted one shape for q, k, v and gate"):
            layer(q, k[:, :, :1], v[:, :, :1])
        with pytest.raises(ValueError, match=r"wanted \[batch"):
            layer(q[0], k[0], v[0])
        with pytest.raises(ValueError, match="SLIDING_TILE_ATTN: found NoneType"):
            layer_of(DistributedAttention, STA, 3)(q, k, v)
