"""The rooms and the direction of their imports."""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {"kernels": {"kernels"}, "vsa_core": {"vsa_core", "kernels"}, "checkpoints": {"checkpoints"},
           "nodes": {"nodes", "vsa_core", "kernels", "checkpoints"}}
NODE_ROOMS = ("strategies", "split", "methods", "trained", "evidence", "hook", "families")
"""The rooms of nodes/: each imports from itself and from those behind it."""
FILES = sorted(path for room in ALLOWED for path in (ROOT / room).rglob("*.py"))


def relative_imports(path):
    """The files or packages below the root that `path` imports relatively, as paths of parts."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[:len(package) - node.level + 1]
            stem = tuple(node.module.split(".")) if node.module else ()
            yield from ((*base, *stem, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_from_nodes_to_vsa_core_to_kernels(path):
    room = path.relative_to(ROOT).parts[0]
    for target in relative_imports(path):
        assert target and target[0] in ALLOWED[room], f"{path.relative_to(ROOT)} imports {'.'.join(target)}"


def test_the_rooms_of_nodes_import_downwards_only():
    assert {path.name for path in (ROOT / "nodes").iterdir() if (path / "__init__.py").exists()} == set(NODE_ROOMS)
    for place, room in enumerate(NODE_ROOMS):
        for path in (ROOT / "nodes" / room).rglob("*.py"):
            for target in relative_imports(path):
                if target[0] == "nodes":
                    assert target[1] in NODE_ROOMS[place:], f"{path.relative_to(ROOT)} imports {'.'.join(target)}"


@pytest.mark.parametrize("folder", ["vsa_core/backends", "nodes/families"])
def test_siblings_in_a_table_do_not_import_each_other(folder):
    siblings = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__", "abstract"}
    parts = tuple(folder.split("/"))
    for path in (ROOT / folder).glob("*.py"):
        if path.stem in siblings:
            for target in relative_imports(path):
                assert not (target[:len(parts)] == parts and set(target[len(parts):]) & siblings - {path.stem}), path


TABLES_AND_PROOFS = ("__init__.py", "tile_ops.py", "problems.py", "tile_problems.py", "proof.py", "proof_store.py",
                     "proofs.py", "prove.py", "choice.py")
"""What may know all kernels, or the reference that they are compared with."""


def test_kernel_implementations_do_not_import_each_other():
    names = {path.stem if path.suffix else path.name for path in (ROOT / "kernels").iterdir()
             if not path.name.startswith("__")} - {"spec", "tile_grid", "gathered", "user_cache"}
    for path in (ROOT / "kernels").rglob("*.py"):
        parts = path.relative_to(ROOT).parts
        if parts[1] in TABLES_AND_PROOFS:
            continue
        own = Path(parts[1]).stem
        # The specification with integer scores is that without, on other operands.
        names_of_others = names - ({"reference"} if own == "reference_int8" else set())
        for target in relative_imports(path):
            assert target[1] in {own, "spec"} or target[1] not in names_of_others, f"{path} imports {target}"


def test_importing_the_pack_imports_neither_torch_nor_comfy_nor_triton():
    code = ("import importlib.util, sys\n"
            f"spec = importlib.util.spec_from_file_location('p', {str(ROOT / '__init__.py')!r}, "
            f"submodule_search_locations=[{str(ROOT)!r}])\n"
            "module = importlib.util.module_from_spec(spec); sys.modules['p'] = module\n"
            "spec.loader.exec_module(module)\n"
            "assert callable(module.comfy_entrypoint)\n"
            "assert not {'torch', 'comfy', 'triton', 'comfy_api'} & set(sys.modules)\n")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_vsa_core_and_kernels_import_neither_comfy_nor_triton():
    code = ("import importlib, importlib.util, sys\n"
            f"spec = importlib.util.spec_from_file_location('p', {str(ROOT / '__init__.py')!r}, "
            f"submodule_search_locations=[{str(ROOT)!r}])\n"
            "module = importlib.util.module_from_spec(spec); sys.modules['p'] = module\n"
            "spec.loader.exec_module(module)\n"
            "import torch\n"
            "before = set(sys.modules)\n"
            "importlib.import_module('p.vsa_core.backends')\n"
            "assert not {'comfy', 'triton'} & (set(sys.modules) - before)\n")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_file_hides_behind_a_name_that_explains_nothing():
    banned = {"utils", "common", "helpers", "misc", "manager", "base"}
    assert not [path for path in ROOT.rglob("*.py") if path.stem in banned and ".cache" not in path.parts]
