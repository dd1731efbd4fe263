"""Every variant of the CUDA kernel compiles for sm_90a, without a GPU, into what the card can run fast."""
from __future__ import annotations

import os
import re
import shutil
import subprocess

import pytest

import compiled_once
import cubin as cubin_tools
import sass
from compiled_once import VARIANTS
from pack.kernels.cuda_sm90.loader import ARCHITECTURE, KERNEL, SOURCE, constant, options, source
from pack.kernels.cuda_sm90.nvrtc import Nvrtc, NvrtcError


def build_with_nvrtc(dim, dtype, folder):
    try:
        return compiled_once.with_nvrtc(None, dim, dtype)
    except NvrtcError as error:
        pytest.skip(str(error))


def build_with_nvcc(dim, dtype, folder):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on the path")
    target = folder / "kernel.cubin"
    defines = [option for option in options(dim, dtype) if option.startswith("-D")]
    machine = f"-gencode=arch={ARCHITECTURE.replace('sm', 'compute')},code={ARCHITECTURE}"
    done = subprocess.run(["nvcc", "-std=c++17", machine, "-cubin", "-Xptxas", "-v", *defines, "-o", target, SOURCE],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target.read_bytes(), done.stdout + done.stderr


@pytest.fixture(scope="module", params=[build_with_nvrtc, build_with_nvcc], ids=["NVRTC", "nvcc"])
def builds(request, tmp_path_factory):
    """{(head_dim, dtype): (cubin, log)}"""
    folder = tmp_path_factory.mktemp("cubin")
    return {variant: request.param(*variant, folder) for variant in VARIANTS}


def test_one_of_the_two_compilers_is_here():
    if shutil.which("nvcc") is None:
        try:
            Nvrtc()
        except NvrtcError as error:
            if os.environ.get("REQUIRE_COMFYUI") == "1":
                raise
            pytest.skip(str(error))


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_nothing_spills_and_no_product_is_serialised(builds, variant):
    _, log = builds[variant]
    assert re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log) == [("0", "0")], log
    assert not re.search(r"C75\d\d", log), log
    assert not re.search(r"\bwarning\b", log), log


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_registers_and_shared_memory_fit_one_cta(builds, variant):
    _, log = builds[variant]
    used = int(re.search(r"Used (\d+) registers", log)[1])
    assert used * constant("THREADS", variant[0]) <= 65536
    assert constant("SHARED_BYTES", variant[0]) <= 227 * 1024


def disassembled(cubin):
    if cubin_tools.tools() is None:
        pytest.skip("no triton that brings nvdisasm")
    return cubin_tools.disassembled(cubin)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_machine_code_holds_what_the_design_asks_for(builds, variant):
    text = disassembled(builds[variant][0])
    dim = variant[0]
    keys, values = 2 * (1 + 2 * 2) * dim // 32, 4 * (1 + 2 + 2)
    assert len(re.findall(r"\bHGMMA\.", text)) == keys + values
    assert len(re.findall(rf"\bHGMMA\.64x{dim}x16\.F32(?:\.BF16)?.*\.tnspB", text)) == values
    assert len(re.findall(r"\bUTMALDG\.5D\b", text)) >= 3
    assert "USETMAXREG" in text and not re.search(r"\b(LDL|STL|HMMA)\b", text)
    assert f".{KERNEL}" in text


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_machine_code_keeps_the_rules_of_products_whoever_compiled_it(builds, variant):
    listing = sass.Listing(disassembled(builds[variant][0]))
    used = int(re.search(r"Used (\d+) registers", builds[variant][1])[1])
    assert sass.faults(listing, constant("EMPTY_OFFSET", variant[0]), used) == []


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_exponentials_stand_between_the_two_waits_of_the_loop(builds, variant):
    """Without that the product of weights and values would have to end before softmax may start."""
    text = disassembled(builds[variant][0])
    events = re.findall(r"MUFU\.EX2|WARPGROUP\.DEPBAR\.LE gsb0, 0x[01]|WARPGROUP\.ARRIVE", text)
    start = events.index("WARPGROUP.DEPBAR.LE gsb0, 0x1")
    loop = events[start + 1:events.index("WARPGROUP.DEPBAR.LE gsb0, 0x0", start)]
    assert events.count("WARPGROUP.DEPBAR.LE gsb0, 0x1") == 1
    assert loop == ["MUFU.EX2"] * (2 * constant("SCORES", 64) + 2)


SLOW = {
    "spilled": ("PRODUCER_REGISTERS = 40", "PRODUCER_REGISTERS = 24", r"\d+ bytes of registers are spilled"),
    "serialised": ("    multiply_keys<SCORES>(s, q, ring.held(1));\n    wgmma_commit();",
                   "    s[0] += scale;\n    multiply_keys<SCORES>(s, q, ring.held(1));\n    wgmma_commit();",
                   r"\(C75\d\d\)"),
}


@pytest.mark.parametrize("edit", SLOW.values(), ids=SLOW)
def test_code_that_has_lost_its_speed_is_refused(edit):
    try:
        nvrtc = Nvrtc()
    except NvrtcError as error:
        pytest.skip(str(error))
    found, replacement, message = edit
    assert source().count(found) == 1
    with pytest.raises(NvrtcError, match=f"made slow code of it: .*{message}"):
        nvrtc.compile(source().replace(found, replacement), SOURCE.name, options(128, "bfloat16"))


def test_an_error_in_the_source_is_reported_in_nvrtcs_words():
    try:
        nvrtc = Nvrtc()
    except NvrtcError as error:
        pytest.skip(str(error))
    with pytest.raises(NvrtcError, match='refused the source: broken.cu.1.: error: identifier "nothing" is undefined'):
        nvrtc.compile("__global__ void f() { nothing; }", "broken.cu", options(64, "float16"))
