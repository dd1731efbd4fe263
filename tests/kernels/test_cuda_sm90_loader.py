"""Every way of not getting the kernel ends in a reason and the next step, never in a crash."""
from __future__ import annotations

import ctypes
import math
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pack.kernels import Call, KernelUnusable, backend_list
from pack.kernels.cuda_sm90 import cache as cache_module
from pack.kernels.cuda_sm90 import launch, nvrtc
from pack.kernels.cuda_sm90.boxes import Boxes, Coarse
from pack.kernels.cuda_sm90.cache import Cache, CacheMiss
from pack.kernels.cuda_sm90.driver import NO_MAP, Driver, DriverError
from pack.kernels.cuda_sm90.loader import Loader, constant, key
from pack.kernels.cuda_sm90.nvrtc import Nvrtc, NvrtcError

ROOT = Path(__file__).resolve().parents[2]
NAME = key(128, "bfloat16")


class FakeCuda:
    """libcuda: answers like it, refuses the calls named in `broken` with that code."""

    def __init__(self, absent=(), **broken):
        self.broken, self.calls = broken, []
        for name in ("cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute", "cuTensorMapEncodeTiled",
                     "cuLaunchKernel"):
            if name not in absent:
                setattr(self, name, lambda *args, name=name: self._answer(name, args))

    def _answer(self, name, args):
        self.calls.append((name, args))
        code = self.broken.get(name, 0)
        return code(*args) if callable(code) else code

    def cuGetErrorString(self, code, text):
        text._obj.value = {209: b"no kernel image is available", 1: b"invalid argument"}.get(code)
        return 0 if text._obj.value else 1


class FakeNvrtc:
    def __init__(self, error=None):
        self.error, self.compiled = error, 0

    def compile(self, source, name, options):
        if self.error:
            raise NvrtcError(self.error)
        self.compiled += 1
        return b"cubin from NVRTC", ""


def loader(tmp_path, cuda=None, compiler=None, bundled=None):
    return Loader(lambda: Driver(cuda or FakeCuda()), lambda: compiler or FakeNvrtc(), Cache(tmp_path / "disk"),
                  Cache(bundled or tmp_path / "bundled"))


def loaded(cuda):
    return [args[1] for name, args in cuda.calls if name == "cuModuleLoadData"]


def test_nothing_stored_compiles_once_and_stores_the_cubin(tmp_path):
    cuda, compiler = FakeCuda(), FakeNvrtc()
    first = loader(tmp_path, cuda, compiler)
    assert first.function(0, 128, "bfloat16") is first.function(0, 128, "bfloat16")
    assert compiler.compiled == 1 and Cache(tmp_path / "disk").read(NAME) == b"cubin from NVRTC"
    assert first.steps() == ("head_dim 128 bfloat16 on cuda:0: bundled cubin: not built on this machine yet; "
                             "disk cache: not built on this machine yet; NVRTC: loaded")
    again = loader(tmp_path, cuda, FakeNvrtc("must not be asked"))
    again.function(0, 128, "bfloat16")
    assert "disk cache: loaded" in again.steps()


def test_a_bundled_cubin_comes_first_and_is_found_by_source_and_options(tmp_path):
    Cache(tmp_path / "bundled").write(NAME, b"bundled")
    Cache(tmp_path / "disk").write(NAME, b"stored")
    cuda = FakeCuda()
    loader(tmp_path, cuda).function(0, 128, "bfloat16")
    assert loaded(cuda) == [b"bundled"]
    assert len({key(dim, dtype) for dim in (64, 128) for dtype in ("bfloat16", "float16")}) == 4


def test_the_key_changes_with_the_source(monkeypatch):
    from pack.kernels.cuda_sm90 import loader as module
    monkeypatch.setattr(module, "source", lambda: "another text")
    assert key(128, "bfloat16") != NAME


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:20], lambda content: b"",
                                    lambda content: b"x" + content[1:]])
def test_a_corrupt_cache_file_is_replaced(tmp_path, damage):
    disk, compiler = Cache(tmp_path / "disk"), FakeNvrtc()
    disk.write(NAME, b"stored")
    path = tmp_path / "disk" / NAME
    path.write_bytes(damage(path.read_bytes()))
    ready = loader(tmp_path, compiler=compiler)
    ready.function(0, 128, "bfloat16")
    assert compiler.compiled == 1 and "is corrupt" in ready.steps() and disk.read(NAME) == b"cubin from NVRTC"


def test_a_stored_cubin_that_the_driver_refuses_is_compiled_anew(tmp_path):
    Cache(tmp_path / "disk").write(NAME, b"for another driver")
    cuda = FakeCuda(cuModuleLoadData=lambda module, cubin: 209 if cubin == b"for another driver" else 0)
    ready = loader(tmp_path, cuda)
    ready.function(0, 128, "bfloat16")
    assert loaded(cuda) == [b"for another driver", b"cubin from NVRTC"]
    assert "disk cache: cuModuleLoadData failed: no kernel image is available (CUDA error 209)" in ready.steps()


@pytest.mark.parametrize("how", ["a file in its place", "no home", "no permission"])
def test_a_cache_folder_that_cannot_be_written_costs_only_the_cache(tmp_path, monkeypatch, how):
    if how == "a file in its place":
        (tmp_path / "disk").write_text("")
    elif how == "no home":
        monkeypatch.setattr(cache_module, "default_folder", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        monkeypatch.setattr(cache_module.tempfile, "NamedTemporaryFile", refuse)
    ready = Loader(lambda: Driver(FakeCuda()), FakeNvrtc, Cache(None if how == "no home" else tmp_path / "disk"),
                   Cache(tmp_path / "bundled"))
    ready.function(0, 128, "bfloat16")
    assert "NVRTC: loaded" in ready.steps() and "not kept on disk: " in ready.steps()


def refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")


def test_an_interrupted_write_leaves_neither_a_file_nor_a_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module.os, "replace", refuse)
    assert "Permission denied" in Cache(tmp_path).write("name", b"content")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CacheMiss):
        Cache(tmp_path).read("name")


def test_processes_that_compile_at_once_leave_one_whole_file(tmp_path):
    code = ("import sys; sys.path.insert(0, 'tests'); import conftest\n"
            "from pathlib import Path; from pack.kernels.cuda_sm90.cache import Cache\n"
            "for i in range(200):\n"
            f"    cache = Cache(Path({str(tmp_path)!r}))\n"
            "    assert cache.write('name', bytes([int(sys.argv[1])]) * 70000) is None\n"
            "    assert len(set(cache.read('name'))) == 1\n")
    running = [subprocess.Popen([sys.executable, "-c", code, str(i)], cwd=ROOT) for i in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_threads_that_ask_at_once_compile_once(tmp_path):
    compiler = FakeNvrtc()
    ready, found = loader(tmp_path, compiler=compiler), []
    threads = [threading.Thread(target=lambda: found.append(ready.function(0, 64, "float16"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert compiler.compiled == 1 and len(found) == 8


@pytest.mark.parametrize(("cuda", "compiler", "reason"), [
    (None, FakeNvrtc("no libnvrtc.so.12"), "NVRTC: no libnvrtc.so.12"),
    (FakeCuda(cuModuleLoadData=209), None, "NVRTC: cuModuleLoadData failed: no kernel image is available"),
    (FakeCuda(cuModuleGetFunction=500), None, "NVRTC: cuModuleGetFunction failed: CUDA error 500"),
    (FakeCuda(cuFuncSetAttribute=1), None, "NVRTC: cuFuncSetAttribute failed: invalid argument"),
    (FakeCuda(absent=["cuModuleLoadData"]), None, "the driver has no cuModuleLoadData"),
], ids=["no NVRTC", "old driver", "strange cubin", "less shared memory", "very old driver"])
def test_when_every_step_fails_all_reasons_are_said_and_nothing_is_tried_twice(tmp_path, cuda, compiler, reason):
    compiler = compiler or FakeNvrtc()
    ready = loader(tmp_path, cuda, compiler)
    for _ in range(2):
        with pytest.raises(KernelUnusable) as error:
            ready.function(0, 128, "bfloat16")
        assert reason in str(error.value) and "disk cache: not built on this machine yet" in str(error.value)
    assert compiler.compiled <= 1 and reason in ready.steps()


def test_no_driver_is_a_reason():
    def nothing():
        raise DriverError("no CUDA driver: libcuda.so.1: cannot open shared object file")
    with pytest.raises(KernelUnusable, match="no CUDA driver"):
        Loader(nothing).function(0, 128, "bfloat16")


def test_nvrtc_is_looked_for_beside_torch_in_its_packages_and_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setattr(nvrtc.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(nvrtc.torch.version, "cuda", "13.0")
    monkeypatch.setattr(nvrtc.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path), "platlib": str(tmp_path)})
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    names = nvrtc._names(13) + nvrtc._names(12)
    assert list(nvrtc.candidates(nvrtc._majors())) == names
    places = [tmp_path / "nvidia" / "cu13" / "lib" / names[0], tmp_path / "torch" / "lib" / names[1],
              tmp_path / "nvidia" / "cuda_nvrtc" / "lib" / names[1]]
    for place in places:
        place.parent.mkdir(parents=True)
        place.touch()
    assert list(nvrtc.candidates(nvrtc._majors())) == [*map(str, places), *names]
    assert list(nvrtc.candidates((12,))) == [*map(str, places[1:]), names[1]]
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", lambda path: (_ for _ in ()).throw(OSError("cannot open")))
    with pytest.raises(NvrtcError, match="pip install nvidia-cuda-nvrtc-cu12"):
        Nvrtc()


@pytest.mark.parametrize("broken", [False, True])
def test_the_builtins_beside_nvrtc_are_opened_before_it(tmp_path, monkeypatch, broken):
    """NVRTC of CUDA 13 cannot compile otherwise: it neither has a search path of its own nor is one set for it."""
    names = ["libnvrtc-builtins.so.13.0", "libnvrtc.so.13"]
    for name in names:
        (tmp_path / name).touch()
    opened = []

    def open_library(path):
        opened.append(Path(path).name)
        if broken and "builtins" in Path(path).name:
            raise OSError("cannot open")
        return path
    monkeypatch.setattr(nvrtc, "candidates", lambda majors: iter([str(tmp_path / names[1])]))
    monkeypatch.setattr(nvrtc.ctypes, "CDLL", open_library)
    assert nvrtc._open((13,)) == str(tmp_path / names[1]) and opened == names


def test_the_names_on_windows_are_those_that_torch_ships(monkeypatch):
    monkeypatch.setattr(nvrtc.os, "name", "nt")
    names = nvrtc._names(12), nvrtc._names(13)
    monkeypatch.undo()
    assert names == (["nvrtc64_120_0.dll"], ["nvrtc64_130_0.dll"])


def operands(dim=128):
    q, k, v = (torch.randn(1, 192, 2, dim).bfloat16() for _ in range(3))
    indices = torch.arange(3, dtype=torch.int32).expand(1, 2, 3, 3)
    return q, k, v, indices, torch.full((1, 2, 3), 3, dtype=torch.int32), torch.full((3,), 64, dtype=torch.int32)


def test_a_launch_hands_over_what_the_kernel_declares(tmp_path):
    seen = {}

    def launched(*args):
        seen["configuration"] = [a.value for a in args[1:8]]
        pointers = list(args[9])
        kinds = [ctypes.c_void_p] * 6 + [ctypes.c_longlong] * 7 + [ctypes.c_int] * 5 + [ctypes.c_float]
        seen["maps"] = pointers[:6]
        seen["boxes"], seen["coarse"] = Boxes.from_address(pointers[6]), Coarse.from_address(pointers[7])
        seen["values"] = [kind.from_address(at).value for kind, at in zip(kinds, pointers[8:], strict=True)]
        assert (seen["boxes"].blocks, seen["coarse"].means) == (0, None)
        return 0

    cuda, tensors = FakeCuda(cuLaunchKernel=launched), operands()
    out, lse = launch.run(*tensors, 0.25, True, loader=loader(tmp_path, cuda))
    encoded = [args for name, args in cuda.calls if name == "cuTensorMapEncodeTiled"]
    assert seen["maps"] == [ctypes.addressof(NO_MAP)] * 3 + [ctypes.addressof(args[0]) for args in encoded]
    for args, x in zip(encoded, tensors):
        assert ctypes.addressof(args[0]) % 64 == 0 and ctypes.sizeof(args[0]) == 128
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
        "q_boxes", "k_boxes", "v_boxes", "q_packed", "k_packed", "v_packed", "boxes", "coarse", "out", "lse", "indices",
        "counts", "block_sizes", "packed_rows", "stride_ib", "stride_ih", "stride_iq", "stride_ik", "stride_cb",
        "stride_ch", "stride_cq", "longest", "lists", "query_blocks", "key_blocks", "tokens", "scale_log2e"]


@pytest.mark.parametrize("structure", [Boxes, Coarse])
def test_the_fields_of_a_structure_stand_in_the_order_in_which_they_are_filled(structure):
    from pack.kernels.cuda_sm90.loader import source
    text = source().split(f"struct {structure.__name__} {{")[1].split("};")[0]
    declared = [re.sub(r"\[\d+\]", "", name) for line in text.splitlines() if ";" in line
                for name in re.findall(r"(\w+(?:\[\d+\])?)\s*[,;]", line.split("//")[0])]
    assert declared == [name for name, _ in structure._fields_]


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


def test_importing_the_kernel_opens_no_library_and_reads_no_cache():
    code = ("import sys; sys.path.insert(0, 'tests'); import conftest, pack.kernels\n"
            "assert not {'pack.kernels.cuda_sm90.nvrtc', 'pack.kernels.cuda_sm90.driver'} & set(sys.modules)\n")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": ""})


def test_where_the_code_came_from_is_in_the_backend_list(tmp_path, monkeypatch):
    from pack.kernels.cuda_sm90 import loader as module
    call = Call("cuda", (9, 0), torch.bfloat16, 128)
    monkeypatch.setattr(module, "LOADER", loader(tmp_path, compiler=FakeNvrtc()))
    assert backend_list(call, "cuda_sm90")[0] == "cuda_sm90: can run"
    module.LOADER.function(0, 128, "bfloat16")
    assert backend_list(call, "cuda_sm90")[0] == (
        "cuda_sm90: can run (head_dim 128 bfloat16 on cuda:0: bundled cubin: not built on this machine yet; "
        "disk cache: not built on this machine yet; NVRTC: loaded)")
