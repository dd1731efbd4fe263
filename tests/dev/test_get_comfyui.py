"""Which ComfyUI is taken, offline: the fetching itself is replaced."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import comfy_boot
import get_comfyui


def checkout(path):
    (path / "comfy").mkdir(parents=True)
    (path / "main.py").touch()
    (path / "comfyui_version.py").write_text('__version__ = "0.0.1"\n')
    return path


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch, tmp_path):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    monkeypatch.setattr(comfy_boot, "DEFAULT", tmp_path / "default")
    monkeypatch.setattr(get_comfyui, "DEFAULT", tmp_path / "default")
    monkeypatch.setattr(get_comfyui, "enclosing", lambda: None)
    monkeypatch.setattr(comfy_boot, "enclosing", lambda: None)


def refuse(release, tmp):
    raise RuntimeError("no network")


def test_a_named_checkout_comes_before_everything_else(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(checkout(tmp_path / "named")))
    checkout(tmp_path / "default")
    assert get_comfyui.get() == (tmp_path / "named", "COMFYUI_PATH")


def test_a_named_path_that_is_no_checkout_is_refused_by_name(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path / "typo"))
    with pytest.raises(SystemExit, match="typo.*COMFYUI_PATH.*wanted.*make setup"):
        get_comfyui.get()


def test_the_checkout_at_the_destination_is_taken_without_fetching(monkeypatch, tmp_path):
    monkeypatch.setattr(get_comfyui, "from_git", refuse)
    monkeypatch.setattr(get_comfyui, "from_sdist", refuse)
    checkout(tmp_path / "default")
    assert get_comfyui.get() == (tmp_path / "default", "already there")


def test_when_git_fails_the_source_distribution_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr(get_comfyui, "from_git", refuse)
    monkeypatch.setattr(get_comfyui, "from_sdist", lambda release, tmp: checkout(tmp / "ComfyUI"))
    path, origin = get_comfyui.get()
    assert path == tmp_path / "default" and comfy_boot.is_checkout(path) and origin.startswith("PyPI")


def test_when_nothing_can_be_fetched_every_reason_is_named(monkeypatch):
    monkeypatch.setattr(get_comfyui, "from_git", refuse)
    monkeypatch.setattr(get_comfyui, "from_sdist", refuse)
    with pytest.raises(SystemExit, match="(?s)git v.*no network.*PyPI.*no network.*COMFYUI_PATH"):
        get_comfyui.get()


def test_the_oldest_is_fetched_to_a_place_of_its_own_whatever_else_there_is(monkeypatch, tmp_path):
    monkeypatch.setenv("COMFYUI_PATH", str(checkout(tmp_path / "named")))
    monkeypatch.setattr(get_comfyui, "from_git", refuse)
    monkeypatch.setattr(get_comfyui, "from_sdist", lambda release, tmp: checkout(tmp / release.tag))
    path, origin = get_comfyui.get(release=get_comfyui.OLDEST)
    assert path == tmp_path / "default-oldest" and origin == f"PyPI {get_comfyui.OLDEST.sdist}"


def test_a_destination_that_is_something_else_is_left_alone(tmp_path):
    (tmp_path / "default").mkdir()
    (tmp_path / "default" / "thesis.txt").touch()
    with pytest.raises(SystemExit, match="not a ComfyUI checkout"):
        get_comfyui.get()
    assert (tmp_path / "default" / "thesis.txt").exists()


def ask(script, cwd):
    """What `enclosing` says in a process that was started with this script path and this folder."""
    code = f"import sys; sys.path.insert(0, {str(script.parent)!r}); import comfy_boot; print(comfy_boot.enclosing())"
    env = {**os.environ, "PWD": str(cwd)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, check=True, capture_output=True,
                          text=True).stdout.strip()


def clone(path):
    (path / "dev").mkdir(parents=True)
    (path / "dev" / "comfy_boot.py").write_text(Path(comfy_boot.__file__).read_text())
    return path


def test_a_pack_cloned_into_custom_nodes_finds_its_comfyui(tmp_path):
    root = checkout(tmp_path / "ComfyUI")
    pack = clone(root / "custom_nodes" / "pack")
    assert ask(pack / "dev" / "comfy_boot.py", pack) == str(root)


def test_a_pack_symlinked_into_custom_nodes_finds_its_comfyui(tmp_path):
    root, pack = checkout(tmp_path / "ComfyUI"), clone(tmp_path / "src" / "pack")
    link = root / "custom_nodes" / "pack"
    link.parent.mkdir()
    link.symlink_to(pack)
    assert ask(link / "dev" / "comfy_boot.py", tmp_path) == str(root)
    assert ask(pack / "dev" / "comfy_boot.py", link) == str(root)
    assert ask(pack / "dev" / "comfy_boot.py", pack) == "None"


def test_a_symlink_to_a_pack_inside_custom_nodes_is_followed(tmp_path):
    root = checkout(tmp_path / "ComfyUI")
    pack = clone(root / "custom_nodes" / "pack")
    link = tmp_path / "work"
    link.symlink_to(pack)
    assert ask(link / "dev" / "comfy_boot.py", link) == str(root)


def test_a_folder_named_custom_nodes_outside_a_comfyui_means_nothing(tmp_path):
    pack = clone(tmp_path / "custom_nodes" / "pack")
    assert ask(pack / "dev" / "comfy_boot.py", pack) == "None"
