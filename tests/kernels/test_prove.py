"""Kernels that may end or hang their process are proven in another one, and what came out is kept for `auto`."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fake_kernels
from fake_kernels import APART, CPU
from pack import kernels
from pack.kernels import Call, prove
from pack.kernels.proof_store import ProofStore
from pack.kernels.proofs import Proofs

ROOT = Path(__file__).resolve().parents[2]
COMMAND = (sys.executable, str(Path(__file__).with_name("child_of_fakes.py")))
CALL = Call.on(CPU, torch.float32, 64)
BY_NAME = {spec.name: spec for spec in APART}


@pytest.fixture
def proofs(tmp_path, monkeypatch):
    mine = Proofs(ProofStore(tmp_path / "proofs"))
    monkeypatch.setattr(kernels, "PROOFS", mine)
    monkeypatch.setattr(prove, "PROOFS", mine)
    return mine


def test_every_end_of_a_process_is_a_verdict_and_the_next_kernel_gets_a_process_of_its_own():
    names = ["well", "fatal", "wrong", "stuck", "well"]
    found = [(job[0].name, proof) for job, proof in prove.prove_jobs(
        [(BY_NAME[name], CALL) for name in names], COMMAND, seconds=12)]
    assert [name for name, _ in found] == names
    well, fatal, wrong, stuck, again = (proof for _, proof in found)
    assert well.passed and again.passed and well.cases == 12
    assert not fatal.passed and fatal.lasting
    assert fatal.reason == "it ended the process with status 134: an illegal instruction was encountered"
    assert not wrong.passed and "relative L2" in wrong.reason
    assert stuck.reason == "it was not done after 12 s and was stopped"


def test_running_out_of_memory_in_the_process_is_no_verdict():
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        prove.prove_apart(BY_NAME["full"], CALL, COMMAND)


def test_naming_such_a_kernel_proves_it_in_another_process_and_says_so_before(proofs, monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", APART)
    monkeypatch.setattr(prove, "COMMAND", COMMAND)
    monkeypatch.setattr(prove.prove_apart, "__defaults__", (COMMAND, 120))
    said = []
    assert kernels.choose_kernel(CALL, "well", announce=said.append).name == "well"
    assert said == ["proving well on this CPU for float32, head_dim 64, in a process of its own"]
    with pytest.raises(kernels.NoKernel, match="fatal: on this CPU it failed its proof .it ended the process"):
        kernels.choose_kernel(CALL, "fatal")
    kept = Proofs(ProofStore(proofs.store.folder)).known(BY_NAME["fatal"], CALL)
    assert kept.passed is False, "it is not tried again"


def test_the_command_prints_a_table_and_leaves_what_auto_then_takes(proofs, monkeypatch, capsys):
    two = tuple(BY_NAME[name] for name in ("fatal", "well"))
    for module in (kernels, prove):
        monkeypatch.setattr(module, "KERNELS", two)
    monkeypatch.setattr(prove.tile_ops, "MEANS_KERNELS", ())
    monkeypatch.setattr(prove.tile_ops, "SELECT_KERNELS", ())
    monkeypatch.setattr(prove, "devices", lambda: [CPU])
    monkeypatch.setattr(fake_kernels, "DTYPES", (torch.float32,))
    with pytest.raises(kernels.NoKernel, match="not proven on this CPU yet: run `python -m kernels.prove`"):
        kernels.choose_kernel(CALL)
    jobs, _ = prove.jobs_of(two)
    monkeypatch.setattr(prove, "jobs_of", lambda specs: ([job for job in jobs if job[1] == CALL], {}))
    assert prove.main([], COMMAND) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["fatal", "CPU", "float32,", "head_dim"] and " FAILED (" in lines[0]
    assert lines[1] == "    it ended the process with status 134: an illegal instruction was encountered"
    assert "right, 12 problems, worst error" in lines[2] and lines[3].startswith("kept in ")
    assert kernels.choose_kernel(CALL).name == "well"


@pytest.mark.parametrize("command", [["-m", "kernels.prove"], [str(Path("kernels", "prove.py"))]],
                         ids=["module", "file"])
def test_the_command_runs_in_the_packs_folder_and_says_why_there_is_nothing_to_prove(command, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: `make gpu` runs the command")
    told = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})
    assert told.returncode == 0, told.stderr
    for name in ("cuda_sm90", "triton", "triton_tile_means", "triton_select_tiles"):
        assert f"{name}: not here, no GPU that torch can use" in told.stdout
