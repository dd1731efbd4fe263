"""Video sparse attention in the order of the sequence: the function of the seed's three steps, without their copies."""
from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import interpreted_kernel
from oracles import other_tokens, relative_l2_per_tile, vsa_attention_oracle
from pack.kernels import tile_ops
from pack.vsa_core.backends.video_sparse_attn import VideoSparseAttentionImpl, VideoSparseAttentionMetadataBuilder

NAN = float("nan")


def metadata(thw, tile=(4, 4, 4), sparsity=0.7, **others):
    return VideoSparseAttentionMetadataBuilder().build(
        0, raw_latent_shape=thw, patch_size=(1, 1, 1), VSA_sparsity=sparsity, device="cpu", tile_size=tile, **others)


def inputs(md, dtype=torch.float32, batch=2, heads=3, dim=16):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(batch, md.total_seq_length, heads, dim, generator=generator).to(dtype) for _ in range(4)]


def three_steps(impl, q, k, v, md, gate):
    parts = impl.preprocess_qkv(torch.cat([q, k, v] if gate is None else [q, k, v, gate]), md)
    parts = parts.chunk(3 if gate is None else 4)
    return impl.postprocess_output(impl.forward(*parts[:3], None if gate is None else parts[3], md), md)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "no gate"])
@pytest.mark.parametrize("thw, tile, sparsity, others", [
    ((5, 5, 6), (4, 4, 4), 0.7, {}), ((7, 9, 11), (3, 5, 4), 0.8, dict(prefix=3, suffix=70)),
    ((7, 9, 11), (4, 4, 8), 0.7, dict(suffix=65)), ((9, 9, 17), (4, 8, 8), 0.5, dict(prefix=1)),
    ((7, 9, 11), (4, 4, 4), 0.0, dict(suffix=5)),
    ((1, 13, 21), (1, 8, 8), 0.9, dict(prefix=2, suffix=4, hidden=(1, 4))),
    ((4, 4, 4), (4, 4, 4), 0.9, {}), ((2, 2, 2), (4, 4, 4), 0.0, dict(suffix=66, hidden=tuple(range(1, 66)))),
], ids=str)
def test_the_fused_route_and_the_three_steps_compute_one_function(thw, tile, sparsity, others, gated):
    md = metadata(thw, tile, sparsity, **others)
    q, k, v, gate = inputs(md)
    seen = []
    impl = VideoSparseAttentionImpl(3, 16, on_selection=lambda tiles, md: seen.append(tiles))
    out = impl.attend(q, k, v, md, gate if gated else None)
    wanted = three_steps(impl, q, k, v, md, gate if gated else None)
    assert out.is_contiguous()
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)
    assert torch.equal(*seen) and seen[0].dtype == torch.int32


def test_what_hidden_tokens_hold_reaches_only_their_own_rows():
    md = metadata((5, 5, 6), suffix=70, hidden=tuple(range(60, 70)))
    q, k, v, gate = inputs(md)
    impl = VideoSparseAttentionImpl(3, 16)
    clean = impl.attend(q, k, v, md, gate)
    for x in (k, v):
        x[:, -10:] = NAN
    assert torch.equal(impl.attend(q, k, v, md, gate), clean)


@pytest.mark.parametrize("thw, tile, others, gated, dtype, bound", [       # other tests take every dtype to each kernel
    ((5, 5, 6), (4, 4, 4), {}, True, torch.float16, 6e-4),
    ((3, 9, 7), (3, 5, 4), dict(prefix=2, suffix=3), True, torch.bfloat16, 8e-3),
    ((5, 5, 9), (4, 4, 8), dict(suffix=65), False, torch.float16, 6e-4),
    ((4, 9, 8), (4, 8, 8), dict(prefix=1), True, torch.bfloat16, 8e-3),
], ids=str)
def test_every_triton_kernel_together_gives_what_the_oracle_gives(worker, thw, tile, others, gated, dtype, bound):
    q, k, v, gate = inputs(metadata(thw, tile, **others), dtype, batch=2, heads=1, dim=64)
    gate = gate if gated else None
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    out, tiles = interpreted_kernel.attend_video(
        worker, *strided, v, gate, raw_latent_shape=thw, tile_size=tile, VSA_sparsity=0.6, **others)
    place = others.get("prefix", 0), others.get("suffix", 0)
    kept = {(b, h, i): tiles[b, h, i].tolist() for b in range(2) for h in range(1) for i in range(tiles.shape[2])}
    _, best, gaps = vsa_attention_oracle(q, k, v, gate, thw, tile, 0.6, *place)
    assert all(kept[row] == best[row] or gaps[row] < 1e-5 for row in best)
    wanted, *_ = vsa_attention_oracle(q, k, v, gate, thw, tile, 0.6, *place, selection=kept)
    assert float(relative_l2_per_tile(out, wanted, thw, tile, *place).max()) <= bound


class Allocations(TorchDispatchMode):
    """Every storage that an operator returns while the mode is on, but for those of the operands."""

    def __init__(self, *operands):
        super().__init__()
        self.known, self.made, self.held = {x.untyped_storage()._cdata for x in operands}, [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                self.known.add(x.untyped_storage()._cdata)
                self.made.append((x.untyped_storage().nbytes(), str(func), x.untyped_storage()._cdata))
                self.held.append(x)                                         # so that no address is used twice
        return result

    def beside(self, out):
        """[(bytes, operator)] of all but `out`, which must be among them."""
        assert out.untyped_storage()._cdata in [storage for *_, storage in self.made]
        return [(size, name) for size, name, storage in self.made if storage != out.untyped_storage()._cdata]


class Unlaunched:
    """Stands in for a kernel whose launches do nothing."""

    def __getitem__(self, launch_grid):
        return lambda *operands, **options: None


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "no gate"])
@pytest.mark.parametrize("thw, tile, others", [
    ((21, 30, 52), (4, 4, 4), {}), ((21, 30, 52), (3, 5, 4), dict(suffix=77)), ((9, 40, 50), (4, 8, 8), dict(prefix=5)),
], ids=str)
def test_beside_the_output_all_that_is_ever_allocated_is_smaller_than_q(monkeypatch, thw, tile, others, gated):
    pytest.importorskip("triton")
    import pack.kernels as kernels
    from pack.kernels.triton import block_sparse, select_tiles, tile_means
    for module, name in ((block_sparse, "block_sparse_forward"), (tile_means, "tile_means_forward"),
                         (select_tiles, "score_tiles"), (select_tiles, "select_rows")):
        monkeypatch.setattr(module, name, Unlaunched())
    for module, name, table in interpreted_kernel.triton_on_the_cpu():
        monkeypatch.setattr(module, name, table)
    for module, name in ((kernels, "_block_sparse_attention"), (tile_ops, "_tile_means"), (tile_ops, "_select_tiles")):
        monkeypatch.setattr(module, name, getattr(module, name)._init_fn)      # an operator's inside is not recorded
    md = metadata(thw, tile, 0.9, cache_tile_buf=False, **others)
    assert md.token_rows.numel() == md.padded_seq_length                        # part of the plan, made once
    q, k, v, gate = (torch.zeros(1, md.total_seq_length, 2, 128, dtype=torch.float16) for _ in range(4))
    impl = VideoSparseAttentionImpl(2, 128)
    with Allocations(q, k, v, gate) as allocations:
        out = impl.attend(q, k, v, md, gate if gated else None)
    beside = allocations.beside(out)
    assert len(beside) >= 3 and sum(size for size, _ in beside) < q.nbytes, sorted(beside)[-4:]


def test_the_reference_kernel_gathers_one_head_at_a_time():
    from pack.kernels import reference
    md = metadata((9, 20, 30), sparsity=0.9)
    q, k, v, _ = inputs(md, heads=12, batch=1, dim=64)
    lists = torch.zeros(1, 12, 1, 1, dtype=torch.int32), torch.ones(1, 12, 1, dtype=torch.int32)
    with Allocations(q, k, v) as allocations:
        out, _ = reference.run(q, k, v, *lists, md.kernel_block_sizes[:1], 1.0, False, md.token_rows[:64])
    assert max(allocations.beside(out))[0] < q.nbytes


@pytest.mark.parametrize("change", [
    lambda q, k, v, gate: (q[:, 1:], k, v, gate), lambda q, k, v, gate: (q, k[:1], v, gate),
    lambda q, k, v, gate: (q, k, v, gate[:, :, :1])])
def test_operands_that_do_not_fit_the_metadata_are_refused(change):
    md = metadata((5, 5, 6))
    q, k, v, gate = change(*inputs(md))
    with pytest.raises(ValueError, match="attend: found .*, wanted one shape with 150 tokens"):
        VideoSparseAttentionImpl(3, 16).attend(q, k, v, md, gate)


def test_operands_whose_head_dim_is_strided_are_read_all_the_same():
    md = metadata((5, 5, 6), suffix=2)
    parts = inputs(md)
    impl = VideoSparseAttentionImpl(3, 16)
    strided = [torch.stack([x, x], -1)[..., 0] for x in parts]
    assert torch.equal(impl.attend(*strided[:3], md, strided[3]), impl.attend(*parts[:3], md, parts[3]))


def test_a_sequence_of_other_tokens_only_beside_one_tile_is_dense_attention():
    md = metadata((2, 2, 2), sparsity=0.9, prefix=64, suffix=9)
    q, k, v, _ = inputs(md)
    out = VideoSparseAttentionImpl(3, 16).attend(q, k, v, md)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-6)
    assert len(other_tokens((2, 2, 2), 64, 9)) + math.prod((2, 2, 2)) == md.total_seq_length


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "no gate"])
def test_the_fused_route_compiles_into_one_graph(monkeypatch, gated):
    md = metadata((5, 5, 6), suffix=2)
    monkeypatch.setattr(type(md), "topk", md.topk)                          # its exact arithmetic breaks the graph
    q, k, v, gate = inputs(md)
    impl = VideoSparseAttentionImpl(3, 16)

    def attend(q, k, v, gate):
        return impl.attend(q, k, v, md, gate if gated else None) * 2

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q, k, v, gate), attend(q, k, v, gate))
