"""The benchmark of the stages goes through all of them on a CPU, and times nothing that is wrong."""
from __future__ import annotations

import json

import pytest
import torch


@pytest.fixture
def stages(load):
    return load("stages")


def test_a_dry_run_times_every_stage_and_says_that_it_means_nothing(stages, tmp_path, capsys):
    target = stages.main(["--dry-run", "--out", str(tmp_path), "--repeats", "1", "--sparsities", "0.5",
                          "--shapes", "H12 32760", "H40 75600 D64"])
    report = json.loads(target.read_text())
    assert report["dry_run"] is True and report["kernels"] == {}
    assert [row["stage"] for row in report["rows"]] == [*stages.STAGES] * 2
    assert all(row["ms"] > 0 for row in report["rows"])
    text = target.with_suffix(".md").read_text()
    assert "dry run: numbers mean nothing" in text and text in capsys.readouterr().out


def test_a_stage_that_is_wrong_is_not_timed(stages):
    right = dict.fromkeys(stages.STAGES, lambda: torch.ones(2, 3))
    rows = {row["stage"]: row for row in stages.measure(
        right | {stages.MEANS: lambda: torch.zeros(2, 3), stages.SELECT: lambda: torch.eye(3)[:2]}, 1,
        torch.device("cpu"))}
    assert rows[stages.MEANS]["reason"] == "off by 1.0e+00, wanted at most 1e-05"
    assert "off by" in rows[stages.SELECT]["reason"] and rows[stages.WHOLE_GATED]["ms"] >= 0


def test_without_a_gpu_only_a_dry_run_is_made(stages, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device: use --dry-run"):
        stages.main([])
