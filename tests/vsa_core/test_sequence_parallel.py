"""A sequence over several ranks: what moves, where to, and what happens when one of them fails."""
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pack.vsa_core.sequence_parallel import (
    even_shares,
    get_sp_group,
    get_sp_parallel_rank,
    get_sp_world_size,
    ranges_of,
    sequence_model_parallel_all_gather,
    sequence_model_parallel_all_to_all_4D,
    sequence_model_parallel_shard,
    set_sp_group,
)
from pack.vsa_core.thread_ranks import Meeting, RankFailed, ThreadRanks, run_as_ranks
from rank_groups import ENGINES, by_copies

ROOT = Path(__file__).resolve().parents[2]


def whole(tokens, heads, dtype=torch.float32):
    numbers = torch.arange(2 * tokens * heads * 4, dtype=torch.float32)
    return (numbers % 251).reshape(2, tokens, heads, 4).to(dtype)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("world_size", "tokens", "heads", "dtype"), [
    (2, 6, 4, torch.float32), (3, 10, 7, torch.bfloat16), (4, 5, 6, torch.float16), (3, 2, 3, torch.float64)])
def test_every_rank_gets_all_rows_of_its_heads_and_gives_them_back(engine, world_size, tokens, heads, dtype):
    x = whole(tokens, heads, dtype)
    rows, shares = even_shares(tokens, world_size), even_shares(heads, world_size)

    def work(group):
        assert (get_sp_world_size(), get_sp_parallel_rank()) == (world_size, group.rank_in_group)
        mine = sequence_model_parallel_shard(x)
        for_heads = sequence_model_parallel_all_to_all_4D(mine, 2, 1, rows)
        back = sequence_model_parallel_all_to_all_4D(for_heads, 1, 2, shares)
        return mine, for_heads, back, sequence_model_parallel_all_gather(for_heads, 2, shares), group

    results = ENGINES[engine](world_size, work)
    for row, head, (mine, for_heads, back, gathered, group) in zip(
            ranges_of(rows), ranges_of(shares), results, strict=True):
        assert torch.equal(mine, x[:, row.start:row.stop]) and torch.equal(back, mine)
        assert torch.equal(for_heads, x[:, :, head.start:head.stop]) and torch.equal(gathered, x)
        size, others = x.element_size() * 2 * 4, heads - len(head)
        assert group.exchanges == 3
        assert group.sent_bytes == size * (len(row) * others + len(head) * (tokens - len(row))
                                           + (world_size - 1) * len(head) * tokens)


def test_outside_of_a_group_one_rank_has_everything():
    x = whole(5, 3)
    assert (get_sp_world_size(), get_sp_parallel_rank()) == (1, 0)
    for moved in (sequence_model_parallel_all_to_all_4D(x), sequence_model_parallel_all_to_all_4D(x, 1, 2),
                  sequence_model_parallel_all_gather(x), sequence_model_parallel_shard(x)):
        assert torch.equal(moved, x)
    with pytest.raises(RuntimeError, match="wanted `with set_sp_group"):
        get_sp_group()


def test_groups_nest_and_belong_to_their_thread():
    seen, one = [], ThreadRanks(Meeting(1), 1, 0)
    with set_sp_group(one) as outer, set_sp_group(ThreadRanks(Meeting(1), 1, 0)) as inner:
        assert get_sp_group() is inner is not outer
        thread = threading.Thread(target=lambda: seen.append(get_sp_world_size()))
        thread.start()
        thread.join()
    assert seen == [1] and get_sp_world_size() == 1


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("fails", [0, 1])
def test_a_rank_that_fails_ends_the_others_at_once_and_is_named(world_size, fails):
    def work(group):
        if group.rank_in_group == fails:
            raise MemoryError("planted")
        sequence_model_parallel_all_to_all_4D(whole(4, 4))

    before, begun = threading.active_count(), time.perf_counter()
    with pytest.raises(RankFailed, match=f"rank {fails}: MemoryError: planted") as found:
        by_copies(world_size, work)
    assert found.value.rank == fails and isinstance(found.value.error, MemoryError)
    assert time.perf_counter() - begun < 5 and threading.active_count() == before


def test_ranks_that_do_not_run_the_same_are_told_and_do_not_hang():
    def work(group):
        if group.rank_in_group:
            sequence_model_parallel_all_to_all_4D(whole(4, 4))

    with pytest.raises(RankFailed, match="the ranks do not run the same model: .*the end.*exchange|exchange.*the end"):
        by_copies(2, work)
    with pytest.raises(RankFailed, match=r"exchange: rank \d got .*wanted"):
        by_copies(2, lambda group: sequence_model_parallel_all_to_all_4D(whole(4 + group.rank_in_group, 4)))
    assert run_as_ranks([lambda: 1, lambda: 2]) == [1, 2]


def test_what_cannot_be_exchanged_is_refused():
    with pytest.raises(ValueError, match=r"from dim 3 to 1: wanted \[batch, sequence, heads"):
        sequence_model_parallel_all_to_all_4D(whole(4, 4), 3, 1)
    with pytest.raises(ValueError, match="wanted .*batch"):
        sequence_model_parallel_all_to_all_4D(whole(4, 4)[0])
    with pytest.raises(RankFailed, match="2 heads for 3 ranks: wanted at least one head for each"):
        by_copies(3, lambda group: sequence_model_parallel_all_to_all_4D(whole(4, 2)))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_is_refused_and_not_lost(engine):
    def work(group):
        x = whole(4, 4).requires_grad_()
        with torch.no_grad():
            assert not sequence_model_parallel_all_to_all_4D(x).requires_grad
        moved = sequence_model_parallel_all_gather(sequence_model_parallel_all_to_all_4D(x))
        with pytest.raises(RuntimeError, match="no backward pass.*torch.no_grad"):
            moved.sum().backward()
        return moved.requires_grad

    assert ENGINES[engine](2, work) == [True, True]


PROCESS = """
import importlib.util, os, sys
import torch, torch.distributed as dist
root, store, rank = sys.argv[1:]
sys.path.insert(0, root + "/tests")
spec = importlib.util.spec_from_file_location("pack", root + "/__init__.py", submodule_search_locations=[root])
sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["pack"])
from pack.vsa_core import DistributedAttention
from pack.vsa_core.forward_context import set_forward_context
from pack.vsa_core.sequence_parallel import sequence_model_parallel_all_gather, set_sp_group
dist.init_process_group("gloo", init_method="file://" + store, rank=int(rank), world_size=2)
q, k, v = torch.randn(3, 1, 7, 3, 8, generator=torch.Generator().manual_seed(0))
rows = 4, 3
mine = slice(0, 4) if rank == "0" else slice(4, 7)
with set_sp_group(dist.group.WORLD), set_forward_context(None):
    out, text = DistributedAttention(3, 8)(q[:, mine], k[:, mine], v[:, mine], sequence_rows=rows)
    out = sequence_model_parallel_all_gather(out, 1, rows)
wanted = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
assert text is None and (out - wanted).norm() <= 1e-6 * wanted.norm()
print("right")
"""


def test_two_processes_are_as_good_as_two_threads(tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([sys.executable, "-c", PROCESS, str(ROOT), str(tmp_path / "store"), str(rank)], env=env,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)]
    for process in ranks:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0 and out.endswith("right\n"), out
