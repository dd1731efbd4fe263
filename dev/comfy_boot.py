"""Find a ComfyUI checkout and make it importable in CPU mode, without starting its server.

    from comfy_boot import boot
    boot("path/to/ComfyUI")      # or boot(): $COMFYUI_PATH, then the pack's .cache/comfyui
    import comfy.sd, nodes       # these are ComfyUI's own modules from here on

Call boot() before anything imports `comfy`: it reads its command line once, at import.
"""
import os
import re
import sys
from pathlib import Path

PACK = Path(os.path.abspath(__file__)).parent.parent   # symlinks not followed: see pack_paths
DEFAULT = PACK / ".cache" / "comfyui"


def is_checkout(path):
    return (Path(path) / "main.py").is_file() and (Path(path) / "comfy").is_dir()


def version(path):
    match = re.search(r'"([^"]+)"', (Path(path) / "comfyui_version.py").read_text())
    return match.group(1) if match else "unknown"


def pack_paths(pack=PACK):
    """The pack's folder under every name it is known by: as called, as the shell sees it, symlinks followed."""
    paths = [Path(os.path.abspath(pack)), Path(pack).resolve()]
    shell = Path(os.environ.get("PWD", "."))
    try:
        if shell.is_absolute() and shell.samefile(pack):
            paths.insert(0, shell)
    except OSError:
        pass
    return list(dict.fromkeys(paths))


def enclosing(pack=PACK):
    """The ComfyUI whose custom_nodes folder the pack sits in, or None."""
    for path in pack_paths(pack):
        if path.parent.name == "custom_nodes" and is_checkout(path.parent.parent):
            return path.parent.parent.resolve()
    return None


def locate(path=None):
    """The first checkout there is, without fetching one: the one given, $COMFYUI_PATH, the one the pack sits
    in, .cache/comfyui. None when there is none. A path that was named and is no checkout: SystemExit."""
    named = path or os.environ.get("COMFYUI_PATH")
    if named:
        root = Path(named).expanduser().resolve()
        if not is_checkout(root):
            origin = "given" if path else "COMFYUI_PATH"
            raise SystemExit(f"no ComfyUI checkout at {root} ({origin}): wanted a folder with main.py and comfy/. "
                             "Correct the path, or leave it out to have one fetched by `make setup`.")
        return root
    return enclosing() or (DEFAULT.resolve() if is_checkout(DEFAULT) else None)


def find(path=None):
    """Like `locate`, but SystemExit when there is none."""
    root = locate(path)
    if root is None:
        raise SystemExit(f"no ComfyUI checkout: COMFYUI_PATH is not set, the pack is not in a custom_nodes folder "
                         f"and {DEFAULT} is none. Run `make setup` or set COMFYUI_PATH.")
    return root


def boot(path=None, *flags, cpu=True):
    """Puts the checkout first on sys.path and parses `flags` as its command line, with `--cpu` unless cpu is False."""
    root = find(path)
    sys.path.insert(0, str(root))
    argv, sys.argv = sys.argv, ["main.py", *(["--cpu"] if cpu else []), *flags]
    try:
        import comfy.options
        comfy.options.enable_args_parsing()
        import comfy.cli_args  # noqa: F401  (parses now, while sys.argv is ours)
        import utils.install_util  # noqa: F401  (as main.py: later `nodes` puts comfy/, with a utils.py, in front)
    finally:
        sys.argv = argv
    return root
