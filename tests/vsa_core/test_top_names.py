"""The names at the top of vsa_core, as fastvideo.attention has them."""
import subprocess
import sys
from pathlib import Path

import pytest

from pack import vsa_core

ROOT = Path(__file__).resolve().parents[2]
WANTED = {
    "AttentionBackend": (), "AttentionMetadata": ("asdict_zerocopy",),
    "AttentionMetadataBuilder": ("build", "prepare"), "LocalAttention": ("forward",),
    "DistributedAttention": ("forward",), "DistributedAttention_VSA": ("forward",), "get_attn_backend": ()}


@pytest.mark.parametrize("name", WANTED)
def test_a_name_of_fastvideos_top_is_importable_from_ours(name):
    found = getattr(vsa_core, name)
    assert found.__name__ == name and all(callable(getattr(found, method)) for method in WANTED[name])
    assert name in vsa_core.__all__ and name in dir(vsa_core)


def test_every_name_that_the_top_lists_can_be_had():
    names = {}
    exec(f"from {vsa_core.__name__} import *", names)
    assert set(vsa_core.__all__) <= set(names)


def test_a_name_that_is_none_is_refused_with_those_there_are():
    with pytest.raises(AttributeError, match="no attribute 'LocalAttn'.*wanted one of .*LocalAttention"):
        vsa_core.LocalAttn  # noqa: B018
    assert not hasattr(vsa_core, "__path_of_nothing__")


def test_the_top_imports_no_torch_before_a_name_is_asked_for():
    code = ("import importlib, importlib.util, sys\n"
            f"spec = importlib.util.spec_from_file_location('p', {str(ROOT / '__init__.py')!r}, "
            f"submodule_search_locations=[{str(ROOT)!r}])\n"
            "module = importlib.util.module_from_spec(spec); sys.modules['p'] = module\n"
            "spec.loader.exec_module(module)\n"
            "top = importlib.import_module('p.vsa_core')\n"
            "assert 'torch' not in sys.modules\n"
            "assert top.LocalAttention.__module__ == 'p.vsa_core.layer' and 'torch' in sys.modules\n")
    subprocess.run([sys.executable, "-c", code], check=True)
