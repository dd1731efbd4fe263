"""What a user reads where no kernel can run: the card, what it needs, and what to do, of every kind of machine."""
import dataclasses

import pytest
import torch

from pack import kernels
from pack.kernels import Call

BYPASS = "bypass this node (Ctrl+B)"
CARD = torch.device("cuda", 0)
FOUR = Call("cuda", (8, 9), torch.bfloat16, 128)
"""An RTX 4090, as data alone: nothing is run for it."""


@pytest.fixture
def said(comfyui, monkeypatch):
    """said(call, backend) -> what the node says of a call that no kernel can run. `name`: of the card."""
    from pack.nodes.hook.no_kernel import no_kernel_text

    def text(call, backend="auto", name=""):
        if name:
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
            monkeypatch.setattr(kernels.PROOFS, "known", lambda *_: None)
            call = dataclasses.replace(call, device=CARD)
        with pytest.raises(kernels.NoKernel) as error:
            kernels.choose_kernel(call, backend)
        return no_kernel_text(error.value, call, backend)
    return text


@pytest.fixture
def with_triton(monkeypatch):
    """with_triton("a sentence") -> as if that were missing for the Triton kernel; None: nothing is."""
    def set_missing(sentence):
        table = tuple(dataclasses.replace(spec, missing=lambda: sentence) if spec.name == "triton" else spec
                      for spec in kernels.KERNELS)
        monkeypatch.setattr(kernels, "KERNELS", table)
    set_missing(None)
    return set_missing


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_card_that_is_too_old_is_named_with_what_it_needs(said, with_triton, backend):
    found = said(dataclasses.replace(FOUR, capability=(7, 5)), backend, "NVIDIA GeForce RTX 2080 Ti")
    assert found == ("triton: your NVIDIA GeForce RTX 2080 Ti cannot run it (needs RTX 30 series or newer). "
                     "Bypass this node (Ctrl+B)")


@pytest.mark.parametrize(("backend", "names"), [("auto", "cuda_sm90, triton"), ("triton", "triton")])
def test_a_card_of_another_make_is_told_that_the_kernels_run_on_nvidia_cards(said, with_triton, backend, names):
    found = said(Call("rocm", None, torch.bfloat16, 128), backend, "AMD Radeon RX 7900 XTX")
    assert found == (f"{names}: your AMD Radeon RX 7900 XTX cannot run it (needs an NVIDIA card). "
                     "Bypass this node (Ctrl+B)")


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_model_in_float32_is_told_how_to_get_16_bits(said, with_triton, backend):
    found = said(dataclasses.replace(FOUR, dtype=torch.float32), backend)
    assert found == ("triton: it computes in bfloat16 or float16, this model in float32. Start ComfyUI with "
                     f"--bf16-unet, or put the node ModelComputeDtype with bf16 before this one; or {BYPASS}")


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_a_size_of_heads_that_no_kernel_has_is_nothing_a_user_can_change(said, with_triton, backend):
    found = said(dataclasses.replace(FOUR, head_dim=96), backend)
    assert found == "triton: it takes heads of 64 or 128 channels, this model has 96. Bypass this node (Ctrl+B)"


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_what_can_be_installed_is_followed_by_a_restart(said, with_triton, backend):
    with_triton("triton is not installed. Install it with: pip")
    assert said(FOUR, backend) == (
        f"triton: triton is not installed. Install it with: pip. Then restart ComfyUI; until then {BYPASS}")


def test_a_kernel_for_another_card_is_left_for_auto_where_that_runs(said, with_triton):
    assert said(FOUR, "cuda_sm90", "NVIDIA GeForce RTX 4090") == (
        f"cuda_sm90: your NVIDIA GeForce RTX 4090 cannot run it (needs H100 or H200). Set backend to auto, or {BYPASS}")


def test_the_slow_reference_is_never_advised_on_a_gpu(said, with_triton):
    calls = [Call("rocm", None, torch.bfloat16, 128), *(dataclasses.replace(FOUR, **change) for change in (
        {"capability": (7, 5)}, {"head_dim": 96}, {"dtype": torch.float32}))]
    texts = [said(call, backend) for call in calls for backend in ("auto", "triton", "cuda_sm90")]
    assert len(texts) == 12 and not [text for text in texts if "reference" in text]


def test_a_kernel_that_failed_in_this_run_is_not_taken_for_one_that_is_only_slow(comfyui):
    from pack.nodes.hook.no_kernel import no_kernel_text
    error = kernels.NoKernel({"reference": "failed in this run: no such luck"})
    assert no_kernel_text(error, Call("cpu", None, torch.float32, 64), "auto") == (
        "reference: failed in this run: no such luck. Bypass this node (Ctrl+B)")


def test_an_exception_that_says_nothing_is_called_by_its_name(comfyui):
    from pack.nodes.hook.no_kernel import words_of
    assert words_of(KeyError()) == "KeyError" and words_of(ValueError("\none line.\nanother")) == "one line"


def test_the_node_that_sets_the_precision_does_what_the_advice_promises(wan, vsa, draw, run_of, kernel_table):
    from comfy_extras.nodes_model_advanced import ModelComputeDtype
    half = dataclasses.replace(kernels.reference.SPEC, name="half", dtypes=(torch.bfloat16,))
    kernel_table(half)
    with pytest.raises(RuntimeError, match="half: it computes in bfloat16, this model in float32. Start ComfyUI with"):
        vsa(wan, backend="half")
    patched = vsa(ModelComputeDtype().patch(wan, "bf16")[0], backend="half")
    draw(patched)
    assert run_of(patched).sparse_calls == 4 and {call.dtype for call in run_of(patched).asked} == {torch.bfloat16}


def test_the_command_line_option_that_is_advised_exists(comfyui):
    from comfy.cli_args import args
    assert hasattr(args, "bf16_unet")
