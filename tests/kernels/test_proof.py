"""A kernel is proven on the card before its first use; one that is wrong in one way is refused with its error."""
from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import emulated_sm90
import fake_kernels
import interpreted_kernel
from fake_kernels import CPU, right, spec_of
from pack import kernels
from pack.kernels import Call, NoKernel, block_sparse_attention, proof, reference, reference_tiles, tile_ops
from pack.kernels.proof import Proof, run_proof
from pack.kernels.proof_store import ProofStore
from pack.kernels.proofs import Proofs, facts_of
from pack.kernels.spec import fingerprint

ROOT = Path(__file__).resolve().parents[2]
CALL = Call.on(CPU, torch.float32, 64)
ATTENTION_RUNS = proof.RUNS * len(proof.SETS["attention"])


@pytest.fixture
def proofs(tmp_path, monkeypatch):
    """Proofs of this test alone, in place of the process's."""
    mine = Proofs(ProofStore(tmp_path / "proofs"))
    for module in (kernels, tile_ops):
        monkeypatch.setattr(module, "PROOFS", mine)
    return mine


@pytest.fixture
def short(proofs, monkeypatch):
    """`proofs` of two problems that are solved once each: what is kept does not depend on how many there were."""
    monkeypatch.setattr(proof, "RUNS", 1)
    monkeypatch.setitem(proof.SETS, "attention", proof.SETS["attention"][:2])
    return proofs


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_right_kernel_solves_every_problem_in_every_dtype(dtype, dim):
    found = run_proof(spec_of(right), Call.on(CPU, dtype, dim), CPU)
    assert found.passed and found.cases == len(proof.SETS["attention"]) == 12 and not found.reason
    assert 0 < found.worst <= 4e-3


FAULTS = {
    "drops_the_last_block": "odd, empty and equal lists over cut and empty blocks: relative L2",
    "ignores_padding": "odd, empty and equal lists over cut and empty blocks: relative L2 inf",
    "loses_a_key_of_a_cut_block": "odd, empty and equal lists over cut and empty blocks: relative L2",
    "an_empty_list_leaves_what_was_there": "odd, empty and equal lists over cut and empty blocks: relative L2 inf",
    "a_nan_spreads_in_its_block": "odd, empty and equal lists over cut and empty blocks: relative L2 inf",
    "writes_nothing": "odd, empty and equal lists over cut and empty blocks: relative L2 inf",
    "wrong_lse": "odd, empty and equal lists over cut and empty blocks: LSE off by",
    "scale_off_by_three_percent": "odd, empty and equal lists over cut and empty blocks: relative L2",
    "writes_behind_its_output": "odd, empty and equal lists over cut and empty blocks: memory beside the result",
    "writes_into_its_operands": "odd, empty and equal lists over cut and empty blocks: q or memory beside",
    "answers_somewhere_else": "odd, empty and equal lists over cut and empty blocks: the result is not where",
    "drops_blocks_of_long_lists": "lists so long that rings turn: relative L2",
    "overflows": "scores thirty times as large: relative L2 inf",
    "takes_every_tensor_for_contiguous": "blocks of a batch through strides: relative L2",
    "reads_the_lists_of_the_first_batch": "blocks of a batch through strides: relative L2",
    "forgets_the_gate": "tiles of a grid between other tokens: relative L2",
    "takes_the_mean_of_another_tile": "tiles of a grid between other tokens: relative L2",
    "counts_tiles_by_blocks": "tiles of two boxes of which some lie outside: relative L2",
    "forgets_what_was_seen": "blocks whose softmax has begun: relative L2",
    "reads_what_nobody_has_seen": "blocks whose softmax has begun: relative L2 inf",
    "starts_in_binary_logarithms": "blocks whose softmax has begun: relative L2",
    "starts_from_another_tile": "blocks whose softmax has begun: relative L2",
    "loses_the_last_head_of_many": "more work than the card has multiprocessors: relative L2",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_kernel_that_is_wrong_in_one_way_is_named_with_the_problem_and_the_error(name, monkeypatch):
    monkeypatch.setattr(proof, "multiprocessors_of", lambda device: 20)
    found = run_proof(spec_of(getattr(fake_kernels, name)), CALL, CPU)
    assert not found.passed and found.lasting
    assert found.reason.startswith(FAULTS[name]), found.reason


def test_a_kernel_whose_bits_waver_is_refused():
    found = run_proof(spec_of(fake_kernels.Wavering()), CALL, CPU)
    assert not found.passed and found.reason.endswith(": not the same bits every time")


def test_a_kernel_that_raises_is_refused_for_this_process_only():
    found = run_proof(spec_of(fake_kernels.raises), CALL, CPU)
    assert found.reason == "PTX was not understood" and not found.lasting


def test_running_out_of_memory_is_no_verdict(proofs):
    spec = spec_of(fake_kernels.runs_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        proofs.prove(spec, CALL)
    assert proofs.known(spec, CALL) is None


@pytest.mark.parametrize(("proves", "run"), [("tile means", reference_tiles.tile_means),
                                             ("tile selection", reference_tiles.select_tiles)])
def test_kernels_around_the_attention_are_proven_likewise(proves, run):
    def writes(*operands, out):
        return out.copy_(run(*operands))

    def off_by_a_little(*operands, out):
        writes(*operands, out=out)
        out.view(-1)[-1] += 1
        return out

    def writes_beside(*operands, out):
        out.as_strided((out.numel() + 1,), (1,))[-1] = 3
        return writes(*operands, out=out)

    def verdict(run):
        return run_proof(spec_of(run, proves=proves), CALL, CPU)

    assert verdict(writes).passed and verdict(writes).cases == len(proof.SETS[proves])
    assert "off by" in verdict(off_by_a_little).reason or "lists are other ones" in verdict(off_by_a_little).reason
    assert "memory beside the result was written to" in verdict(writes_beside).reason


@pytest.mark.skipif(emulated_sm90.unavailable() is not None, reason=str(emulated_sm90.unavailable()))
@pytest.mark.parametrize(("dtype", "dim"), [(torch.bfloat16, 64), (torch.float16, 128)])
def test_the_cuda_kernel_is_proven_in_the_emulator(dtype, dim, monkeypatch):
    monkeypatch.setattr(proof, "RUNS", 1)              # other tests compare its bits in many orders of events
    spec = dataclasses.replace(kernels.KERNELS[0], load=lambda: emulated_sm90.run, device_types=("cpu",))
    found = run_proof(spec, Call.on(CPU, dtype, dim), CPU)
    assert found.passed, found.reason


@pytest.mark.parametrize(("module", "proves", "dtype"), [
    ("block_sparse", "attention", torch.float16), ("int8_scores", "attention", torch.float16),
    ("int8_scores, sums in half", "attention", torch.float16), ("tile_means", "tile means", torch.float16),
    ("select_tiles", "tile selection", torch.float32)])
def test_the_triton_kernels_are_proven_in_the_interpreter(worker, module, proves, dtype, monkeypatch):
    monkeypatch.setattr(proof, "RUNS", 1)
    monkeypatch.setitem(proof.SETS, proves, [
        problem for problem in proof.SETS[proves] if problem.shows not in (
            "more work than the card has multiprocessors",             # here runs one program at a time
            "tiles in lists so long that rings turn")])                # as in test_tile_grid.py

    module, _, half = module.partition(", ")

    def run(*operands, **buffers):
        found = interpreted_kernel.call(worker, module, *operands, **{"half_sums": True} if half else {})
        if isinstance(found, tuple):
            return tuple(None if x is None else y.copy_(x) for x, y in zip(found, (buffers["out"], buffers.get("lse"))))
        return buffers["out"].copy_(found)

    exact, called = module != "int8_scores", Call.on(CPU, dtype, 64)
    found = run_proof(spec_of(run, proves=proves, exact=exact, sums_in_half=lambda call: bool(half)), called, CPU)
    assert found.passed, found.reason
    if not exact:
        found = run_proof(spec_of(run, proves=proves), called, CPU)
        assert not found.passed, "exact it is not"


def test_only_a_kernel_that_sums_in_float16_on_this_card_is_allowed_what_that_costs():
    def off_by_a_thousandth(*operands, **buffers):
        found = right(*operands, **buffers)
        found[0].mul_(1.001)
        return found

    def verdict(dtype, in_half):
        return run_proof(spec_of(off_by_a_thousandth, sums_in_half=lambda call: in_half), Call.on(CPU, dtype, 64), CPU)
    assert verdict(torch.float16, True).passed and verdict(torch.float16, True).worst > 9e-4
    assert "allowed 6e-04" in verdict(torch.float16, False).reason
    assert "allowed 1e-05" in verdict(torch.float32, True).reason
    half = {spec.name for spec in kernels.KERNELS if spec.sums_in_half(dataclasses.replace(CALL, capability=(8, 9)))}
    assert half == {"triton_int8"}
    assert not any(spec.sums_in_half(dataclasses.replace(CALL, capability=(9, 0))) for spec in kernels.KERNELS)


def operands(dtype=torch.float32):
    q, k, v = (torch.randn(1, 128, 1, 64, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(3))
    indices = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    return q, k, v, indices, torch.tensor([[[2, 1]]], dtype=torch.int32), torch.tensor([64, 30], dtype=torch.int32)


@pytest.fixture
def wrong_one_first(proofs, monkeypatch):
    monkeypatch.setattr(kernels, "KERNELS", (spec_of(fake_kernels.drops_the_last_block, "wrong"),
                                             spec_of(right, "good"), reference.SPEC))


def test_auto_passes_over_a_kernel_that_fails_and_takes_the_next_that_is_right(wrong_one_first):
    assert kernels.choose_kernel(CALL).name == "good"
    assert torch.equal(block_sparse_attention(*operands()), block_sparse_attention(*operands(), backend="reference"))
    wrong, good, _ = kernels.backend_list(CALL)
    assert wrong.startswith("wrong: on this CPU it failed its proof (odd, empty and equal lists over cut and empty "
                            "blocks: relative L2")
    assert good.startswith("good: can run (proven (12 problems, worst error ")


def test_a_kernel_chosen_by_name_raises_what_was_measured(wrong_one_first):
    for _ in range(2):
        with pytest.raises(NoKernel, match="wrong: on this CPU it failed its proof .*relative L2"):
            block_sparse_attention(*operands(), backend="wrong")


def test_a_compiled_call_is_proven_too(wrong_one_first):
    torch._dynamo.reset()
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*operands()), block_sparse_attention(*operands(), backend="reference"))


def test_the_reference_is_not_compared_with_itself(proofs):
    assert reference.SPEC.files == () and kernels.choose_kernel(CALL) is reference.SPEC
    assert not proofs.store.folder.exists()


def test_auto_takes_a_kernel_that_could_end_the_process_only_when_another_process_has_proven_it(proofs, monkeypatch):
    apart = spec_of(right, "apart", proven_apart=True)
    monkeypatch.setattr(kernels, "KERNELS", (apart, reference.SPEC))
    assert kernels.choose_kernel(CALL) is reference.SPEC
    said = kernels.backend_list(CALL)[0]
    assert said.startswith("apart: not proven on this CPU yet: run `python -m kernels.prove` in this pack's folder")
    proofs.record(apart, CALL, Proof(True, 10, 1e-6, 1.0, "2026-11-25"))
    assert kernels.choose_kernel(CALL) is apart


def test_every_kernel_that_is_compiled_for_a_gpu_names_all_that_makes_it():
    for spec in (*kernels.KERNELS, *tile_ops.MEANS_KERNELS, *tile_ops.SELECT_KERNELS):
        assert bool(spec.files) == (not spec.name.startswith("reference"))
        assert all(path.is_file() for path in spec.files)
    by_name = {spec.name: {path.name for path in spec.files} for spec in kernels.KERNELS}
    folder = ROOT / "kernels" / "cuda_sm90"
    assert {path.name for path in (*folder.glob("*.py"), *folder.glob("*.cu"), *folder.glob("bundled/*"))} <= by_name[
        "cuda_sm90"]
    assert {"block_sparse.py", "configs.py", "gathered.py", "tile_grid.py"} <= by_name["triton"]


def test_line_endings_do_not_change_a_fingerprint_and_one_character_does(tmp_path):
    for name, content in (("unix", b"one\ntwo\n"), ("windows", b"one\r\ntwo\r\n"), ("other", b"one\ntwo \n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(content)
    unix, windows, other = (fingerprint((tmp_path / name / "file",)) for name in ("unix", "windows", "other"))
    assert unix == windows != other


def counting(run):
    def counted(*operands, **buffers):
        counted.calls += 1
        return run(*operands, **buffers)
    counted.calls = 0
    return counted


def test_a_kept_proof_is_used_without_running_a_case(proofs):
    run = counting(right)
    made = proofs.prove(spec_of(run), CALL)
    calls = run.calls
    assert calls == ATTENTION_RUNS and proofs.prove(spec_of(run), CALL) is made
    again = Proofs(ProofStore(proofs.store.folder)).prove(spec_of(run), CALL)
    assert again == made and run.calls == calls
    code = textwrap.dedent("""
        import sys; sys.path[:0] = ["tests"]
        import conftest
        from pathlib import Path
        import fake_kernels
        from pack.kernels.proof_store import ProofStore
        from pack.kernels.proofs import Proofs
        from pack.kernels import Call
        import torch
        spec = fake_kernels.spec_of(fake_kernels.raises)
        print(Proofs(ProofStore(Path(sys.argv[1]))).prove(spec, Call.on(fake_kernels.CPU, torch.float32, 64)).passed)
    """)
    told = subprocess.run([sys.executable, "-c", code, str(proofs.store.folder)], cwd=ROOT, capture_output=True,
                          text=True)
    assert told.stdout.strip() == "True", told.stderr


@pytest.mark.parametrize("change", ["files", "dtype", "head_dim", "problems"])
def test_anything_that_a_proof_depends_on_asks_for_a_new_one(short, change, tmp_path, monkeypatch):
    run = counting(right)
    short.prove(spec_of(run), CALL)
    spec, call, before = spec_of(run), CALL, run.calls
    if change == "files":
        (tmp_path / "kernel.py").write_text("another text")
        spec = spec_of(run, files=(tmp_path / "kernel.py",))
    elif change == "problems":
        monkeypatch.setattr("pack.kernels.proofs.PROOF_FILES", (Path(__file__),))
    else:
        call = dataclasses.replace(CALL, **{"dtype": torch.bfloat16} if change == "dtype" else {"head_dim": 128})
    Proofs(short.store).prove(spec, call)
    assert run.calls == 2 * before


@pytest.mark.parametrize("name", ["gpu", "driver", "torch", "cuda", "triton", "settings"])
def test_another_card_driver_torch_or_triton_asks_for_a_new_proof(short, name, monkeypatch):
    from pack.kernels.machine import machine_of
    run = counting(right)
    short.prove(spec_of(run), CALL)
    before, other = run.calls, machine_of(CPU)._replace(**{name: "another"})
    monkeypatch.setattr("pack.kernels.proofs.machine_of", lambda device: other)
    Proofs(short.store).prove(spec_of(run), CALL)
    assert run.calls == 2 * before


def test_a_failure_that_was_measured_is_kept_and_one_that_may_pass_is_not(proofs):
    for run, kept in ((fake_kernels.drops_the_last_block, True), (fake_kernels.raises, False)):
        spec = spec_of(run, run.__name__ if hasattr(run, "__name__") else "edited")
        proofs.prove(spec, CALL)
        assert (proofs.store.read(facts_of(spec, CALL)) is not None) == kept


def stored(store):
    return next(store.folder.glob("*.json"))


@pytest.mark.parametrize(("content", "remark"), [
    (b"", "is not one"), (b"{", "is not one"), (b"[]", "it is about something else"), (b"\xff\xfe", "is not one"),
    (b'{"facts": {}, "proof": {}}', "it is about something else"), (b"9" * 20000, "too large"),
    (b"[" * 9000, "is not one"),
    ("passed", "passed is 'yes'"), ("cases", "it contradicts itself"), ("worst", "worst is None"), ("date", "'date'"),
], ids=str)
def test_a_corrupt_or_foreign_file_costs_a_new_proof_and_a_sentence(short, content, remark):
    run = counting(right)
    short.prove(spec_of(run), CALL)
    path = stored(short.store)
    if isinstance(content, str):
        told = json.loads(path.read_text())
        told["proof"] |= {"passed": {"passed": "yes"}, "cases": {"cases": 0}, "worst": {"worst": None}}.get(content, {})
        if content == "date":
            del told["proof"]["date"]
        content = json.dumps(told).encode()
    path.write_bytes(content)
    store, before = ProofStore(short.store.folder), run.calls
    assert Proofs(store).prove(spec_of(run), CALL).passed and run.calls == 2 * before
    assert remark in "".join(store.remarks)
    assert ProofStore(short.store.folder).read(facts_of(spec_of(run), CALL)).passed, "the file is good again"


def test_a_folder_that_cannot_be_used_costs_a_sentence(tmp_path, monkeypatch):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    for store in (ProofStore(blocked), ProofStore(Path(os.devnull) / "below")):
        assert Proofs(store).prove(spec_of(right), CALL).passed
        assert any("not kept on disk" in remark for remark in store.remarks)
        assert any("cannot be locked" in remark for remark in store.remarks)
    full = ProofStore(tmp_path / "full")
    monkeypatch.setattr("pack.kernels.user_cache.tempfile.NamedTemporaryFile", lambda **_: (_ for _ in ()).throw(
        OSError(28, "No space left on device")))
    assert Proofs(full).prove(spec_of(right), CALL).passed
    assert any("No space left on device" in remark for remark in full.remarks)


def test_a_user_without_a_home_folder_costs_a_sentence(monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    store = ProofStore()
    assert Proofs(store).prove(spec_of(right), CALL).passed
    assert any("home directory" in remark for remark in store.remarks)


def test_two_processes_that_prove_at_once_prove_once(tmp_path):
    code = textwrap.dedent("""
        import sys; sys.path[:0] = ["tests"]
        import conftest, time, torch
        from pathlib import Path
        import fake_kernels
        from pack.kernels import Call
        from pack.kernels.proof_store import ProofStore
        from pack.kernels.proofs import Proofs
        def run(*operands, **buffers):
            run.calls += 1
            return fake_kernels.slow(20)(*operands, **buffers)
        run.calls = 0
        go = Path(sys.argv[1]) / "go"
        print("ready", flush=True)
        while not go.exists():
            time.sleep(0.01)
        call = Call.on(fake_kernels.CPU, torch.float32, 64)
        found = Proofs(ProofStore(Path(sys.argv[1]) / "proofs")).prove(fake_kernels.spec_of(run), call)
        print(run.calls, found.passed)
    """)
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
            for _ in range(2)]
    assert [process.stdout.readline().strip() for process in both] == ["ready", "ready"]
    (tmp_path / "go").write_text("")
    told = sorted(process.communicate(timeout=120)[0].split() for process in both)
    assert told == [["0", "True"], [str(ATTENTION_RUNS), "True"]]

