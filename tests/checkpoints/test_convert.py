"""The converter command: the same bits under native names, or nothing at all."""
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from make_checkpoints import KINDS, wan_shapes, write_hollow
from pack.checkpoints import convert as command
from pack.checkpoints.convert import convert
from pack.checkpoints.plan import plan_of
from pack.checkpoints.safetensors_file import CheckpointError, read_header
from pack.checkpoints.source import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments, **kw):
    return subprocess.run([sys.executable, "-m", "checkpoints.convert", *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True, **kw)


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_publishing_converts_to_the_same_bits(write, state_dict, tmp_path, kind):
    target = tmp_path / "out.safetensors"
    digest = convert(write(kind), target)
    found = safetensors.torch.load_file(target)
    assert found.keys() == state_dict.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state_dict.items())
    assert hashlib.sha256(target.read_bytes()).hexdigest() == digest
    assert target.with_name("out.safetensors.sha256").read_text() == f"{digest}  out.safetensors\n"


def test_the_training_travels_in_the_metadata(tmp_path):
    source = tmp_path / "FastWan2.1-T2V-1.3B-Diffusers" / "x.safetensors"
    write_hollow(wan_shapes(2, 256, 64, 64), source)
    convert(source, tmp_path / "renamed.safetensors")
    plan = plan_of(open_checkpoint(tmp_path / "renamed.safetensors"))
    assert (plan.trained.name, plan.trained.sparsity, plan.trained.timesteps, plan.trained.tile) == (
        "FastWan2.1-T2V-1.3B", 0.8, (1000, 757, 522), (4, 4, 4))


def test_converting_what_was_converted_changes_nothing(write, tmp_path):
    convert(write("half converted"), tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_an_existing_file_is_kept_unless_forced(write, tmp_path):
    target = tmp_path / "out.safetensors"
    target.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="or --force to replace it"):
        convert(write("diffusers file"), target)
    assert target.read_bytes() == b"precious"
    convert(write("diffusers file"), target, force=True)
    assert read_header(target).tensors


def test_a_file_that_appears_meanwhile_is_kept_too(write, tmp_path):
    target = tmp_path / "out.safetensors"
    with pytest.raises(FileExistsError):
        convert(write("diffusers file"), target, progress=lambda *_: target.write_bytes(b"precious"))
    assert target.read_bytes() == b"precious" and leftovers(tmp_path) == []


def leftovers(folder):
    return [path.name for path in folder.iterdir() if path.name.endswith(".part")]


def test_an_exception_halfway_leaves_no_file(write, tmp_path):
    def fail(done, total):
        if done > total / 2:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        convert(write("sharded with index"), tmp_path / "out.safetensors", progress=fail)
    assert not (tmp_path / "out.safetensors").exists() and leftovers(tmp_path) == []


def test_a_source_cut_short_while_it_is_read_leaves_no_file(write, tmp_path, monkeypatch):
    source = write("native file")

    def cut(done, total):
        if source.stat().st_size > 100_000:
            os.truncate(source, 100_000)
    monkeypatch.setattr(command, "CHUNK", 4096)
    with pytest.raises(CheckpointError, match="ended while it was read"):
        convert(source, tmp_path / "out.safetensors", progress=cut)
    assert not (tmp_path / "out.safetensors").exists() and leftovers(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_process_leaves_nothing_under_the_files_name(tmp_path, number):
    source = write_hollow(wan_shapes(8, 2048, 8192, 4096), tmp_path / "big.safetensors", "F32")
    target = tmp_path / "out.safetensors"
    process = subprocess.Popen([sys.executable, "-m", "checkpoints.convert", source, target], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.time() + 30
        while not leftovers(tmp_path) and process.poll() is None and time.time() < deadline:
            time.sleep(0.01)
        assert process.poll() is None and leftovers(tmp_path)
        process.send_signal(number)
        assert process.wait(30) != 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert not target.exists() and not target.with_name(target.name + ".sha256").exists()
    if number == signal.SIGTERM:
        assert leftovers(tmp_path) == []


def test_the_command_explains_itself_without_torch(tmp_path):
    done = run("--help")
    assert done.returncode == 0 and "FastWan2.1-T2V-1.3B-Diffusers" in done.stdout and "--force" in done.stdout
    code = "import sys, checkpoints.convert; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_command_converts_reports_progress_and_prints_the_checksum(write, tmp_path):
    target = tmp_path / "out.safetensors"
    done = run(write("pipeline folder"), target)
    assert done.returncode == 0, done.stderr
    assert f"sha256 {hashlib.sha256(target.read_bytes()).hexdigest()}" in done.stdout
    assert "VSA gates in 3 of 3 layers" in done.stdout and "100%" in done.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (("nowhere", "x.safetensors"), "does not exist"), ((".", "x.safetensors"), "holds no safetensors file"),
    (("model", "x.bin"), "wanted a name that ends in .safetensors"), (("model",), "FILE is missing")])
def test_the_command_says_what_is_wrong_and_fails(write, tmp_path, arguments, message):
    model, empty = write("native file"), tmp_path / "empty"
    empty.mkdir()
    named = {"model": model, ".": empty, "nowhere": tmp_path / "nowhere"}
    done = run(*(named.get(argument, tmp_path / argument) for argument in arguments))
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr


def test_a_model_of_another_family_is_refused(tmp_path):
    write_hollow({"adaln_single.linear.weight": (8, 8)}, tmp_path / "ltx.safetensors")
    with pytest.raises(CheckpointError, match="neither Wan nor MiniMax H3"):
        convert(tmp_path / "ltx.safetensors", tmp_path / "out.safetensors")


def test_the_description_alone_writes_nothing(write, tmp_path):
    model = write("diffusers file")
    before = sorted(tmp_path.iterdir())
    done = run(model, "--describe")
    assert done.returncode == 0 and "Wan: 3 layers of width 256" in done.stdout
    assert sorted(tmp_path.iterdir()) == before
