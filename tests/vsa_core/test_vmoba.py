"""VMoBA against a float64 oracle, and every point in which upstream leaves a choice."""
import math

import pytest
import torch

from moba_oracle import PAIRS, chunk_of_token, moba_oracle, moba_seen, worst
from oracles import dense_attention_oracle
from pack.vsa_core import chunk_attention, chunk_gate
from pack.vsa_core.backends.vmoba import (
    PooledChunkAttentionBackend,
    PooledChunkAttentionImpl,
    VideoMobaAttentionMetadataBuilder,
    VMOBAAttentionBackend,
    VMOBAAttentionImpl,
    process_moba_input,
    process_moba_output,
)
from pack.vsa_core.chunks import Chunks
from pack.vsa_core.forward_context import set_forward_context
from pack.vsa_core.grid import TokenGrid
from pack.vsa_core.layer import LocalAttention
from pack.vsa_core.selector import AttentionBackendEnum

THW = (4, 6, 8)
SETTINGS = {"temporal_chunk_size": 1, "temporal_topk": 2, "spatial_chunk_size": (2, 4), "spatial_topk": 3,
            "st_chunk_size": (2, 3, 4), "st_topk": 4}
KINDS = {"temporal": (0, 1, 2), "spatial": (1, (2, 4), 3), "st": (2, (2, 3, 4), 4)}
"""Kind -> layer, size and topk of SETTINGS."""
BOUND = {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 4e-3}


def metadata(thw=THW, **changes):
    return VideoMobaAttentionMetadataBuilder().build(
        **{"current_timestep": 0, "raw_latent_shape": thw, "patch_size": (1, 1, 1), **SETTINGS, **changes})


def inputs(tokens=192, batch=2, heads=2, dim=16, dtype=torch.float32, seed=0):
    return torch.randn(3, batch, tokens, heads, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(q, k, v, md, layer=0, cls=VMOBAAttentionImpl):
    """The output, and of every query the other chunks that it chose, bool [B, H, n, C]."""
    chosen = []
    out = cls(q.shape[2], q.shape[3], backend="reference", on_selection=lambda of, _: chosen.append(of)).attend(
        q, k, v, md.at(layer))
    chosen = torch.stack(chosen)
    if cls is PooledChunkAttentionImpl:                          # told head by head
        return out, chosen.unflatten(0, (q.shape[2], q.shape[0])).transpose(0, 1)
    return out, chosen.unflatten(0, (q.shape[0], q.shape[2]))


def with_own(chosen, owner):
    return chosen | torch.nn.functional.one_hot(torch.tensor(owner), chosen.shape[-1]).bool()


@pytest.mark.parametrize(("mode", "pool"), PAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_choose_is_the_oracles(mode, pool, kind):
    layer, size, topk = KINDS[kind]
    q, k, v = inputs()
    out, chosen = run(q, k, v, metadata(moba_select_mode=mode, moba_threshold_type=pool), layer)
    owner = chunk_of_token(THW, size)
    seen, gap = moba_seen(q, k, owner, mode, pool, topk, 0.25)
    assert gap > 1e-5 and torch.equal(with_own(chosen, owner), seen) and not seen.all()
    assert out.is_contiguous() and worst(out, moba_oracle(q, k, v, THW, size, mode, pool, topk)) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_in_narrower_types_it_keeps_to_their_bounds_given_the_same_chunks(dtype, kind):
    layer, size, topk = KINDS[kind]
    q, k, v = inputs(dtype=dtype)
    out, chosen = run(q, k, v, metadata(), layer)
    owner = chunk_of_token(THW, size)
    assert out.dtype is dtype
    assert worst(out, moba_oracle(q, k, v, THW, size, seen=with_own(chosen, owner))) <= BOUND[dtype]
    wanted, _ = moba_seen(q, k, owner, "threshold", "query_head", topk, 0.25)
    assert torch.equal(with_own(chosen, owner), wanted)


@pytest.mark.parametrize("thw", [(5, 7, 9), (3, 4, 5), (2, 13, 3)])
@pytest.mark.parametrize("size", [2, 1.5, (3, 4), (2, 4, 4)], ids=str)
@pytest.mark.parametrize(("mode", "pool"), [("topk", "query_head"), ("threshold", "overall"), ("threshold", "block")])
def test_grids_that_the_chunks_do_not_divide_have_short_ones_at_the_edge(thw, size, mode, pool):
    layer = 0 if not isinstance(size, tuple) else len(size) - 1
    name = ("temporal", "spatial", "st")[layer]
    md = metadata(thw, moba_select_mode=mode, moba_threshold_type=pool,
                  **{f"{name}_chunk_size": size, f"{name}_topk": 2})
    q, k, v = inputs(math.prod(thw), batch=1)
    assert worst(run(q, k, v, md, layer)[0], moba_oracle(q, k, v, thw, size, mode, pool, 2)) <= 1e-6


@pytest.mark.parametrize("cls", [VMOBAAttentionImpl, PooledChunkAttentionImpl])
@pytest.mark.parametrize("layer", range(3))
def test_tokens_that_are_not_video_are_seen_by_all_and_see_all_and_hidden_ones_by_none(cls, layer):
    kind = list(KINDS)[layer]
    thw, prefix, suffix = (3, 6, 7), 5, 70
    q, k, v = inputs(prefix + 126 + suffix)
    hidden = (1, 30)                                             # places 1 and 126 + 30 of the sequence
    places = [1, 126 + 30]
    k[:, places], v[:, places] = 1e4, 1e4
    out, chosen = run(q, k, v, metadata(thw, prefix=prefix, suffix=suffix, hidden=hidden), layer, cls)
    size = KINDS[kind][1]
    owner = chunk_of_token(thw, size)
    if cls is PooledChunkAttentionImpl:
        chosen = tokens_of_blocks(chosen, owner)
    wanted = moba_oracle(q, k, v, thw, size, prefix=prefix, hidden=places, seen=with_own(chosen, owner))
    assert worst(out, wanted) <= 1e-6 and out.isfinite().all()


def blocks_of(owner):
    """Blocks of 64 queries: their tokens, chunk after chunk."""
    chunks = [[i for i, of in enumerate(owner) if of == c] for c in range(max(owner) + 1)]
    return [tokens[first:first + 64] for tokens in chunks for first in range(0, len(tokens), 64)]


def tokens_of_blocks(chosen, owner):
    """What tokens see, where blocks of 64 of them choose together."""
    blocks = blocks_of(owner)
    seen = chosen.new_zeros(*chosen.shape[:2], len(owner), chosen.shape[-1])
    for place, tokens in enumerate(blocks):
        seen[:, :, tokens] = chosen[:, :, place, None]
    return seen


@pytest.mark.parametrize(("mode", "pool"), PAIRS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_pooled_form_chooses_by_the_mean_query_of_64(mode, pool, kind):
    thw, size = (4, 12, 13), {"temporal": 1, "spatial": (5, 6), "st": (3, 6, 8)}[kind]
    md = metadata(thw, moba_select_mode=mode, moba_threshold_type=pool, spatial_chunk_size=(5, 6),
                  st_chunk_size=(3, 6, 8))
    q, k, v = inputs(math.prod(thw))
    out, chosen = run(q, k, v, md, KINDS[kind][0], PooledChunkAttentionImpl)
    owner = chunk_of_token(thw, size)
    blocks = blocks_of(owner)
    pooled = torch.stack([q[:, tokens].double().mean(1) for tokens in blocks], 1)
    of_blocks = [owner[tokens[0]] for tokens in blocks]
    seen, gap = moba_seen(pooled, k, owner, mode, pool, KINDS[kind][2], 0.25, of_blocks)
    assert gap > 1e-6 and torch.equal(with_own(chosen, of_blocks), seen) and not seen.all()
    assert worst(out, moba_oracle(q, k, v, thw, size, seen=tokens_of_blocks(seen, owner))) <= 1e-6


def test_the_pooled_form_goes_head_by_head_where_its_lists_are_large(monkeypatch):
    q, k, v = inputs()
    wanted, _ = run(q, k, v, metadata(), 2, PooledChunkAttentionImpl)
    monkeypatch.setattr(chunk_attention, "_LIST_BYTES", 1)
    assert torch.equal(run(q, k, v, metadata(), 2, PooledChunkAttentionImpl)[0], wanted)


def test_the_chunks_of_a_grid_are_these():
    """4 frames of 6 x 8 tokens: by frames, by columns of 2 x 4 through all frames, by boxes of 2 x 3 x 4."""
    def own(size):
        return Chunks.of(TokenGrid(THW), size, torch.device("cpu")).own.view(THW)

    assert own(2).flatten().tolist() == [0] * 96 + [1] * 96
    assert own(1.5).flatten().tolist() == [0] * 72 + [1] * 72 + [2] * 48
    columns = [[0] * 4 + [1] * 4] * 2 + [[2] * 4 + [3] * 4] * 2 + [[4] * 4 + [5] * 4] * 2
    assert own((2, 4)).tolist() == [columns] * 4
    boxes = [[0] * 4 + [1] * 4] * 3 + [[2] * 4 + [3] * 4] * 3
    assert own((2, 3, 4)).tolist() == [boxes] * 2 + [[[n + 4 for n in row] for row in boxes]] * 2


@pytest.mark.parametrize("size", [1, 1.5, (2, 4), (2, 3, 4)], ids=str)
def test_reordering_is_an_exact_permutation_and_is_undone(size):
    x = torch.arange(2 * 192 * 3.0).view(2, 192, 3)
    moved, length = process_moba_input(x, THW, size)
    assert length == {1: 48, 1.5: 72, (2, 4): 32, (2, 3, 4): 24}[size]
    assert torch.equal(process_moba_output(moved, THW, size), x)
    owner = torch.tensor(chunk_of_token(THW, size))
    assert torch.equal(moved, x[:, owner.argsort(stable=True)])
    assert (size in (1, 1.5)) == torch.equal(moved, x)


@pytest.mark.parametrize(("size", "sentence"), [
    ((4, 4), "chunks of 4 along height: found 6 tokens there, wanted a multiple of 4"),
    ((2, 5), "chunks of 5 along width: found 8 tokens there, wanted a multiple of 5"),
    ((3, 3, 4), "chunks of 3 along time: found 4 tokens there, wanted a multiple of 3"),
    (0, "chunk size 0: wanted numbers above 0"), ((2, -1), "wanted numbers above 0, and whole ones"),
    ((2, 1.5), "and whole ones"), ("2x4", "wanted frames, or height and width, or time, height and width"),
    ((1, 1, 1, 1), "wanted frames, or"), (math.nan, "above 0")])
def test_reordering_refuses_what_it_cannot_cut_and_says_where(size, sentence):
    for function in (process_moba_input, process_moba_output):
        with pytest.raises(ValueError, match=sentence):
            function(torch.zeros(1, 192, 1), THW, size)


@pytest.mark.parametrize(("layers", "first", "wanted"), [
    ((1, 1, 1), 0, "temporal spatial st temporal spatial st"), ((0, 2, 0), 1, "spatial " * 6),
    ((2, 1, 1), 0, "temporal temporal spatial st temporal temporal"), ((0, 0, 1), 0, "st " * 6),
    ((1, 1, 1), 4, "st temporal spatial st temporal spatial")])
def test_layers_take_turns_and_those_before_the_first_one_too(layers, first, wanted):
    names = dict(zip(("temporal_layer", "spatial_layer", "st_layer"), layers, strict=True))
    md = metadata(first_full_layer=first, **names)
    assert [md.kind(layer) for layer in range(6)] == wanted.split()


def test_a_topk_of_one_is_the_own_chunk_alone_where_upstream_runs_dense():
    q, k, v = inputs()
    out, chosen = run(q, k, v, metadata(moba_select_mode="topk", st_topk=1), 2)
    assert not chosen.any()
    own = with_own(chosen, chunk_of_token(THW, (2, 3, 4)))
    assert worst(out, moba_oracle(q, k, v, THW, (2, 3, 4), seen=own)) <= 1e-6


@pytest.mark.parametrize("pool", ["query_head", "block", "overall", "head_global"])
def test_a_share_that_is_never_reached_reads_all_where_upstream_reads_two(pool):
    q, k, v = inputs()
    for share in (1.0, 1.5):
        out, chosen = run(q, k, v, metadata(moba_threshold=share, moba_threshold_type=pool), 2)
        assert with_own(chosen, chunk_of_token(THW, (2, 3, 4))).all()
        assert worst(out, dense_attention_oracle(q, k, v)) <= 1e-6


@pytest.mark.parametrize("pool", ["query_head", "block", "overall", "head_global"])
def test_a_higher_share_never_reads_less(pool):
    q, k, v = inputs()
    shares = [0, 0.1, 0.25, 0.5, 0.8, 0.95, 0.999, 1.0]
    counts = [run(q, k, v, metadata(moba_threshold=share, moba_threshold_type=pool), 2)[1].sum().item()
              for share in shares]
    assert counts == sorted(counts) and len(set(counts)) >= 6


@pytest.mark.parametrize(("pool", "others"), [("query_head", 2 * 2 * 192), ("block", 2 * 8), ("overall", 2),
                                              ("head_global", 2 * 2)])
def test_a_share_of_nothing_reads_one_more_of_every_pool(pool, others):
    q, k, v = inputs()
    assert run(q, k, v, metadata(moba_threshold=0.0, moba_threshold_type=pool), 2)[1].sum().item() == others


@pytest.mark.parametrize(("mode", "pool"), PAIRS)
def test_elements_of_a_batch_choose_for_themselves(mode, pool):
    q, k, v = inputs()
    md = metadata(moba_select_mode=mode, moba_threshold_type=pool)
    both, _ = run(q, k, v, md, 2)
    alone = torch.cat([run(*(x[b:b + 1] for x in (q, k, v)), md, 2)[0] for b in range(2)])
    assert torch.equal(both, alone)


@pytest.mark.parametrize("pool", ["query_head", "overall", "head_global"])
def test_a_topk_above_the_number_of_chunks_is_dense(pool):
    q, k, v = inputs()
    out, chosen = run(q, k, v, metadata(moba_select_mode="topk", moba_threshold_type=pool, temporal_topk=99))
    assert chosen.sum() == 2 * 2 * 192 * 3 and worst(out, dense_attention_oracle(q, k, v)) <= 1e-6


@pytest.mark.parametrize(("mode", "pool"), PAIRS)
def test_gates_that_are_all_equal_give_a_finite_result_of_the_same_size(mode, pool):
    q, k, v = inputs()
    k = k[:, :1].expand(k.shape)
    q = q.round(decimals=0)
    out, chosen = run(q * 0 if mode == "topk" else q, k * 0, v, metadata(
        moba_select_mode=mode, moba_threshold_type=pool), 2)
    assert out.isfinite().all()
    assert chosen.sum().item() == 2 * 2 * 192 * (3 if mode == "topk" else 7)


@pytest.mark.parametrize(("mode", "pool"), PAIRS)
def test_ties_at_the_cut_do_not_change_how_many_are_chosen(mode, pool):
    """q and k of small whole numbers: hundreds of gates are equal to the last bit."""
    q, k, v = inputs(batch=1)
    q, k = q.round().clamp(-1, 1), k.round().clamp(-1, 1)
    owner = chunk_of_token(THW, (2, 3, 4))
    wanted, gap = moba_seen(q, k, owner, mode, pool, 4, 0.3)
    out, chosen = run(q, k, v, metadata(moba_select_mode=mode, moba_threshold_type=pool, moba_threshold=0.3), 2)
    found = with_own(chosen, owner)
    assert gap == 0 or pool != "query_head"
    assert abs(int(found.sum()) - int(wanted.sum())) <= (0 if mode == "topk" else 3)
    assert worst(out, moba_oracle(q, k, v, THW, (2, 3, 4), seen=found)) <= 1e-6


@pytest.mark.parametrize(("mode", "pool"), PAIRS)
def test_in_pieces_of_any_size_the_choice_is_the_same_and_so_is_the_clip(mode, pool, monkeypatch):
    q, k, v = inputs()
    md = metadata(moba_select_mode=mode, moba_threshold_type=pool)
    wanted, whole = run(q, k, v, md, 2)
    monkeypatch.setattr(chunk_gate, "_PIECE_BYTES", {"cpu": 8 * 48 * 17})
    monkeypatch.setattr(chunk_attention, "_GATHERED_BYTES", {"cpu": 3 * 64 * 16 * 16})
    out, chosen = run(q, k, v, md, 2)
    assert torch.equal(chosen, whole) and worst(out, wanted.double()) <= 1e-6
    assert torch.equal(run(q, k, v, md, 2)[0], out)


def test_memory_is_bounded_by_the_pieces_and_not_by_all_gates(monkeypatch):
    """6144 queries and 128 chunks have 768 Ki gates a head, and as many pairs as chosen: none of it at once."""
    seen, gathered = [], []
    plain = chunk_gate._share_of_rows
    monkeypatch.setattr(chunk_gate, "_PIECE_BYTES", {"cpu": 1 << 20})
    monkeypatch.setattr(chunk_attention, "_GATHERED_BYTES", {"cpu": 1 << 20})
    merge = chunk_attention._merge
    monkeypatch.setattr(chunk_gate, "_share_of_rows",
                        lambda gate, *rest: seen.append(gate.nbytes) or plain(gate, *rest))
    monkeypatch.setattr(chunk_attention, "_merge", lambda total, peak, more, *rest: gathered.append(
        more.nbytes) or merge(total, peak, more, *rest))
    q, k, v = inputs(6144, batch=1, heads=1)
    run(q, k, v, metadata((8, 24, 32), st_chunk_size=(2, 4, 6)), 2)
    assert len(seen) > 10 and len(gathered) > 5
    assert max(seen) * 12 <= 1 << 20 and max(gathered) * 4 <= 1 << 20


def test_a_broken_query_breaks_no_other_one():
    q, k, v = inputs(batch=1)
    wanted, _ = run(q, k, v, metadata(), 2)
    q[0, 100, 1] = torch.nan
    out, _ = run(q, k, v, metadata(), 2)
    fine = torch.ones(192, dtype=torch.bool)
    fine[100] = False
    assert out[0, 100, 1].isnan().all() and torch.equal(out[:, fine], wanted[:, fine])


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"temporal_chunk_size": 0}, "temporal_chunk_size 0: wanted numbers above 0"),
    ({"spatial_chunk_size": (3, 0)}, "spatial_chunk_size .3, 0.: wanted numbers above 0"),
    ({"spatial_chunk_size": 3}, "spatial_chunk_size 3: wanted height and width"),
    ({"st_chunk_size": (3, 4)}, "st_chunk_size .3, 4.: wanted time, height and width"),
    ({"temporal_chunk_size": (1, 2)}, "temporal_chunk_size .*: wanted a number of frames"),
    ({"st_topk": 0}, "topk 0: wanted a whole number of chunks"), ({"st_topk": 2.5}, "topk 2.5: wanted a whole number"),
    ({"moba_select_mode": "top"}, "moba_select_mode 'top': wanted threshold or topk"),
    ({"moba_threshold": -0.1}, "moba_threshold -0.1: wanted 0 or more"),
    ({"moba_threshold": math.nan}, "moba_threshold nan: wanted 0 or more"),
    ({"moba_threshold_type": "query"}, "moba_threshold_type 'query' with threshold: wanted query_head, block, overall"),
    ({"moba_select_mode": "topk", "moba_threshold_type": "block"}, "'block' with topk: wanted query_head, overall"),
    ({"temporal_layer": 0, "spatial_layer": 0, "st_layer": 0}, "layers per turn .* wanted whole numbers"),
    ({"st_layer": -1}, "layers per turn .* wanted whole numbers"),
    ({"patch_size": (1, 2, 3)}, "raw_latent_shape along width: found 8 cells, wanted a multiple of 3")])
def test_settings_that_are_none_are_refused_with_what_was_wanted(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        metadata(**changes)


@pytest.mark.parametrize(("arguments", "sentence"), [
    ({"causal": True}, "VMoBA is not causal"), ({"num_kv_heads": 1}, "found 1 key heads for 2 query heads")])
def test_what_upstream_ignores_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        VMOBAAttentionImpl(2, 16, **arguments)


def test_operands_that_do_not_fit_and_an_unknown_layer_are_refused():
    q, k, v = inputs()
    impl = VMOBAAttentionImpl(2, 16, backend="reference")
    with pytest.raises(ValueError, match="wanted one shape"):
        impl.attend(q, k[:, :64], v[:, :64], metadata().at(0))
    with pytest.raises(ValueError, match="found a sequence of 64 tokens, wanted 192"):
        impl.attend(q[:, :64], k[:, :64], v[:, :64], metadata().at(0))
    with pytest.raises(ValueError, match="the layer is unknown: wanted metadata.at"):
        impl.attend(q, k, v, metadata())
    with pytest.raises(ValueError, match="has no coarse branch"):
        impl.attend(q, k, v, metadata().at(0), gate_compress=q)


@pytest.mark.parametrize("backend", [VMOBAAttentionBackend, PooledChunkAttentionBackend])
def test_the_layer_runs_it_and_the_prefix_tells_which_layer_it_is(backend):
    q, k, v = inputs()
    layer = LocalAttention(2, 16, supported_attention_backends=(AttentionBackendEnum[backend.get_name()],),
                           backend="reference", prefix="blocks.4.attn1.impl")
    assert layer.attn_impl.layer_idx == 4
    with set_forward_context(metadata(first_full_layer=2)):
        found = layer(q, k, v)
    assert torch.equal(found, run(q, k, v, metadata(), 2, backend.get_impl_cls())[0])


def test_the_builder_takes_what_fastvideos_config_says_by_its_own_defaults():
    md = VideoMobaAttentionMetadataBuilder().build(
        3, (20, 60, 104), (1, 2, 2), 2, 3, [3, 4], 20, [4, 6, 4], 15, device=torch.device("cpu"))
    assert (md.patch_resolution, md.moba_select_mode, md.moba_threshold, md.moba_threshold_type) == (
        [20, 30, 52], "threshold", 0.25, "query_head")
    assert (md.first_full_layer, md.first_full_step) == (0, 12)
    assert (md.temporal_layer, md.spatial_layer, md.st_layer) == (1, 1, 1)
    assert [(md.chunks(kind, torch.device("cpu")).number, md.chunks(kind, torch.device("cpu")).per_chunk)
            for kind in ("temporal", "spatial", "st")] == [(10, 49), (130, 4), (325, 2)]
