"""The repository root as package `pack`, and a real ComfyUI for the tests that ask for one."""
import gc
import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load_pack():
    """Imports the root under the name `pack`, as ComfyUI does under a name of its own. Imports no torch."""
    spec = importlib.util.spec_from_file_location("pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = module
    spec.loader.exec_module(module)
    return module


if "pack" not in sys.modules:
    load_pack()


FROZEN = [0]
"""How many modules there were when what stood was last taken out of the collector's sight."""


def freeze():
    """What stands for the whole session is no garbage: ComfyUI asks for a collection with almost every model that it
    drops, and half a million objects of tests and libraries made one take half a second."""
    gc.collect()
    gc.freeze()
    FROZEN[0] = len(sys.modules)


def pytest_collection_finish():
    freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """After the last test of a file, whose models are gone then: libraries are imported late."""
    if len(sys.modules) > FROZEN[0] + 50 and getattr(nextitem, "path", None) != item.path:
        freeze()


@pytest.fixture(scope="session")
def comfyui(tmp_path_factory):
    """The root of the ComfyUI that `comfy`, `nodes` and `folder_paths` are imported from in this process."""
    import comfy_boot
    root = comfy_boot.locate()
    if root is None:
        reason = "no ComfyUI checkout: run `make setup` or set COMFYUI_PATH"
        if os.environ.get("REQUIRE_COMFYUI") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    base = tmp_path_factory.mktemp("comfyui_base")
    comfy_boot.boot(root, "--use-pytorch-cross-attention", "--base-directory", str(base))
    import comfy.utils
    comfy.utils.set_progress_bar_enabled(False)
    freeze()
    return root


@pytest.fixture(scope="session")
def tiny(comfyui):
    """tiny("tiny_wan_t2v") -> path of that tiny checkpoint, made for this ComfyUI on first use."""
    import make_tiny

    def path(name):
        try:
            return make_tiny.make(name, make_tiny.folder_for(comfyui))
        except make_tiny.Unavailable as error:
            pytest.skip(str(error))
    return path


@pytest.fixture(scope="module")
def worker():
    """A process that runs the Triton kernels in Triton's interpreter: for `interpreted_kernel`."""
    pytest.importorskip("triton")
    import interpreted_kernel
    with interpreted_kernel.start() as pool:
        yield pool


def pytest_collection_modifyitems(items):
    """A test that takes a ComfyUI is a host test: `-m "not host"` leaves it out."""
    for item in items:
        if "comfyui" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.host)
