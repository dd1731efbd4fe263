"""The tuning goes through its steps on a CPU, reports what fails, and changes the table for more than noise only."""
from __future__ import annotations

import json
import math

import pytest
import torch

from pack.kernels.triton.configs import BF16, CANDIDATES, CONFIGS, DEFAULT, FP16, Config

LATER = math.inf


@pytest.fixture
def tune(load):
    return load("tune")


@pytest.fixture
def operands():
    """Two tiles, 64 and 36 tokens, one head."""
    rows = torch.full((128,), -1, dtype=torch.int32)
    rows[:100] = torch.randperm(100, generator=torch.Generator().manual_seed(1)).int()
    return torch.zeros(1, 100, 1, 64, dtype=torch.bfloat16), rows


def test_a_dry_run_times_every_candidate_and_says_that_it_means_nothing(tune, tmp_path, capsys):
    target = tune.main(["--dry-run", "--out", str(tmp_path), "--rounds", "2"])
    report = json.loads(target.read_text())
    assert target.name == f"{report['date']}-dry-run-tune.json"
    assert report["dry_run"] is True and report["hardware"]["gpu"] is None and report["versions"]["torch"]
    assert len(report["files"]) == 64 and report["sparsity"] == 0.9
    seen = [(row["head_dim"], row["dtype"], row["shape"], row["num_warps"], row["num_stages"])
            for row in report["rows"]]
    expected = {(dim, dtype, shape.name, config.num_warps, config.num_stages) for dim in (64, 128)
                for dtype in ("bf16", "fp16") for shape in tune.SHAPES for config in CANDIDATES}
    assert set(seen) == expected and len(seen) == len(expected)
    assert all(row["ms"] > 0 and row["spread"] >= 0 and row["rounds"] == 2 for row in report["rows"])
    assert {(row["num_warps"], row["num_stages"]) for row in report["rows"] if row["present"]} == {DEFAULT[:2]}
    assert [verdict["reason"] for verdict in report["verdicts"]] == ["a CPU has no entry"] * 4
    text = target.with_suffix(".md").read_text()
    assert "dry run: numbers mean nothing" in text and text.count("| present |") == 8
    assert "- head_dim 64, bf16: stays: a CPU has no entry" in text and text in capsys.readouterr().out


def test_what_the_time_does_not_suffice_for_is_said(tune, tmp_path):
    report = json.loads(tune.main(["--dry-run", "--out", str(tmp_path), "--seconds", "0"]).read_text())
    assert {row["reason"] for row in report["rows"]} == {tune.NO_TIME}


def test_without_a_gpu_only_a_dry_run_is_made(tune, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device: use --dry-run"):
        tune.main([])


@pytest.mark.parametrize("wrong", [["--shapes", "H1 1"], ["--head-dims", "96"], ["--dtypes", "fp32"],
                                   ["--rounds", "0"], ["--sparsity", "1"], ["--sparsity", "-0.1"]], ids=" ".join)
def test_an_argument_that_fits_no_candidate_is_refused(tune, wrong):
    with pytest.raises(SystemExit):
        tune.parse(wrong)


def test_the_arguments_measure_all_of_the_table_in_less_than_five_minutes(tune):
    args = tune.parse([])
    assert args.seconds < 300 and args.shapes == [shape.name for shape in tune.SHAPES]
    assert {(dim, tune.DTYPES[dtype]) for dim in args.head_dims for dtype in args.dtypes} \
        == {(dim, dtype) for _, dim, dtype in CONFIGS}


def test_the_shapes_are_named_after_their_heads_and_tokens(tune):
    for shape in tune.SHAPES:
        assert shape.name == f"H{shape.heads} {math.prod(shape.grid)}"


def test_a_candidate_that_does_not_launch_has_its_reason_and_the_others_their_times(tune, operands):
    def run(q, token_rows, config):
        if config == Config(8, 4):
            raise RuntimeError("out of resource: shared memory\nand more")
        return q + 1, None

    rows = {(row["num_warps"], row["num_stages"]): row
            for row in tune.measure(run, operands, Config(4, 3), 1, LATER, LATER)}
    assert rows[8, 4] == {"num_warps": 8, "num_stages": 4, "present": False,
                          "reason": "out of resource: shared memory"}
    assert len(rows) == len(CANDIDATES) and [key for key, row in rows.items() if "ms" not in row] == [(8, 4)]
    assert [key for key, row in rows.items() if row["present"]] == [(4, 3)]


def test_without_a_result_of_the_present_entry_nothing_is_timed(tune, operands):
    def run(q, token_rows, config):
        if config == Config(4, 3):
            raise RuntimeError("spilled")
        return q + 1, None

    rows = tune.measure(run, operands, Config(4, 3), 1, LATER, LATER)
    assert rows[0]["reason"] == "spilled" and rows[0]["present"]
    assert {row["reason"] for row in rows[1:]} == {"the present entry gave nothing to compare with"}
    (verdict,) = tune.verdicts([row | {"shape": "a", "head_dim": 64, "dtype": "bf16"} for row in rows], (8, 9))
    assert verdict["reason"] == "the present entry has no time"


@pytest.mark.parametrize("wrong", [1.01, math.nan, math.inf])
def test_a_candidate_that_is_wrong_in_one_query_block_is_not_timed(tune, operands, wrong):
    def run(q, token_rows, config):
        out = q + 1
        if config == Config(8, 1):
            out[0, token_rows[64:100].long()] *= wrong
        return out, None

    rows = tune.measure(run, operands, Config(4, 3), 1, LATER, LATER)
    assert [row["num_warps"] for row in rows if "off by" in row.get("reason", "")] == [8]


def test_the_distance_is_that_of_the_worst_query_block(tune, operands):
    _, token_rows = operands
    wanted = torch.ones(1, 100, 2, 64)
    found = wanted.clone()
    assert tune.distance(found, wanted, token_rows) == 0
    found[0, token_rows[:64].long(), 1] = 1.5
    assert tune.distance(found, wanted, token_rows) == pytest.approx(0.5)
    assert tune.distance(wanted, wanted, torch.cat([token_rows, torch.full((64,), -1)])) == 0


def test_every_round_launches_every_candidate_once(tune, operands):
    launched = []

    def run(q, token_rows, config):
        launched.append(config)
        return q + 1, None

    tune.measure(run, operands, CANDIDATES[0], 3, LATER, LATER)
    assert launched == [*CANDIDATES] * 4
    launched.clear()
    tune.measure(run, operands, CANDIDATES[0], 99, -LATER, LATER)
    assert launched == [*CANDIDATES] * (1 + tune.FEWEST_ROUNDS)


def rows_of(*shapes, dim=64, dtype="bf16"):
    """Rows of {(warps, stages): (ms, spread) or a reason} for every shape; (4, 3) is the present entry."""
    return [{"head_dim": dim, "dtype": dtype, "shape": f"shape {number}", "num_warps": warps, "num_stages": stages,
             "present": (warps, stages) == (4, 3)}
            | ({"reason": found} if isinstance(found, str) else {"ms": found[0], "spread": found[1]})
            for number, shape in enumerate(shapes) for (warps, stages), found in shape.items()]


@pytest.mark.parametrize(("why", "shapes", "best"), [
    ("faster by more than the spread", [{(4, 3): (10, 0.5), (4, 1): (9, 0.5), (4, 2): (9.8, 0.1)}], (4, 1)),
    ("faster by the spread", [{(4, 3): (10, 1.0), (4, 1): (9, 0.5)}], None),
    ("faster by less than its own spread", [{(4, 3): (10, 0.1), (4, 1): (9, 2.0)}], None),
    ("slower", [{(4, 3): (10, 0.1), (4, 1): (11, 0.1)}], None),
    ("faster on every shape", [{(4, 3): (10, 0.1), (8, 1): (9, 0.1)}, {(4, 3): (5, 0.1), (8, 1): (4, 0.1)}], (8, 1)),
    ("faster on one shape only", [{(4, 3): (10, 0.1), (8, 1): (6, 0.1)}, {(4, 3): (5, 0.1), (8, 1): (5, 0.1)}], None),
    ("the fastest failed on one shape", [{(4, 3): (10, 0.1), (8, 1): (6, 0.1), (4, 1): (9, 0.1)},
                                         {(4, 3): (5, 0.1), (8, 1): "no time", (4, 1): (4, 0.1)}], (4, 1)),
    ("the present entry failed", [{(4, 3): "spilled", (8, 1): (6, 0.1)}], None),
], ids=lambda value: value if isinstance(value, str) else "")
def test_only_more_than_the_spread_moves_an_entry(tune, why, shapes, best):
    found = tune.winner(rows_of(*shapes))
    assert best == (None if found is None else (found["num_warps"], found["num_stages"]))


def test_the_lines_to_change_are_python_of_the_table(tune):
    clear = {(4, 3): (10, 0.5), (8, 1): (9, 0.5)}
    found = tune.verdicts(rows_of(clear) + rows_of({(4, 3): (9, 0.5), (8, 1): (9, 0.5)}, dtype="fp16")
                          + rows_of(clear, dim=128, dtype="fp16"), [8, 7])
    assert ["line" in verdict for verdict in found] == [True, False, True]
    assert found[1]["reason"].startswith("no candidate beats the present entry")
    lines = "{" + "".join(verdict.get("line", "") for verdict in found) + "}"
    assert eval(lines, {"BF16": BF16, "FP16": FP16, "Config": Config}) == {
        ((8, 7), 64, BF16): Config(8, 1), ((8, 7), 128, FP16): Config(8, 1)}


def test_the_table_holds_candidates_only_and_one_stage_is_among_them():
    assert {*CONFIGS.values(), DEFAULT} <= set(CANDIDATES)
    assert {(config.num_warps, config.num_stages) for config in CANDIDATES} \
        == {(warps, stages) for warps in (4, 8) for stages in (1, 2, 3, 4)}
