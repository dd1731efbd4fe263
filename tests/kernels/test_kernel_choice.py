"""Which kernel runs a call, what is said when none does, and what the public op refuses."""
from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from pack.kernels import (
    AUTO,
    KERNELS,
    Call,
    NoKernel,
    block_sparse_attention,
    choose_kernel,
    explain_kernels,
)

pytest.importorskip("triton")

BF16 = torch.bfloat16
GPU = Call("cuda", (8, 9), BF16, 128)


def operands(dtype=torch.float32, dim=16):
    q = torch.randn(1, 128, 2, dim, dtype=dtype)
    k, v = (torch.randn(1, 192, 2, dim, dtype=dtype) for _ in range(2))
    indices = torch.tensor([0, 2], dtype=torch.int32).repeat(1, 2, 2, 1)
    return dict(q=q, k=k, v=v, indices=indices, counts=torch.full((1, 2, 2), 2, dtype=torch.int32),
                block_sizes=torch.tensor([64, 64, 9], dtype=torch.int32))


def test_auto_takes_the_first_kernel_of_the_table_that_runs_the_call():
    assert choose_kernel(Call("cpu", None, torch.float32, 96)).name == "reference"
    assert choose_kernel(GPU).name == "triton"
    h100 = Call("cuda", (9, 0), BF16, 128)
    assert choose_kernel(h100) is KERNELS[0]
    assert choose_kernel(h100, exclude={KERNELS[0].name: "failed"}).name == "triton"


@pytest.mark.parametrize(("call", "reason"), [
    (Call("cpu", None, BF16, 128), "your CPU cannot run it (needs an NVIDIA card)"),
    (Call("rocm", None, BF16, 128), "your AMD card cannot run it (needs an NVIDIA card)"),
    (Call("cuda", (7, 5), BF16, 128),
     "your NVIDIA card of compute capability 7.5 cannot run it (needs RTX 30 series or newer)"),
    (Call("cuda", (8, 9), torch.float32, 128), "it computes in bfloat16 or float16, this model in float32"),
    (Call("cuda", (8, 9), BF16, 96), "it takes heads of 64 or 128 channels, this model has 96"),
], ids=["device", "another make", "capability", "dtype", "head_dim"])
def test_triton_chosen_by_name_says_why_it_does_not_run(call, reason):
    with pytest.raises(NoKernel) as error:
        choose_kernel(call, "triton")
    assert str(error.value) == f"no kernel for this call: triton: {reason}"
    assert error.value.reasons == {"triton": reason} and explain_kernels(call)["triton"] == reason


def test_a_card_is_called_as_its_owner_calls_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 2080 Ti")
    call = Call("cuda", (7, 5), BF16, 128, torch.device("cuda", 0))
    assert KERNELS[1].refusal(call) == (
        "your NVIDIA GeForce RTX 2080 Ti cannot run it (needs RTX 30 series or newer)")


def test_nothing_is_to_be_installed_for_a_card_or_a_model_that_cannot_run_it_anyway(monkeypatch):
    spec = dataclasses.replace(KERNELS[1], missing=lambda: "install it")
    assert spec.refusal(GPU) == "install it"
    for call in (dataclasses.replace(GPU, capability=(7, 5)), dataclasses.replace(GPU, head_dim=96),
                 dataclasses.replace(GPU, dtype=torch.float32)):
        assert spec.refusal(call) == KERNELS[1].refusal(call) != "install it"


def test_a_reason_that_several_kernels_have_is_said_once():
    call = Call("cpu", None, torch.float32, 96)
    with pytest.raises(NoKernel) as error:
        choose_kernel(call, exclude={"reference": "gave NaN earlier"})
    assert str(error.value) == ("no kernel for this call: cuda_sm90, triton: your CPU cannot run it (needs an NVIDIA "
                                "card) · reference: gave NaN earlier")


def test_a_kernel_whose_package_is_absent_says_what_to_install(monkeypatch):
    import importlib.util
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    with pytest.raises(NoKernel, match="triton: triton is not installed, and torch "):
        choose_kernel(GPU, "triton")


def test_the_cuda_kernel_wants_exactly_the_gpu_it_is_built_for():
    call = Call("cuda", (10, 0), BF16, 128)
    assert explain_kernels(call)["cuda_sm90"] == (
        "your NVIDIA card of compute capability 10.0 cannot run it (needs H100 or H200)")
    assert KERNELS[0].name == "cuda_sm90"


def test_auto_lists_the_reason_of_every_kernel():
    call = Call("cuda", (7, 5), torch.float32, 96)
    with pytest.raises(NoKernel) as error:
        choose_kernel(call)
    for spec in KERNELS:
        assert (f"{spec.name}: {spec.refusal(call, auto=True)}" in str(error.value)) == spec.exact
    assert error.value.reasons["reference"] == (
        "slower than dense attention on your NVIDIA card of compute capability 7.5")


def test_an_excluded_kernel_gives_the_reason_it_was_excluded_for():
    with pytest.raises(NoKernel, match="reference: gave NaN earlier"):
        choose_kernel(Call("cpu", None, torch.float32, 64), exclude={"reference": "gave NaN earlier"})


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(ValueError) as error:
        block_sparse_attention(**operands(), backend="cutlass")
    assert str(error.value).startswith("unknown kernel 'cutlass': wanted 'auto' or one of ")
    assert all(spec.name in str(error.value) for spec in KERNELS)


def test_the_public_op_raises_for_a_named_kernel_that_cannot_run():
    with pytest.raises(NoKernel, match="triton: your CPU cannot run it .needs an NVIDIA card."):
        block_sparse_attention(**operands(BF16, 64), backend="triton")


def edited(**changes):
    values = operands()
    return values | {name: change(values[name]) for name, change in changes.items()}


@pytest.mark.parametrize(("changes", "message"), [
    (dict(q=lambda x: x[0]), "found q [128, 2, 16], wanted [batch, sequence, heads, head_dim]"),
    (dict(q=lambda x: x[:, :100]), "found q of 100 slots, wanted a multiple of 64"),
    (dict(k=lambda x: x.double()), "found k in torch.float64 on cpu, wanted q's torch.float32 on cpu"),
    (dict(v=lambda x: x.to("meta")), "found v in torch.float32 on meta, wanted q's torch.float32 on cpu"),
    (dict(v=lambda x: x.mT.contiguous().mT), "found v with head_dim stride 2, wanted head_dim contiguous (stride 1)"),
    (dict(k=lambda x: x[:, :128]), "wanted k and v of one shape, with q's batch, heads and head_dim"),
    (dict(q=lambda x: x[..., :1, :]), "wanted k and v of one shape, with q's batch, heads and head_dim"),
    (dict(indices=lambda x: x[0]), "found indices [2, 2, 2], wanted [1, 2, 2, K]"),
    (dict(indices=lambda x: x[:, :, :1]), "found indices [1, 2, 1, 2], wanted [1, 2, 2, K]"),
    (dict(counts=lambda x: x[..., :1]), "found counts [1, 2, 1], wanted [1, 2, 2]"),
    (dict(block_sizes=lambda x: x[:2]), "found block_sizes [2], wanted [3]"),
    (dict(indices=lambda x: x.long()), "found indices in torch.int64 on cpu, wanted int32 on cpu"),
    (dict(counts=lambda x: x.float()), "found counts in torch.float32 on cpu, wanted int32 on cpu"),
    (dict(block_sizes=lambda x: x.to("meta")), "found block_sizes in torch.int32 on meta, wanted int32 on cpu"),
])
def test_operands_that_break_the_contract_are_named_with_what_was_wanted(changes, message):
    with pytest.raises(ValueError) as error:
        block_sparse_attention(**edited(**changes))
    assert str(error.value).startswith("block_sparse_attention: ") and message in str(error.value)


def test_scale_is_the_inverse_root_of_head_dim_unless_given():
    values = operands()
    assert torch.equal(block_sparse_attention(**values), block_sparse_attention(**values, scale=16 ** -0.5))


def test_auto_and_the_name_of_what_it_takes_give_the_same_bits():
    values = operands()
    name = choose_kernel(Call.of(values["q"]), AUTO).name
    assert torch.equal(block_sparse_attention(**values), block_sparse_attention(**values, backend=name))


@pytest.mark.parametrize("return_lse", [False, True])
def test_the_op_keeps_its_promises_to_the_compiler(return_lse):
    op = torch.ops.video_sparse_attention.block_sparse_attention.default
    torch.library.opcheck(op, (*operands().values(), 0.25, "reference", return_lse))


def test_fake_tensors_get_the_shapes_and_dtypes_of_real_ones():
    from torch._subclasses import FakeTensorMode
    values = operands()
    values["q"] = values["q"].transpose(1, 2).contiguous().transpose(1, 2)
    real = block_sparse_attention(**values, backend="reference", return_lse=True)
    with FakeTensorMode() as mode:
        fake = block_sparse_attention(**{name: mode.from_tensor(x) for name, x in values.items()},
                                      backend="reference", return_lse=True)
    for a, b in zip(real, fake):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("backend", ["reference", AUTO])
def test_the_public_op_compiles_into_one_graph(backend):
    values = operands()

    def attend(**values):
        out, lse = block_sparse_attention(**values, backend=backend, return_lse=True)
        return out * 2, lse

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="eager")
    for got, wanted in zip(compiled(**values), attend(**values)):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(("capability", "as_on"), [((8, 7), (8, 6)), ((8, 9), (8, 9)), ((12, 1), (12, 0))])
def test_a_card_that_is_not_listed_is_launched_like_the_nearest_older_one(capability, as_on):
    from pack.kernels.triton.configs import CONFIGS, config_for
    for head_dim in (64, 128):
        assert config_for(capability, head_dim, BF16) == CONFIGS[as_on, head_dim, BF16]


@pytest.mark.parametrize("capability", [(10, 0), (13, 0), None])
def test_a_generation_that_is_not_listed_gets_the_default_launch(capability):
    from pack.kernels.triton.configs import DEFAULT, config_for
    assert config_for(capability, 128, BF16) == DEFAULT


def test_auto_takes_a_kernel_that_rounds_only_where_it_is_asked_to_and_then_first():
    cpu = Call("cpu", None, torch.float32, 64)
    assert choose_kernel(GPU).name == "triton" and choose_kernel(cpu).name == "reference"
    assert choose_kernel(GPU, precision="int8 scores").name == "triton_int8"
    assert choose_kernel(cpu, precision="int8 scores").name == "reference_int8"
    assert choose_kernel(GPU, "triton_int8").name == "triton_int8"
    failed = {"triton_int8": "failed"}
    assert choose_kernel(GPU, exclude=failed, precision="int8 scores").name == "triton", "an exact one in its place"
    with pytest.raises(ValueError, match="precision 'int4': wanted exact or int8 scores"):
        choose_kernel(GPU, precision="int4")


def test_kernels_that_round_are_listed_where_they_are_asked_for():
    from pack.kernels import backend_list
    names = [[line.split(":")[0] for line in backend_list(GPU, *asked)]
             for asked in (("auto",), ("triton_int8",), ("auto", None, "int8 scores"))]
    assert names == [["cuda_sm90", "triton", "reference"], ["cuda_sm90", "triton", "triton_int8", "reference"],
                     [spec.name for spec in KERNELS]]
