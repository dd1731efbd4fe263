"""A kernel is checked before its first use; one that is wrong is refused with its error, and the next one runs."""
from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import emulated_sm90
import interpreted_kernel
from pack import kernels
from pack.kernels import Call, KernelSpec, KernelUnusable, block_sparse_attention, reference, self_test

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_tested_yet(monkeypatch):
    monkeypatch.setattr(self_test, "_verdicts", {})


def spec_of(run, name="candidate", source=Path(__file__)):
    return KernelSpec(name, lambda: run, ("cpu",), ("cpu",), (torch.bfloat16, torch.float16, torch.float32),
                      source=source)


def counting(run):
    def counted(*args):
        counted.calls += 1
        return run(*args)
    counted.calls = 0
    return counted


def drops_the_last_block(q, k, v, indices, counts, sizes, scale, return_lse):
    return reference.run(q, k, v, indices, (counts - 1).clamp_min(0), sizes, scale, return_lse)


def ignores_padding(q, k, v, indices, counts, sizes, scale, return_lse):
    return reference.run(q, k, v, indices, counts, torch.full_like(sizes, 64), scale, return_lse)


def writes_nothing(q, k, v, indices, counts, sizes, scale, return_lse):
    out, lse = reference.run(q, k, v, indices, counts, sizes, scale, return_lse)
    return torch.full_like(out, torch.nan), lse


def wrong_lse(q, k, v, indices, counts, sizes, scale, return_lse):
    out, lse = reference.run(q, k, v, indices, counts, sizes, scale, return_lse)
    return out, lse * 1.4427


def scale_off_by_three_percent(q, k, v, indices, counts, sizes, scale, return_lse):
    return reference.run(q, k, v, indices, counts, sizes, scale * 1.03, return_lse)


def crashes(*args):
    raise RuntimeError("CUDA error: an illegal instruction was encountered")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [64, 128])
def test_a_right_kernel_passes_once_per_device_dtype_and_head_dim(dtype, dim):
    run = counting(reference.run)
    spec, call = spec_of(run), Call("cpu", None, dtype, dim)
    for _ in range(3):
        assert self_test.ready(spec, call, CPU, reference.run) is run
    assert run.calls == 1 and self_test.refusal(spec, call) is None


@pytest.mark.parametrize(("wrong", "words"), [
    (drops_the_last_block, "found relative L2"), (ignores_padding, "found relative L2 inf"),
    (writes_nothing, "found relative L2 inf"), (wrong_lse, "LSE error"),
    (scale_off_by_three_percent, "found relative L2"), (crashes, "RuntimeError: CUDA error: an illegal instruction"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_wrong_kernel_is_refused_with_the_measured_error_and_not_asked_again(wrong, words):
    run = counting(wrong)
    spec, call = spec_of(run), Call("cpu", None, torch.bfloat16, 64)
    for _ in range(2):
        with pytest.raises(KernelUnusable) as error:
            self_test.ready(spec, call, CPU, reference.run)
        assert words in str(error.value) and "bfloat16 and head_dim 64 failed" in str(error.value)
    assert run.calls == 1
    assert words in self_test.refusal(spec, call)
    assert self_test.refusal(spec, Call("cpu", None, torch.float16, 64)) is None


def test_a_kernel_that_cannot_be_loaded_is_refused_with_the_loaders_reasons():
    def run(*args):
        raise KernelUnusable("cannot be loaded: NVRTC: none here")
    spec, call = spec_of(run), Call("cpu", None, torch.bfloat16, 64)
    with pytest.raises(KernelUnusable, match="candidate: cannot be loaded: NVRTC: none here"):
        self_test.ready(spec, call, CPU, reference.run)


def test_running_out_of_memory_is_no_verdict():
    def run(*args):
        raise torch.OutOfMemoryError("out of memory")
    spec, call = spec_of(run), Call("cpu", None, torch.bfloat16, 64)
    with pytest.raises(torch.OutOfMemoryError):
        self_test.ready(spec, call, CPU, reference.run)
    assert self_test.refusal(spec, call) is None


def operands(dtype=torch.float32):
    q, k, v = (torch.randn(1, 128, 1, 64, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(3))
    indices = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32)
    return q, k, v, indices, torch.tensor([[[2, 1]]], dtype=torch.int32), torch.tensor([64, 30], dtype=torch.int32)


@pytest.fixture
def wrong_one_first(monkeypatch):
    monkeypatch.setattr(KernelSpec, "unproven", lambda spec: None)
    monkeypatch.setattr(kernels, "KERNELS", (spec_of(drops_the_last_block, "wrong"), reference.SPEC))


def test_auto_passes_over_a_kernel_that_fails(wrong_one_first):
    out = block_sparse_attention(*operands())
    assert torch.equal(out, block_sparse_attention(*operands(), backend="reference"))
    call = Call("cpu", None, torch.float32, 64)
    assert kernels.choose_kernel(call).name == "reference"
    assert "self-test on cpu" in kernels.explain_kernels(call)["wrong"]


def test_a_kernel_chosen_by_name_raises_what_was_measured(wrong_one_first):
    for _ in range(2):
        with pytest.raises((KernelUnusable, kernels.NoKernel), match="wrong: self-test on cpu .* found relative L2"):
            block_sparse_attention(*operands(), backend="wrong")


def test_a_compiled_call_is_tested_too(wrong_one_first):
    torch._dynamo.reset()
    compiled = torch.compile(block_sparse_attention, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*operands()), block_sparse_attention(*operands(), backend="reference"))


def test_an_unproven_kernel_chosen_by_name_is_tested_and_warned_about_once(caplog, monkeypatch):
    spec = spec_of(reference.run)
    monkeypatch.setattr(kernels, "KERNELS", (spec, reference.SPEC))
    with caplog.at_level(logging.INFO, logger=self_test.log.name):
        for _ in range(2):
            block_sparse_attention(*operands(), backend="candidate")
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "candidate was asked for and is unproven" in warnings[0]
    assert any("passed its self-test on cpu" in record.getMessage() for record in caplog.records)


def test_the_reference_is_not_compared_with_itself():
    assert reference.SPEC.source is None
    assert self_test.ready(reference.SPEC, Call("cpu", None, torch.float32, 64), CPU, crashes) is reference.run


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cuda_kernel_passes_in_the_emulator(dim, dtype):
    if reason := emulated_sm90.unavailable():
        pytest.skip(reason)
    call = Call("cpu", None, dtype, dim)
    assert self_test.ready(spec_of(emulated_sm90.run), call, CPU, reference.run) is emulated_sm90.run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_kernel_that_gathers_is_tested_on_gathered_tokens_too(dtype):
    def forgets_the_gate(*args):
        return reference.run(*args[:9], args[9] * 0, *args[10:]) if len(args) > 9 else reference.run(*args)

    call = Call("cpu", None, dtype, 64)
    right = KernelSpec("right", lambda: reference.run, ("cpu",), ("cpu",), (dtype,), source=Path(__file__),
                       gathers=lambda grid: True)
    wrong = KernelSpec("wrong", lambda: forgets_the_gate, ("cpu",), ("cpu",), (dtype,), source=Path(__file__),
                       gathers=lambda grid: True)
    assert self_test.ready(right, call, CPU, reference.run) is reference.run
    with pytest.raises(KernelUnusable, match="failed where tokens are gathered: found relative L2"):
        self_test.ready(wrong, call, CPU, reference.run)


def test_triton_passes_its_gathered_self_test_in_the_interpreter():
    pytest.importorskip("triton")
    with interpreted_kernel.start() as worker:
        def run(*operands):
            return interpreted_kernel.call(worker, "block_sparse", *operands)

        call = Call("cpu", None, torch.float16, 128)
        assert self_test._difference_and_gathered(run, call, CPU, reference.run) is None
