"""Makes a CUDA build of torch importable on a CPU without the large libraries that it is linked to.

    python dev/hollow_cuda.py VENV

For every shared library that torch cannot find, one of that name and with the wanted symbols is put beside torch's
own. Their functions do nothing, and nothing calls them on a machine without a GPU. Needs gcc, nm and readelf.
"""
import re
import subprocess
import sys
from pathlib import Path

KNOWN = re.compile(r"lib(cu|nccl|nv)")
"""Libraries that may be made hollow; one of another name that is absent is an error for the loader to report."""


def output(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def needed(library):
    return re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", library))


def missing(first, folders):
    """(names that no folder has, files that want them), followed from one library on."""
    absent, seen, pending = set(), [], [first]
    while pending:
        library = pending.pop()
        seen.append(library)
        for name in needed(library):
            found = next((folder / name for folder in folders if (folder / name).exists()), None)
            if found is None and KNOWN.match(name):
                absent.add(name)
            elif found is not None and found not in (*seen, *pending):
                pending.append(found)
    return absent, seen


def main(venv):
    package = next(Path(venv).glob("lib/python3*/site-packages/torch"))
    own = package / "lib"
    absent, users = missing(own / "libtorch_python.so", [own, *sorted((package.parent / "nvidia").glob("*/lib"))])
    symbols = {symbol for user in users for symbol in re.findall(
        r" U ((?:cu|nccl|nv)\w+)", output("nm", "-D", "--undefined-only", user))}
    text = "".join(f"void {symbol}(void) {{}}\n" for symbol in sorted(symbols))
    script = own / "hollow.map"
    for name in sorted(absent):
        # A symbol is asked for with its library's name as version, where that library gives its symbols one.
        script.write_text(f"{name} {{ global: *; }};\n")
        subprocess.run(["gcc", "-shared", "-nostdlib", "-x", "c", "-", f"-Wl,-soname,{name}",
                        f"-Wl,--version-script={script}", "-o", own / name], input=text, text=True, check=True)
    print(f"hollow libraries: {', '.join(sorted(absent)) or 'none'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
