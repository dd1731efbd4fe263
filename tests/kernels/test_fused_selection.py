"""Means of tiles and the lists of the best ones: torch and Triton against floats and loops that share no code."""
from __future__ import annotations

import importlib.util

import pytest
import torch

import interpreted_kernel
from pack.kernels import Call, NoKernel, reference_tiles, select_tiles, tile_means, tile_ops
from pack.kernels.spec import KernelSpec

NAN = float("nan")
TORCH, INTERPRETED = "torch", "triton in the interpreter"


@pytest.fixture(params=[TORCH, INTERPRETED])
def means_of(request):
    if request.param == TORCH:
        return reference_tiles.tile_means
    worker = request.getfixturevalue("worker")
    return lambda *operands: interpreted_kernel.call(worker, "tile_means", *operands)


@pytest.fixture(params=[TORCH, INTERPRETED])
def select(request):
    if request.param == TORCH:
        return reference_tiles.select_tiles
    worker = request.getfixturevalue("worker")
    return lambda *operands: interpreted_kernel.call(worker, "select_tiles", *operands)


def rows_of_tiles(sizes, blocks_per_tile, generator, others=3):
    """token_rows whose tiles hold these many tokens, drawn from a sequence with `others` more, and its length."""
    tokens = sum(sizes) + others
    order, rows = torch.randperm(tokens, generator=generator).tolist(), []
    for size in sizes:
        rows += [order.pop() for _ in range(size)] + [-1] * (blocks_per_tile * 64 - size)
    return torch.tensor(rows + order + [-1] * (64 - others), dtype=torch.int32), tokens


@pytest.mark.parametrize("sizes, blocks_per_tile", [
    ((60, 60, 30), 1), ((64, 1, 64, 37), 1), ((128, 65), 2), ((250,), 4)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("parts", [2, 3])
def test_means_are_those_of_every_tiles_own_tokens(means_of, sizes, blocks_per_tile, dtype, parts):
    generator = torch.Generator().manual_seed(5)
    rows, tokens = rows_of_tiles(sizes, blocks_per_tile, generator)
    tensors = [torch.randn(2, tokens, 2, 64, generator=generator).to(dtype) for _ in range(parts)]
    video = rows[:len(sizes) * blocks_per_tile * 64]
    for x in tensors:
        x[:, [row for row in range(tokens) if row not in video.tolist()]] = NAN
    tensors[1] = tensors[1].transpose(1, 2).contiguous().transpose(1, 2)
    means = means_of(tensors, rows, len(sizes), blocks_per_tile)
    assert means.shape == (parts, 2, 2, len(sizes), 64) and means.dtype == torch.float32
    for tile, its in enumerate(video.view(len(sizes), -1)):
        for mean, x in zip(means, tensors):
            wanted = x[:, its[its >= 0].long()].double().mean(1)
            torch.testing.assert_close(mean[:, :, tile].double(), wanted, rtol=1e-6, atol=1e-6)


def test_means_in_parts_are_those_made_at_once(monkeypatch):
    generator = torch.Generator().manual_seed(6)
    rows, tokens = rows_of_tiles((60, 64, 20, 64, 3), 1, generator)
    x = torch.randn(2, tokens, 3, 16, generator=generator)
    wanted = reference_tiles.tile_means([x, x * 2], rows, 5, 1)
    monkeypatch.setattr(reference_tiles, "_MEANS_CHUNK_BYTES", {"cpu": 2 * x[:, :64].nbytes})
    assert torch.equal(reference_tiles.tile_means([x, x * 2], rows, 5, 1), wanted)


def wanted_lists(scores, k, blocks_per_tile=1, always=0):
    """The rules, one row at a time in plain Python: NaN lowest, then by score, then by index."""
    lists = []
    for row in scores.flatten(0, 2).tolist():
        clean = [-float("inf") if score != score else score for score in row]
        best = sorted(sorted(range(len(row)), key=lambda i: (-clean[i], i))[:k])
        blocks = [tile * blocks_per_tile + i for tile in best for i in range(blocks_per_tile)]
        first = len(row) * blocks_per_tile
        lists += [blocks + list(range(first, first + always))] * blocks_per_tile
    batch, heads, queries, _ = scores.shape
    return torch.tensor(lists, dtype=torch.int32).view(batch, heads, queries * blocks_per_tile, -1)


def means_of_scores(scores, dim=64):
    """Unit queries and the keys that give them exactly these scores.   [B, H, Nq <= dim, Nk]"""
    queries = torch.eye(scores.shape[2], dim).expand(*scores.shape[:2], -1, -1).contiguous()
    keys = torch.nn.functional.pad(scores.transpose(2, 3), (0, dim - scores.shape[2])).contiguous()
    return queries, keys


def tied(generator, keys):
    return torch.randint(-2, 3, (1, 2, 5, keys), generator=generator).float()


def alike(generator, keys):
    return torch.zeros(1, 1, 3, keys)


def far_apart(generator, keys):
    exponent = torch.randint(-120, 120, (1, 1, 6, keys), generator=generator)
    return torch.ldexp(torch.randn(1, 1, 6, keys, generator=generator).sign(), exponent)


def signed_zeros(generator, keys):
    return torch.where(torch.rand(1, 1, 4, keys, generator=generator) < 0.5, -0.0, 0.0)


def neighbours(generator, keys):
    """Scores one bit apart, above and below zero."""
    bits = torch.tensor([1.0, -1.0]).view(torch.int32)[:, None] + torch.randint(0, 9, (2, keys), generator=generator)
    return bits.int().view(torch.float32)[None, None]


@pytest.mark.parametrize("keys", [1, 7, 100])
@pytest.mark.parametrize("scores_of", [tied, alike, far_apart, signed_zeros, neighbours])
def test_exact_scores_give_exactly_the_wanted_lists(select, scores_of, keys):
    scores = scores_of(torch.Generator().manual_seed(keys), keys)
    for k in sorted({1, max(1, keys // 3), keys}):
        assert torch.equal(select(*means_of_scores(scores), k, 1.0, 1, 0), wanted_lists(scores, k))


@pytest.mark.parametrize("k", [1, 4, 9, 19, 20])
def test_nan_and_infinite_scores_have_their_places(select, k):
    scores = torch.arange(20).flip(0).float().repeat(1, 1, 1, 1)
    queries, keys = means_of_scores(scores)
    queries[..., 1:] = 0
    keys[:, :, [0, 7, 19], 0] = torch.tensor([NAN, torch.inf, -torch.inf])
    keys[:, :, 3, 0] = NAN
    keys[..., 1:] = 0
    scores = torch.where(torch.isnan(keys[..., 0]), NAN, keys[..., 0])[:, :, None]
    assert torch.equal(select(queries, keys, k, 1.0, 1, 0), wanted_lists(scores, k))
    queries[:] = NAN
    assert torch.equal(select(queries, keys, k, 1.0, 1, 0), wanted_lists(torch.full_like(scores, NAN), k))


@pytest.mark.parametrize("blocks_per_tile, always", [(1, 1), (2, 0), (2, 3), (4, 40), (6, 1)])
def test_lists_name_every_block_of_a_tile_and_close_with_the_other_blocks(select, blocks_per_tile, always):
    scores = tied(torch.Generator().manual_seed(9), 30)
    lists = select(*means_of_scores(scores), 7, 1.0, blocks_per_tile, always)
    assert lists.is_contiguous()
    assert torch.equal(lists, wanted_lists(scores, 7, blocks_per_tile, always))


@pytest.mark.parametrize("keys, dim, k", [(300, 128, 37), (513, 64, 100), (1025, 64, 7), (2160, 128, 216)])
def test_triton_keeps_the_tiles_that_torch_keeps_except_for_near_ties(worker, keys, dim, k):
    generator = torch.Generator().manual_seed(keys)
    queries, means = (torch.randn(1, 2, n, dim, generator=generator) for n in (4, keys))
    lists = interpreted_kernel.call(worker, "select_tiles", queries, means, k, dim ** -0.5, 1, 0)
    wanted = reference_tiles.select_top_tiles(queries, means, k, dim ** -0.5)
    scores = queries.double() @ means.double().mT * dim ** -0.5
    for head in range(2):
        for row in range(4):
            found, best, score = lists[0, head, row].long(), wanted[0, head, row].long(), scores[0, head, row]
            assert bool((found[1:] > found[:-1]).all())
            assert float(score[best].sum() - score[found].sum()) <= 1e-6
            assert len(set(found.tolist()) ^ set(best.tolist())) <= 2


def test_heads_selected_in_parts_are_those_selected_at_once(worker):
    generator = torch.Generator().manual_seed(11)
    queries, means = (torch.randint(-3, 4, (2, 3, n, 64), generator=generator).float() for n in (3, 70))
    wanted = reference_tiles.select_top_tiles(queries, means, 9, 0.125)
    for bound in (1, 2 * 3 * 80 * 4):
        found = interpreted_kernel.select_within(worker, bound, queries, means, 9, 0.125, 1, 0)
        assert torch.equal(found, wanted)


def test_strided_means_give_the_same_lists(select):
    generator = torch.Generator().manual_seed(12)
    queries, means = (torch.randint(-3, 4, (2, n, 3, 64), generator=generator).float() for n in (5, 40))
    strided = queries.transpose(1, 2), means.transpose(1, 2)
    assert torch.equal(select(*strided, 6, 0.5, 1, 0), select(*(x.contiguous() for x in strided), 6, 0.5, 1, 0))


@pytest.mark.parametrize("call", [
    lambda x, r: tile_means((x,) * 4, r, 1), lambda x, r: tile_means((x, x.half()), r, 1),
    lambda x, r: tile_means((x,), r.long(), 1), lambda x, r: tile_means((x,), r, 2),
    lambda x, r: tile_means((x.transpose(1, 3),), r, 1), lambda x, r: tile_means((x,), r, 0),
    lambda x, r: select_tiles(x, x, 0, 1.0), lambda x, r: select_tiles(x, x, 4, 1.0),
    lambda x, r: select_tiles(x, x.half(), 1, 1.0), lambda x, r: select_tiles(x, x[..., :8], 1, 1.0),
    lambda x, r: select_tiles(x, x, 1, 1.0, 0), lambda x, r: select_tiles(x, x, 1, 1.0, 1, -1),
])
def test_operands_that_break_the_contract_are_refused_with_what_was_wanted(call):
    x, rows = torch.randn(1, 2, 3, 16), torch.full((64,), -1, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^(tile_means|select_tiles): found .*, wanted "):
        call(x, rows)


def test_the_ops_keep_their_promises_to_the_compiler():
    x = torch.randn(2, 70, 3, 16)
    rows = torch.full((128,), -1, dtype=torch.int32)
    rows[:70] = torch.arange(70)
    ops = torch.ops.video_sparse_attention
    torch.library.opcheck(ops.tile_means.default, ([x, x], rows, 2, 1, "auto"))
    means = torch.randn(2, 3, 9, 16)
    torch.library.opcheck(ops.select_tiles.default, (means, means, 4, 0.5, 2, 1, "auto"))


GPU = Call("cuda", (8, 9), torch.float32, 128)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_beside_the_reference_torch_selects_and_beside_any_other_kernel_the_first_that_is_right():
    table = tile_ops.SELECT_KERNELS
    for backend in ("auto", "triton", "cuda_sm90", "triton_select_tiles"):
        assert tile_ops.choose_beside(table, GPU, backend).name == "triton_select_tiles"
    assert tile_ops.choose_beside(table, GPU, "reference").name == "reference_select_tiles"


@pytest.mark.parametrize("call", [Call("cpu", None, torch.float32, 128), Call("cuda", (8, 9), torch.float32, 96),
                                  Call("cuda", (7, 5), torch.float32, 128), Call("rocm", None, torch.float32, 64)])
def test_torch_takes_what_no_other_kernel_takes(call):
    for table in (tile_ops.MEANS_KERNELS, tile_ops.SELECT_KERNELS):
        for backend in ("auto", "triton", "cuda_sm90", "reference"):
            assert tile_ops.choose_beside(table, call, backend) is table[-1]
        with pytest.raises(NoKernel, match=f"{table[0].name}: "):
            tile_ops.choose_beside(table, call, table[0].name)


def test_a_row_longer_than_a_kernel_holds_and_a_kernel_that_fails_go_to_torch(monkeypatch):
    def load():
        raise tile_ops.KernelUnusable("not here")

    broken = KernelSpec("triton_select_tiles", load, ("cpu",), ("cpu",), (torch.float32,))
    monkeypatch.setattr(tile_ops, "SELECT_KERNELS", (broken, reference_tiles.SELECT_SPEC))
    means = torch.randn(1, 1, 6, 16)
    wanted = reference_tiles.select_tiles(means, means, 2, 1.0, 1, 0)
    assert torch.equal(select_tiles(means, means, 2, 1.0), wanted)
    unwanted = KernelSpec("triton_select_tiles", lambda: pytest.fail, ("cpu",), ("cpu",), (torch.float32,))
    monkeypatch.setattr(tile_ops, "SELECT_KERNELS", (unwanted, reference_tiles.SELECT_SPEC))
    monkeypatch.setattr(tile_ops.triton, "MAX_TILES", 5)
    assert torch.equal(select_tiles(means, means, 2, 1.0), wanted)
