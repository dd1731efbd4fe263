"""`auto` in a real ComfyUI: right by proof, made when the node executes, and never slower than what dense means."""
import dataclasses

import pytest
import torch

from slow_dense import slow_dense, under

pytestmark = pytest.mark.usefixtures("own_proofs")
SIZE = (5, 8, 12)


@pytest.fixture
def auto(vsa):
    return lambda model, sparsity=0.5, **widgets: vsa(model, sparsity, backend="auto", **widgets)


def note_of(run, words):
    return next((note for note in run.said if words in note), None)


def test_a_kernel_that_is_right_and_fast_is_taken_and_both_is_said(wan, auto, fakes, run_of, draw):
    import fake_kernels
    from pack.nodes.hook.status import status_text
    fakes(fake_kernels.right)
    patched = auto(under(wan, slow_dense(60)))
    draw(patched, SIZE, steps=4)
    run = run_of(patched)
    assert run.sparse_calls == 8 and {record.kernel for record in run.records.values()} == {"fake0"}
    line = next(line for line in status_text(run).splitlines() if line.startswith("- auto: fake0, "))
    assert "proven (12 problems, worst error " in line and "on this CPU" in line
    assert "x dense per call (" in line and "SageAttention " in line
    assert run.probes == 4, "no step was dense, so a few calls ran both"


def test_the_proof_is_made_when_the_node_executes_and_not_in_the_sampling(wan, auto, fakes, draw):
    import fake_kernels
    from pack.kernels.proof import RUNS, SETS
    calls, proof = [], RUNS * len(SETS["attention"])

    def counted(*operands, **buffers):
        calls.append(1)
        return fake_kernels.right(*operands, **buffers)
    fakes(counted)
    patched = auto(wan)
    assert len(calls) == proof
    draw(patched, SIZE, steps=1, cfg=1.0)
    assert len(calls) == proof + 2, "two layers, no proof"
    auto(wan, 0.7)
    assert len(calls) == proof + 2, "proven already"


def test_a_kernel_that_is_wrong_is_passed_over_and_its_error_named(wan, auto, fakes, run_of, draw):
    import fake_kernels
    from pack.nodes.hook.status import kernel_text
    fakes(fake_kernels.drops_the_last_block, fake_kernels.right)
    patched = auto(under(wan, slow_dense(60)))
    draw(patched, SIZE)
    run = run_of(patched)
    assert {record.kernel for record in run.records.values()} == {"fake1"}
    assert "fake0: on this CPU it failed its proof (odd, empty and equal lists" in kernel_text(run, "auto")


def test_a_kernel_that_is_right_but_slower_than_dense_leaves_the_rest_of_the_run_dense(wan, auto, fakes, run_of, draw):
    import fake_kernels
    fakes(fake_kernels.slow(60))
    patched = auto(under(wan, slow_dense(5)))
    draw(patched, SIZE, steps=6)
    run = run_of(patched)
    assert 4 <= run.sparse_calls < 8 and run.dense["sparse would be slower here"] == 12 - run.sparse_calls
    note = note_of(run, "sparse would be slower here: ")
    sparse_ms, dense_ms = (float(word) for word in note.split() if word.replace(".", "").isdigit())
    assert sparse_ms >= 60 > dense_ms >= 5
    assert note.endswith("(SageAttention). To run it sparse all the same choose backend fake0")


def test_what_was_decided_holds_for_the_next_run_of_the_same_patched_model(wan, auto, fakes, run_of, draw):
    import fake_kernels
    fakes(fake_kernels.slow(60))
    patched = auto(under(wan, slow_dense(5)))
    draw(patched, SIZE, steps=6)
    first = draw(patched, SIZE, steps=2)
    assert run_of(patched).sparse_calls == 0 and note_of(run_of(patched), "sparse would be slower here")
    assert torch.equal(first, draw(patched, SIZE, steps=2))


def test_dense_steps_are_what_sparse_is_compared_with_where_there_are_any(wan, auto, fakes, run_of, draw):
    import fake_kernels
    fakes(fake_kernels.slow(60))
    patched = auto(under(wan, slow_dense(5)), start_percent=0.5)
    draw(patched, SIZE, steps=6)
    run = run_of(patched)
    assert run.probes == 0 and 4 <= run.sparse_calls < 6 and run.dense["sparse would be slower here"]


@pytest.mark.parametrize("widgets", [{"backend": "fake0"}])
def test_a_kernel_chosen_by_name_stays_and_says_that_it_is_slower(wan, vsa, fakes, run_of, draw, widgets):
    import fake_kernels
    fakes(fake_kernels.slow(40))
    patched = vsa(under(wan, slow_dense(5)), 0.5, **widgets)
    draw(patched, SIZE, steps=3)
    run = run_of(patched)
    assert run.sparse_calls == 6 and "Backend fake0 was chosen by name: it stays" in note_of(run, "sparse is slower")


def test_a_model_that_was_trained_sparse_stays_sparse_and_says_what_it_costs(gated, auto, fakes, run_of, draw):
    import fake_kernels
    fakes(fake_kernels.slow(40))
    patched = auto(under(gated, slow_dense(5)))
    draw(patched, SIZE, steps=3)
    run = run_of(patched)
    assert run.sparse_calls == 6 and not run.dense
    assert "This model was trained for it, so it stays" in note_of(run, "does not gain time here")


def test_the_reference_on_a_cpu_is_measured_too_and_a_small_clip_runs_dense_with_both_times(wan, auto, run_of, draw):
    patched = auto(wan, 0.2)
    draw(patched, (5, 16, 16), steps=8)
    run = run_of(patched)
    assert "reference" in run.medians and all(ms > 0 for ms in run.medians["reference"][:2])
    sparse_ms, dense_ms, name = run.medians["reference"]
    assert name == "PyTorch attention"
    if sparse_ms > dense_ms:                  # it may win, on some machine
        assert run.dense["sparse would be slower here"] and note_of(run, "sparse would be slower here")


def test_a_dense_attention_that_cannot_run_beside_sparse_is_named_and_nothing_is_decided(wan, vsa, run_of, draw):
    def broken(func, q, k, *args, **kwargs):
        if q.shape == k.shape:
            raise RuntimeError("only one call at a time")
        return func(q, k, *args, **kwargs)
    patched = vsa(under(wan, broken), 0.5)
    draw(patched, SIZE)
    run = run_of(patched)
    assert run.sparse_calls == 4 and not run.medians
    assert note_of(run, "dense attention could not be timed beside it: only one call at a time")


def test_a_kernel_that_failed_its_proof_by_name_is_an_error_when_the_node_executes(wan, vsa, fakes):
    import fake_kernels
    fakes(fake_kernels.ignores_padding)
    with pytest.raises(RuntimeError, match="fake0: on this CPU it failed its proof .*Set backend to auto, or bypass"):
        vsa(wan, 0.5, backend="fake0")


def test_no_room_for_a_proof_is_an_error_by_name_and_a_later_try_with_auto(wan, vsa, auto, fakes, run_of, draw, caplog):
    import fake_kernels
    fakes(fake_kernels.runs_out_of_memory)
    with pytest.raises(RuntimeError, match="no room on the GPU to prove the kernel before its first use: close"):
        vsa(wan, 0.5, backend="fake0")
    patched = auto(wan)
    assert "no room on the GPU to prove a kernel now" in caplog.text
    assert torch.equal(draw(patched, SIZE), draw(wan, SIZE))
    assert run_of(patched).dense == {"out of memory": 4}


@pytest.mark.parametrize(("widgets", "advice"), [
    ({"strict": True, "backend": "auto"}, "Switch strict off to run"),
    ({"backend": "full"}, "Set backend to auto to run"),
], ids=["strict", "by name"])
def test_running_out_of_memory_in_a_sampling_is_an_error_for_who_insists(wan, vsa, draw, kernel_table, widgets, advice):
    from pack.kernels import reference

    def run(*_, **__):
        raise torch.OutOfMemoryError("no room")
    kernel_table(dataclasses.replace(reference.SPEC, name="full", load=lambda: run))
    with pytest.raises(RuntimeError, match=f"of GPU memory. Use a smaller clip. {advice} such attention calls dense"):
        draw(vsa(wan, 0.9, **widgets), SIZE)
