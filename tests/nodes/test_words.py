"""What the pack says is for users: no path of a class, no hash, no count without its unit, none of the old riddles."""
import ast
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SIZE = (5, 8, 12)
ROOMS = ("nodes", "vsa_core", "kernels", "checkpoints")
SPOKEN = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

FAULTS = {
    "the path of a class": r"\b(?:[A-Za-z_]\w*\.){1,}[A-Z]\w*(?:Error|Exception|Unusable|Kernel|Impl|Builder)\b",
    "the name of an exception": r"\b[A-Z]\w*(?:Error|Exception|Unusable)\b|\bNoKernel\b",
    "a hash": r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*\d)[0-9a-f]{12,}\b",
    "a count of calls that does not say of what": r"(?<!attention )\bcalls\b",
    "a riddle": r"tensors are on|unproven|self-test|inside attention|as fast per call|attention override|"
                r"nothing ran sparse|switch strict off to run dense instead|wanted to_gate_compress|device_type|"
                r"not in \(bfloat16|wastes least",
}


def faults_of(text):
    return [f"{what}: {found[0]!r} in {text!r}" for what, pattern in FAULTS.items()
            if (found := re.search(pattern, text))]


def sentences(path):
    """The texts of a file that may be told: those with a space in them, f-strings whole, and no docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    silent = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            silent.update(id(part) for part in node.values)
            text = "".join(part.value if isinstance(part, ast.Constant) else "7" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in silent:
            text = node.value
        else:
            continue
        if id(node) not in silent and " " in text.strip():
            yield node.lineno, text


@pytest.mark.parametrize("path", SPOKEN, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_text_in_the_source_is_a_riddle(path):
    told = [(line, text) for line, text in sentences(path) if not re.match(r"\s*(?:\(|video_sparse)", text)]
    assert not [(line, fault) for line, text in told for fault in faults_of(text)]


@pytest.mark.parametrize(("text", "what"), [
    ("(path).kernels.spec.NoKernel: no kernel", "the name of an exception"),
    ("raised custom_nodes.pack.kernels.spec.KernelUnusable: x", "the path of a class"),
    ("its source 48d2fdffdd26 has no result", "a hash"), ("6 sparse calls, 2 dense", "a count of calls"),
    ("triton: tensors are on cpu, needs cuda", "a riddle")])
def test_a_text_of_the_kind_that_is_looked_for_is_found(text, what):
    assert any(fault.startswith(what) for fault in faults_of(text)), text


@pytest.fixture
def heard(comfyui, monkeypatch):
    """Everything that is shown under a node, with the report of every run."""
    from pack.nodes.hook import hook as module
    shown = []
    monkeypatch.setattr(module, "show_under_node", lambda text, node_id: shown.append(text))
    return shown


def told_of(run):
    from pack.nodes.hook.status import kernel_text, node_text, status_text
    return [node_text(run), status_text(run, verbose=True), kernel_text(run, run.backend)]


WAYS = {
    "sparse": {}, "sparse and dense steps": {"start_percent": 0.5}, "a layer stays dense": {"dense_blocks": "0"},
    "all layers stay dense": {"dense_blocks": "0-1"}, "a block that is not there": {"dense_blocks": "99"},
    "too small": {"min_tokens": 10 ** 6}, "auto": {"backend": "auto"}, "verbose": {"verbose": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_run_of_every_method_is_told_without_riddles(method, wan, run_of, draw, heard, way):
    _, sparse = method
    patched = sparse(wan, **WAYS[way])
    draw(patched, SIZE, steps=4, cfg=1.0)
    texts = [*told_of(run_of(patched)), *heard]
    assert len(texts) > 3 and not [fault for text in texts for fault in faults_of(text)]


def test_special_runs_are_told_without_riddles(vsa, sta, wan, gated, run_of, draw, heard):
    from pack.nodes.methods.video_sparse_attention import VideoSparseAttentionPatch
    runs = []
    for patched, thw in ((vsa(wan, 0.5), (1, 8, 12)), (vsa(wan, 0.0, backend="auto"), SIZE),
                         (sta(vsa(wan, 0.9), "1x1x1"), SIZE), (vsa(gated, 0.9), SIZE),
                         (vsa(gated, 0.9, start_percent=0.5), SIZE), (vsa(wan, 0.9, attention_mass=0.99), SIZE),
                         (VideoSparseAttentionPatch.execute(gated, 0.5, preset="fast", min_tokens=0)[0], SIZE)):
        draw(patched, thw, steps=3)
        runs.append(run_of(patched))
    texts = [text for run in runs for text in told_of(run)] + heard
    assert not [fault for text in texts for fault in faults_of(text)]


def test_a_kernel_that_fails_on_the_way_is_told_without_riddles(vsa, wan, draw, run_of, heard, kernel_table):
    import fake_kernels

    def breaks(*operands, **buffers):
        if operands[0].shape[1] > 400:
            raise RuntimeError("the launch failed")
        return fake_kernels.right(*operands, **buffers)
    from pack.kernels import reference
    kernel_table(fake_kernels.spec_of(breaks, "breaks"), reference.SPEC)
    patched = vsa(wan, 0.9, backend="auto")
    draw(patched, (5, 16, 24), steps=2)
    texts = [*told_of(run_of(patched)), *heard]
    assert any("breaks" in text for text in texts)
    assert not [fault for text in texts for fault in faults_of(text)]


@pytest.mark.parametrize("card", ["cuda", "rocm", "cpu", "mps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_list_of_kernels_is_told_without_riddles_for_every_card(comfyui, card, dtype):
    from pack.kernels import Call, backend_list
    for capability in ((7, 5), (8, 9), (9, 0), (12, 0)) if card == "cuda" else (None,):
        for head_dim in (64, 96, 128):
            lines = backend_list(Call(card, capability, dtype, head_dim))
            assert lines and not [fault for line in lines for fault in faults_of(line)]
