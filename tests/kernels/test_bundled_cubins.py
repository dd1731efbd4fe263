"""The compiled kernels that the pack brings along belong to its source, byte for byte."""
from __future__ import annotations

import ctypes

import pytest

import bundle_cubins
import compiled_once
from compiled_once import VARIANTS
from pack.kernels.cuda_sm90 import loader
from pack.kernels.cuda_sm90.cache import Cache
from pack.kernels.cuda_sm90.nvrtc import Nvrtc, NvrtcError

MADE_BY = (loader.BUNDLED / "NVRTC").read_text().strip()


def test_every_variant_of_this_very_source_is_there_and_nothing_else():
    """After a change of the source: make cubins."""
    names = {loader.key(*variant) for variant in VARIANTS}
    assert {path.name for path in loader.BUNDLED.iterdir()} == {*names, "NVRTC"}
    for name in names:
        assert Cache(loader.BUNDLED).read(name)[:4] == b"\x7fELF"


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nvrtc_builds_the_same_bytes(variant):
    try:
        nvrtc = Nvrtc(majors=loader.BUNDLED_BY)
    except NvrtcError as error:
        pytest.skip(str(error))
    if nvrtc.version() != MADE_BY:
        pytest.skip(f"NVRTC here is {nvrtc.version()}, the files were made by {MADE_BY}")
    built, _ = compiled_once.with_nvrtc(loader.BUNDLED_BY, *variant)
    assert Cache(loader.BUNDLED).read(loader.key(*variant)) == built


def test_the_pack_loads_them_first_and_compiles_nothing(tmp_path):
    loaded = []

    class Driver:
        def make_current(self, device):
            pass

        def load(self, cubin, kernel, shared_bytes):
            loaded.append(cubin)
            return ctypes.c_void_p(1)

    def no_compiler():
        raise NvrtcError("must not be asked")

    ready = loader.Loader(Driver, no_compiler, Cache(tmp_path))
    for variant in VARIANTS:
        ready.function(0, *variant)
    assert loaded == [Cache(loader.BUNDLED).read(loader.key(*variant)) for variant in VARIANTS]
    assert ready.steps().count("bundled cubin: loaded") == len(VARIANTS)


def test_bundling_anew_removes_what_belongs_to_an_older_source(tmp_path, capsys, monkeypatch):
    def compiled(nvrtc, source, name, options):
        variant, = (variant for variant in VARIANTS if loader.options(*variant) == options)
        assert (source, name, nvrtc.version()) == (loader.source(), loader.SOURCE.name, made_by)
        return compiled_once.with_nvrtc(loader.BUNDLED_BY, *variant)

    try:
        made_by = Nvrtc(majors=loader.BUNDLED_BY).version()
        made = {loader.key(*variant): compiled_once.with_nvrtc(loader.BUNDLED_BY, *variant)[0] for variant in VARIANTS}
    except NvrtcError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(Nvrtc, "compile", compiled)
    (tmp_path / "block_sparse_forward-sm_90a-64-bfloat16-older.cubin").touch()
    bundle_cubins.main(["--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {*made, "NVRTC"}
    assert {name: Cache(tmp_path).read(name) for name in made} == made
    assert capsys.readouterr().out.count(" bytes") == len(VARIANTS)
