"""What a launch asks of the driver: a context, tensor maps, parameters in the kernel's order; refusals are reasons."""
from __future__ import annotations

import ctypes
import math
import re

import pytest

from fake_driver import FakeCuda, FakeNvrtc, answer, loader, names, operands
from pack.kernels import KernelUnusable
from pack.kernels.cuda_sm90 import launch
from pack.kernels.cuda_sm90.boxes import Boxes, Coarse, Start
from pack.kernels.cuda_sm90.driver import NO_MAP
from pack.kernels.cuda_sm90.loader import constant


def test_a_thread_without_a_context_gets_the_devices_primary_one_before_anything_else(tmp_path):
    cuda = FakeCuda(cuDeviceGet=answer(41), cuDevicePrimaryCtxRetain=answer(0xc0ffee))
    launch.run(*operands(), 0.25, True, loader=loader(tmp_path, cuda))
    assert names(cuda)[:5] == ["cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent",
                               "cuModuleLoadData"]
    arguments = dict(cuda.calls)
    assert arguments["cuDeviceGet"][1].value == 0 and arguments["cuDevicePrimaryCtxRetain"][1].value == 41
    assert arguments["cuCtxSetCurrent"][0].value == 0xc0ffee


def test_every_launch_looks_for_a_context_and_retains_a_devices_own_once(tmp_path):
    cuda = FakeCuda(cuDevicePrimaryCtxRetain=answer(0xc0ffee))
    ready = loader(tmp_path, cuda)
    for device in (0, 0, 1, 0):
        ready.function(device, 128, "bfloat16")
    assert [names(cuda).count(name) for name in ("cuCtxGetCurrent", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent")] == [
        4, 2, 4]
    assert [args[1].value for name, args in cuda.calls if name == "cuDeviceGet"] == [0, 1]


def test_a_context_that_is_current_stays(tmp_path):
    cuda = FakeCuda(cuCtxGetCurrent=answer(0xbeef))
    loader(tmp_path, cuda).function(0, 128, "bfloat16")
    assert not {"cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"} & set(names(cuda))


@pytest.mark.parametrize("call", ["cuCtxGetCurrent", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent"])
def test_no_context_is_a_reason(tmp_path, call):
    with pytest.raises(KernelUnusable, match=f"no context on cuda:1: {call} failed: invalid argument"):
        loader(tmp_path, FakeCuda(**{call: 1})).function(1, 128, "bfloat16")


def test_a_launch_hands_over_what_the_kernel_declares(tmp_path):
    seen = {}

    def launched(*args):
        seen["configuration"] = [a.value for a in args[1:8]]
        pointers = list(args[9])
        kinds = [ctypes.c_void_p] * 6 + [ctypes.c_longlong] * 7 + [ctypes.c_int] * 5 + [ctypes.c_float]
        seen["maps"] = pointers[:6]
        seen["boxes"], seen["coarse"] = Boxes.from_address(pointers[6]), Coarse.from_address(pointers[7])
        seen["start"] = Start.from_address(pointers[8])
        seen["values"] = [kind.from_address(at).value for kind, at in zip(kinds, pointers[9:], strict=True)]
        assert (seen["boxes"].blocks, seen["coarse"].means) == (0, None)
        assert (seen["start"].lse, seen["start"].tiles, seen["start"].blocks_per_tile) == (None, 0, 1)
        return 0

    cuda, tensors = FakeCuda(cuLaunchKernel=launched), operands()
    out, lse = launch.run(*tensors, 0.25, True, loader=loader(tmp_path, cuda))
    encoded = [args for name, args in cuda.calls if name == "cuTensorMapEncodeTiled"]
    assert seen["maps"] == [ctypes.addressof(NO_MAP)] * 3 + [ctypes.addressof(args[0]) for args in encoded]
    for args, x in zip(encoded, tensors):
        assert ctypes.addressof(args[0]) % 128 == 0 and ctypes.sizeof(args[0]) == 128
        assert [args[1].value, args[2].value, args[3].value] == [9, 5, x.data_ptr()]
        assert [list(args[i]) for i in (4, 5, 6, 7)] == [
            [64, 192, 2, 2, 1], [512, 128, 256, 128], [64, 64, 2, 1, 1], [1] * 5]
        assert [a.value for a in args[8:]] == [0, 3, 3, 0]
    assert seen["configuration"] == [2, 2, 1, constant("THREADS", 128), 1, 1, constant("SHARED_BYTES", 128)]
    *values, scale = seen["values"]
    assert values == [*(x.data_ptr() for x in (out, lse, *tensors[3:])), None, 0, 0, 0, 1, 6, 3, 1, 3, 3, 3, 3, 192]
    assert scale == pytest.approx(0.25 * math.log2(math.e))


def launch_parameters():
    from pack.kernels.cuda_sm90.loader import source
    text = source().split("block_sparse_forward(")[1].split(") {")[0]
    return [parameter.split()[-1] for parameter in text.split(",")]


def test_the_parameters_stand_in_the_order_in_which_they_are_handed_over():
    assert launch_parameters() == [
        "q_boxes", "k_boxes", "v_boxes", "q_packed", "k_packed", "v_packed", "boxes", "coarse", "start", "out", "lse",
        "indices", "counts", "block_sizes", "packed_rows", "stride_ib", "stride_ih", "stride_iq", "stride_ik",
        "stride_cb", "stride_ch", "stride_cq", "longest", "lists", "query_blocks", "key_blocks", "tokens",
        "scale_log2e"]


@pytest.mark.parametrize("structure", [Boxes, Coarse, Start])
def test_the_fields_of_a_structure_stand_in_the_order_in_which_they_are_filled(structure):
    from pack.kernels.cuda_sm90.loader import source
    text = source().split(f"struct {structure.__name__} {{")[1].split("};")[0]
    declared = [re.sub(r"\[\d+\]", "", name) for line in text.splitlines() if ";" in line
                for name in re.findall(r"(\w+(?:\[\d+\])?)\s*[,;]", line.split("//")[0])]
    assert declared == [name for name, _ in structure._fields_]


@pytest.mark.parametrize(("dim", "promotion"), [(64, 2), (128, 3)])
def test_a_miss_in_the_cache_brings_a_heads_row_and_not_the_next_heads(tmp_path, dim, promotion):
    """CU_TENSOR_MAP_L2_PROMOTION: 2 is 128 bytes, 3 is 256."""
    cuda = FakeCuda()
    launch.run(*operands(dim), 0.25, True, loader=loader(tmp_path, cuda))
    assert [args[10].value for name, args in cuda.calls if name == "cuTensorMapEncodeTiled"] == [promotion] * 3


def test_tensors_that_lie_alike_share_their_tensor_maps(tmp_path):
    cuda, tensors = FakeCuda(), operands()
    ready = loader(tmp_path, cuda)
    for _ in range(3):
        launch.run(*tensors, 0.25, False, loader=ready)
    assert [name for name, _ in cuda.calls].count("cuTensorMapEncodeTiled") == 3
    launch.run(tensors[0].clone(), *tensors[1:], 0.25, False, loader=ready)
    assert [name for name, _ in cuda.calls].count("cuTensorMapEncodeTiled") == 4


@pytest.mark.parametrize("cuda", [FakeCuda(cuTensorMapEncodeTiled=1), FakeCuda(cuLaunchKernel=1),
                                  FakeCuda(absent=["cuTensorMapEncodeTiled"])], ids=["encode", "launch", "no encode"])
def test_a_refused_launch_is_a_reason_with_the_shapes(tmp_path, cuda):
    with pytest.raises(KernelUnusable, match=r"the driver refused a launch over \[1, 192, 2, 128\] with strides"):
        launch.run(*operands(), 0.25, True, loader=loader(tmp_path, cuda))


def test_nothing_to_attend_to_needs_no_kernel(tmp_path):
    q, k, v, indices, counts, sizes = operands()
    ready = loader(tmp_path, compiler=FakeNvrtc("must not be asked"))
    out, lse = launch.run(q, k[:, :0], v[:, :0], indices, counts, sizes[:0], 0.25, True, loader=ready)
    assert not out.any() and (lse == -math.inf).all()
    out, lse = launch.run(q[:, :0], k, v, indices[:, :, :0], counts[:, :, :0], sizes, 0.25, False, loader=ready)
    assert out.shape == (1, 0, 2, 128) and lse is None
