"""The Triton kernels compile for every card of their table, in processes that are not the interpreter's."""
from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
SHARED_KB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_120": 99}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    report = tmp_path_factory.mktemp("aot") / "table.json"
    done = subprocess.run([sys.executable, ROOT / "dev" / "aot.py", "--fewer", "--jobs", "2", "--json", report],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(report.read_text())


def test_what_holds_most_is_compiled_for_every_card_and_every_variant_for_the_one_that_matters_most(table):
    seen = {(row["arch"], row["D"], row["dtype"], row["variant"]) for row in table
            if row["kernel"] == "block_sparse_forward"}
    variants = ("", "lse", "gather", "gather lse", "gather far", "gather combine", "gather combine lse",
                "gather combine far lse", "int8 gather", "int8 gather far", "int8 gather combine",
                "int8 gather combine far lse")
    most = "gather combine far lse"
    assert seen == {*((arch, dim, "bf16", variant) for arch in SHARED_KB for dim in (64, 128)
                      for variant in (most, variants[-1])),
                    *(("sm_89", 128, "bf16", variant) for variant in variants),
                *(("sm_89", 128, "fp16", variant) for variant in (most, variants[-1])),
                    *(("sm_89", 64, "bf16", variant) for variant in ("gather far", "int8 gather far"))}
    others = {(row["kernel"], row["arch"], row["D"], row["dtype"]) for row in table
              if row["kernel"] != "block_sparse_forward"}
    of_all = {("tile_means_forward", "bf16"): (64, 128), ("sum_keys", "bf16"): (64, 128),
              ("quantise_keys", "bf16"): (64, 128), ("score_tiles", "fp32"): (64, 128),
              ("select_rows", "fp32"): (500, 1000, 2000, 4096)}
    assert others == {(kernel, arch, size, dtype) for arch in SHARED_KB for (kernel, dtype), sizes in of_all.items()
                      for size in sizes[0 if arch == "sm_89" else -1:]} | {
        (kernel, "sm_89", 128, "fp16") for kernel in ("tile_means_forward", "sum_keys", "quantise_keys")}


def test_the_command_itself_leaves_no_variant_out():
    import aot
    rows = {entry[1:] for card in aot.CARDS for entry in aot.entries(card)}
    assert len(rows) * len(aot.CARDS) == sum(1 for card in aot.CARDS for _ in aot.entries(card)) == 250
    assert {variant for kernel, _, dtype, variant in rows if dtype == "fp16"} == {
        "", "lse", "gather lse", "gather combine far lse", "int8 gather combine far lse"}


def test_nothing_spills(table):
    assert [row for row in table if row["spill B"] or row["in loop"]] == []


def test_a_spill_is_a_fault_except_for_what_is_known_outside_of_the_loop(table):
    import aot
    row = next(row for row in table if row["variant"] == "int8 gather" and row["D"] == 128)
    known = row | {"arch": "sm_120", "spill B": aot.MAY_SPILL["int8 gather"]}
    assert not list(aot.faults(row)) and not list(aot.faults(known))
    assert "2 instructions of its loop are about spills" in next(aot.faults(known | {"in loop": 2}))
    for more in ({"spill B": 20}, {"arch": "sm_89"}, {"D": 64}, {"variant": "int8 gather far"}, {"variant": "gather"}):
        assert "bytes, wanted" in next(aot.faults(known | more)), more


def test_shared_memory_fits_every_card(table):
    assert [row for row in table if row["shared KB"] > SHARED_KB[row["arch"]]] == []


def test_every_multiprocessor_holds_two_programs(table):
    assert [row for row in table if row["CTAs"] < 2] == []


def test_products_run_on_tensor_cores(table):
    for row in table:
        if row["kernel"] != "block_sparse_forward":
            continue
        assert row["HGMMA" if row["arch"] == "sm_90" else "HMMA"] > 0, row
        assert (row["IMMA"] > 0) == ("int8" in row["variant"]), row


def test_integer_scores_take_half_the_instructions_of_scores_and_less_room(table):
    """A product of 16x8x32 in integers takes the place of two of 16x8x16."""
    rows = {(row["arch"], row["D"], row["variant"]): row for row in table
            if row["kernel"] == "block_sparse_forward" and row["dtype"] == "bf16"}
    for (arch, dim, variant), row in rows.items():
        if variant.startswith("int8"):
            exact = rows[arch, dim, variant.removeprefix("int8 ")]
            products = "HGMMA" if arch == "sm_90" else "HMMA"
            assert row[products] == exact[products] // 2 and row["IMMA"] == exact[products] // 4, (arch, dim)
            assert 4 * dim * 64 / 1024 <= row["shared KB"] < 0.75 * exact["shared KB"]


def test_by_the_code_integer_scores_may_reach_two_and_a_half_times_the_speed_of_exact_ones_on_a_4090(table):
    """The products bind, not what is around them."""
    bounds = {(row["D"], row["variant"]): row["bound"] for row in table
              if row["kernel"] == "block_sparse_forward" and row["arch"] == "sm_89" and row["dtype"] == "bf16"}
    for dim in (64, 128):
        assert 150 <= bounds[dim, "gather far"] <= 166, (dim, bounds)
        assert bounds[dim, "int8 gather far"] >= 2.5 * bounds[dim, "gather far"], (dim, bounds)


def test_the_loop_is_the_one_with_the_products():
    from loop_bound import bound, inner_loop
    listing = """
        /*0000*/                   HMMA.16816.F32.BF16 R0, R1, R2, R3 ;
        /*0010*/                   LDSM.16.M88.4 R0, [R1] ;
        /*0020*/                   HMMA.16816.F32.BF16 R0, R1, R2, R3 ;
        /*0030*/                   HMMA.16816.F16 R0, R1, R2, R3 ;
        /*0040*/                   MUFU.EX2 R0, R1 ;
        /*0050*/              @!P0 FADD R0, R1, R2 ;
        /*0060*/                   STL [R1+0x4], R2 ;
        /*0070*/              @P1  BRA 0x10 ;
        /*0080*/                   FADD R0, R1, R2 ;
        /*0090*/                   BRA 0x80 ;
    """
    counts = inner_loop(listing)
    assert counts == {"HMMA": 1, "HMMA.F16": 1, "MUFU": 1, "shared": 1, "spilled": 1, "other": 2}
    assert bound(counts, 64) == pytest.approx(4 * 64 ** 3 / 4 / (32 + 16) * 128 * 4 * 2.52e9 / 1e12)
    assert not inner_loop("/*0000*/ EXIT ;") and bound(inner_loop(""), 64) == 0


def test_every_candidate_compiles_and_what_cannot_be_launched_is_marked(tmp_path):
    from pack.kernels.triton.configs import BF16, CANDIDATES, config_for
    report = tmp_path / "candidates.json"
    done = subprocess.run([sys.executable, ROOT / "dev" / "aot.py", "--candidates", "--arch", "sm_86", "--sizes", "128",
                           "--jobs", "2", "--json", report], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())
    assert [(row["warps"], row["stages"]) for row in rows] == [config[:2] for config in CANDIDATES]
    assert {(row["arch"], row["D"], row["dtype"], row["variant"]) for row in rows} == {
        ("sm_86", 128, "bf16", "gather combine far lse")}
    for row in rows:
        fits, entry = row["shared KB"] <= SHARED_KB["sm_86"], config_for((8, 6), row["D"], BF16)
        assert ("does not fit" in row["note"]) != fits and (row["CTAs"] > 0) == fits and row["HMMA"] > 0
        assert ("spills" in row["note"]) == (row["spill B"] > 0)
        assert ("in the table" in row["note"]) == ((row["warps"], row["stages"]) == entry[:2])


LENGTHS = {"lists", "key_blocks", "tokens", "tiles", "far_tiles", "blocks_per_tile", "queries", "keys", "kept",
           "always"}
CONSTANTS = {"block_sparse_forward": {"D", "BLOCK", "RETURN_LSE", "GATHER", "COMBINE", "START", "INT8", "HALF",
                                      "INTERPRET"},
             "sum_keys": {"D", "BLOCK", "GATHER", "HALF"}, "quantise_keys": {"D", "BLOCK", "GATHER", "COPY"},
             "tile_means_forward": {"D", "BLOCK", "PARTS"}, "score_tiles": {"D", "TILE", "DEPTH"},
             "select_rows": {"ROW"}}


def test_nothing_that_follows_the_sequence_length_is_compiled_in():
    source = (
        "import aot; aot.load_pack()\n"
        "from pack.kernels.triton import block_sparse, quantise, select_tiles, tile_means\n"
        "assert not block_sparse.INTERPRET\n"
        "kernels = (block_sparse.block_sparse_forward, tile_means.tile_means_forward, select_tiles.score_tiles,\n"
        "           select_tiles.select_rows, quantise.sum_keys, quantise.quantise_keys)\n"
        "print({k.__name__: {p.name: (p.is_constexpr, p.do_not_specialize) for p in k.params} for k in kernels})\n")
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True,
                          cwd=ROOT / "dev")
    for kernel, parameters in ast.literal_eval(done.stdout).items():
        assert {name for name, (constant, _) in parameters.items() if constant} == CONSTANTS[kernel]
        for name in parameters:
            if name.startswith(("stride_i", "stride_c", "stride_m", "stride_f", "stride_l")) or name in LENGTHS:
                assert parameters[name][1], f"{name} is specialised: another length would compile again"


NO_CARD = """
import aot
aot.load_pack()
import torch, triton
from triton.backends.compiler import GPUTarget
from pack.kernels.triton import block_sparse, int8_scores, quantise, select_tiles, tile_means

class NoCard:
    def get_current_target(self): return GPUTarget("cuda", 89, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

triton.runtime.driver.set_active(NoCard())

def watch(kernel):
    built, launch = [], kernel.run
    kernel.run = lambda *args, warmup, **options: built.append(launch(*args, warmup=True, **options))
    return built
"""


def builds(source):
    done = subprocess.run([sys.executable, "-c", NO_CARD + source], capture_output=True, text=True, cwd=ROOT / "dev")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


def test_a_sequence_length_list_length_or_batch_never_seen_compiles_nothing():
    assert builds("""
built = watch(block_sparse.block_sparse_forward)
for batch, rows, width in ((1, 2, 2), (1, 3, 3), (1, 10, 7), (2, 33, 16), (1, 1, 1)):
    q = torch.zeros(batch, rows * 64, 3, 128, dtype=torch.bfloat16)
    indices = torch.zeros(batch, 3, rows, width, dtype=torch.int32)
    counts, sizes = torch.zeros(batch, 3, rows, dtype=torch.int32), torch.zeros(rows, dtype=torch.int32)
    block_sparse.run(q, q, q, indices, counts, sizes, 0.1, False)
    stored_otherwise = q.transpose(1, 2).contiguous().transpose(1, 2)
    block_sparse.run(stored_otherwise, q, q, indices[:, :1].expand_as(indices), counts, sizes, 0.1, False)
print(len(built), len(set(map(id, built))))
""") == ["10", "1"]


def test_a_clip_of_another_length_compiles_no_fused_kernel_again():
    assert builds("""
kernels = (block_sparse.block_sparse_forward, tile_means.tile_means_forward, select_tiles.score_tiles,
           select_tiles.select_rows, quantise.sum_keys, quantise.quantise_keys)
built = [watch(kernel) for kernel in kernels]
for batch, tokens, tiles, per_tile, others, k in ((1, 65, 2, 1, 0, 1), (1, 190, 3, 1, 1, 2), (2, 1001, 8, 2, 3, 7),
                                                  (1, 64, 1, 1, 0, 1), (1, 9999, 160, 1, 16, 16)):
    q = torch.zeros(batch, tokens, 3, 128, dtype=torch.bfloat16)
    blocks = tiles * per_tile + others
    token_rows, sizes = torch.zeros(blocks * 64, dtype=torch.int32), torch.zeros(blocks, dtype=torch.int32)
    means = tile_means.run([q, q, q], token_rows, tiles, per_tile)
    lists = select_tiles.run(means[0], means[1], k, 0.1, per_tile, others)
    counts = lists[..., 0].contiguous()
    for coarse in (means[2], means[2].transpose(1, 2).contiguous().transpose(1, 2)):
        block_sparse.run(q, q, q, lists, counts, sizes, 0.1, False, token_rows, q, coarse, per_tile, None, coarse,
                         coarse[..., 0])
        int8_scores.run(q, q, q, lists, counts, sizes, 0.1, False, token_rows, q, coarse, per_tile, None, coarse,
                        coarse[..., 0])
print(*(len(set(map(id, one))) for one in built))
""") == ["2", "1", "1", "1", "1", "1"]


def test_launch_options_that_are_given_take_the_place_of_the_tables():
    assert builds("""
built = watch(block_sparse.block_sparse_forward)
q = torch.zeros(1, 64, 1, 64, dtype=torch.bfloat16)
lists, sizes = torch.zeros(1, 1, 1, 1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
for config in (None, block_sparse.Config(8, 1)):
    block_sparse.run(q, q, q, lists, lists[..., 0], sizes, 0.1, False, config=config)
print(*(f"{one.metadata.num_warps},{one.metadata.num_stages}" for one in built))
""") == ["4,2", "8,1"]
