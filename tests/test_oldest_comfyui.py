"""The oldest ComfyUI that the pack runs in: one number everywhere, and a sentence for who has an older one."""
import asyncio
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import tomllib

import pack

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def started_by(monkeypatch):
    """started_by("0.11.0") -> what that ComfyUI gets from the pack's entrypoint."""
    def start(version, nodes=None):
        monkeypatch.setitem(sys.modules, "comfyui_version", SimpleNamespace(__version__=version))
        monkeypatch.setitem(sys.modules, "pack.nodes", nodes)
        return asyncio.run(pack.comfy_entrypoint())
    return start


@pytest.mark.parametrize("version", ["0.3.64", "0.11.0", "0.13.0", "0.14.1", "0.16.2"])
def test_an_older_comfyui_is_refused_in_a_sentence_that_names_both_versions(started_by, version):
    with pytest.raises(RuntimeError, match=rf"^Video Sparse Attention: found ComfyUI {version}, wanted "
                                           rf"{pack.MINIMUM_COMFYUI} or newer. Update"):
        started_by(version)


@pytest.mark.parametrize("version", [pack.MINIMUM_COMFYUI, "0.16.10", "0.30.0", "0.33.0-dev", "1.0"])
def test_a_newer_comfyui_gets_the_nodes(started_by, version):
    nodes = ModuleType("pack.nodes")
    nodes.VideoSparseAttentionExtension = lambda: "the nodes"
    assert started_by(version, nodes) == "the nodes"


def test_a_missing_package_is_named_with_what_to_do(started_by):
    with pytest.raises(ImportError, match="^Video Sparse Attention: .*Install the pack's requirements.txt"):
        started_by(pack.MINIMUM_COMFYUI, nodes=None)


def test_every_place_names_the_same_oldest_version():
    import get_comfyui
    manifest = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert manifest["tool"]["comfy"]["requires-comfyui"] == f">={pack.MINIMUM_COMFYUI}"
    assert f"ComfyUI {pack.MINIMUM_COMFYUI} or newer" in (ROOT / "README.md").read_text()
    assert get_comfyui.OLDEST.tag == f"v{pack.MINIMUM_COMFYUI}"


@pytest.mark.parametrize("version", ["0.11.0", None])
def test_comfyui_goes_on_without_the_pack_and_says_why_in_one_line(comfyui, started_by, caplog, monkeypatch, version):
    """ComfyUI's own loader, as it treats the pack when its version is too old or a package is missing."""
    import comfyui_version

    import nodes
    monkeypatch.setitem(sys.modules, "comfyui_version",
                        SimpleNamespace(__version__=version or comfyui_version.__version__))
    if version is None:
        monkeypatch.setitem(sys.modules, "comfy.patcher_extension", None)
    before = dict(nodes.NODE_CLASS_MAPPINGS)
    loaded = asyncio.run(nodes.load_custom_node(str(ROOT)))
    said = [record.getMessage() for record in caplog.records if "Video Sparse Attention" in record.getMessage()
            and "times in this process" not in record.getMessage()]      # this test's own second copy
    assert loaded is False and nodes.NODE_CLASS_MAPPINGS == before
    assert len(said) == 1 and "Traceback" not in caplog.text and (version or "comfy.patcher_extension") in said[0]
