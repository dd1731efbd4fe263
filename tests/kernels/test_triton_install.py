"""What a user without Triton is told to install."""
import importlib.metadata
import re
import sys

import pytest
import torch

from pack.kernels.triton.install import OLDEST, TRITON_OF_TORCH, advice, too_old


@pytest.mark.parametrize(("version", "platform", "package"), [
    ("2.6.0+cu124", "linux", "triton>=3.2,<3.3"), ("2.9.1+cu128", "win32", "triton-windows>=3.5,<3.6"),
    ("2.10.0", "win32", "triton-windows>=3.6,<3.7"), ("2.12.0.dev20260101", "linux", "triton>=3.7,<3.8")])
def test_the_command_names_the_package_of_this_torch_and_system_and_the_interpreter(version, platform, package):
    told = advice(version, platform, r"C:\Comfy UI\python.exe")
    assert told.endswith(rf'Install it with: "C:\Comfy UI\python.exe" -m pip install "{package}"')
    assert told.startswith("triton is not installed, and torch ")


@pytest.mark.parametrize("version", ["2.4.1+cu121", "2.5.1", "2.1.0", "1.13.1"])
def test_a_torch_whose_triton_is_too_old_is_told_to_be_replaced(version):
    told = advice(version, "linux")
    assert "too old" in told and told.endswith("install torch 2.6 or newer") and "pip" not in told


@pytest.mark.parametrize(("platform", "package"), [("linux", "triton"), ("win32", "triton-windows")])
def test_a_torch_newer_than_the_table_gets_no_range(platform, package):
    told = advice("9.0.0", platform)
    assert told.endswith(f'"{sys.executable}" -m pip install --upgrade {package}') and "newer than this pack" in told


def test_a_system_without_triton_is_named():
    assert advice("2.9.0", "darwin") == "triton is not installed: there is none for this system (darwin)"


@pytest.mark.parametrize(("installed", "refused"), [
    ({"triton": "3.1.0"}, "triton 3.1.0 is too old, needs 3.2: install torch 2.6 or newer"),
    ({"triton-windows": "3.1.0.post17"}, "triton-windows 3.1.0.post17 is too old, needs 3.2"),
    ({"triton": "3.2.0"}, None), ({"triton-windows": "3.10.0"}, None), ({}, None)], ids=str)
def test_an_installed_triton_that_is_too_old_is_named(monkeypatch, installed, refused):
    def version(package):
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    told = too_old.__wrapped__()
    assert told is None if refused is None else told.startswith(refused)


def test_the_table_has_every_minor_version_in_order():
    torches, tritons = list(TRITON_OF_TORCH), list(TRITON_OF_TORCH.values())
    assert torches == [(2, minor) for minor in range(4, 4 + len(torches))]
    assert tritons == sorted(tritons) and OLDEST in tritons


def test_the_table_agrees_with_the_metadata_of_the_torch_that_is_installed():
    asked = [line for line in importlib.metadata.requires("torch") or [] if re.match(r"triton\b", line)]
    if not asked:
        pytest.skip("this build of torch asks for no triton")
    numbers = re.search(r"[=~]=\s*(\d+)\.(\d+)", asked[0]).groups()
    assert TRITON_OF_TORCH[tuple(int(n) for n in torch.__version__.split(".")[:2])] == tuple(map(int, numbers))
