"""Every way of not getting the kernel ends in a reason and the next step, never in a crash."""
from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from fake_driver import FakeCuda, FakeNvrtc, loader
from pack.kernels import Call, KernelUnusable, backend_list, user_cache
from pack.kernels.cuda_sm90 import cache as cache_module
from pack.kernels.cuda_sm90 import nvrtc
from pack.kernels.cuda_sm90.cache import Cache, CacheMiss
from pack.kernels.cuda_sm90.driver import Driver, DriverError
from pack.kernels.cuda_sm90.loader import Loader, key
from pack.kernels.cuda_sm90.nvrtc import Nvrtc, NvrtcError

ROOT = Path(__file__).resolve().parents[2]
NAME = key(128, "bfloat16")


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
        monkeypatch.setattr(user_cache.tempfile, "NamedTemporaryFile", refuse)
    ready = Loader(lambda: Driver(FakeCuda()), FakeNvrtc, Cache(None if how == "no home" else tmp_path / "disk"),
                   Cache(tmp_path / "bundled"))
    ready.function(0, 128, "bfloat16")
    assert "NVRTC: loaded" in ready.steps() and "not kept on disk: " in ready.steps()


def refuse(*args, **kwargs):
    raise PermissionError(13, "Permission denied")


def test_an_interrupted_write_leaves_neither_a_file_nor_a_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(user_cache.os, "replace", refuse)
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
