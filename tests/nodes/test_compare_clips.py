"""Two clips side by side: the numbers are right, the words follow from them, and the picture shows the worst frame."""
import ast
import asyncio
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("comfyui")


def clip_of(frames=5, height=20, width=26, seed=0):
    """A smooth clip that moves, with some noise."""
    noise = torch.rand(frames, height, width, 3, generator=torch.Generator().manual_seed(seed))
    t, y, x = (torch.arange(count).float() for count in (frames, height, width))
    wave = 0.5 + 0.3 * torch.sin(x / 4 + y[:, None] / 5 + t[:, None, None] / 2)
    return (wave[..., None] + 0.2 * (noise - 0.5)).clamp(0, 1)


def noisy(clip, amount, seed=1):
    noise = torch.randn(clip.shape, generator=torch.Generator().manual_seed(seed))
    return (clip + amount * noise).clamp(0, 1)


def compared(reference, clip):
    from pack.nodes.evidence.compare_clips import CompareClips
    found = CompareClips.execute(reference, clip)
    (numbers,) = found.ui["compare_clips"]
    json.dumps(numbers, allow_nan=False)
    report, picture = found.args
    verdict, *lines = report.splitlines()
    assert found.ui["text"] == [report] and found.ui["images"]
    assert lines and all(line.startswith("- ") for line in lines)
    return SimpleNamespace(report=report, verdict=verdict, picture=picture, **numbers)


def psnr_oracle(a, b):
    return 10 * math.log10(1 / np.mean((a.double().numpy() - b.double().numpy()) ** 2))


def ssim_oracle(a, b, window=11):
    """Wang et al. 2004, equation 13, in float64: every window inside the frame, by channel."""
    a, b = a.double().numpy(), b.double().numpy()
    line = np.exp(-(np.arange(window) - window // 2) ** 2 / (2 * 1.5 ** 2))
    weight = np.outer(line, line) / np.outer(line, line).sum()
    scores = []
    for channel in range(3):
        for row in range(a.shape[0] - window + 1):
            for column in range(a.shape[1] - window + 1):
                x, y = (frame[row:row + window, column:column + window, channel] for frame in (a, b))
                mean_x, mean_y = (weight * x).sum(), (weight * y).sum()
                var_x, var_y = (weight * (x - mean_x) ** 2).sum(), (weight * (y - mean_y) ** 2).sum()
                both = (weight * (x - mean_x) * (y - mean_y)).sum()
                scores.append((2 * mean_x * mean_y + 1e-4) * (2 * both + 9e-4)
                              / ((mean_x ** 2 + mean_y ** 2 + 1e-4) * (var_x + var_y + 9e-4)))
    return np.mean(scores)


@pytest.mark.parametrize("amount", [0.002, 0.03, 0.3])
def test_psnr_of_every_frame_is_the_formula_in_float64(amount):
    a = clip_of()
    b = noisy(a, amount)
    found = compared(a, b)
    wanted = [psnr_oracle(*pair) for pair in zip(a, b)]
    assert found.psnr == pytest.approx(wanted, abs=1e-3)
    assert found.psnr_mean == pytest.approx(np.mean(wanted), abs=1e-3)


@pytest.mark.parametrize("amount", [0.002, 0.03, 0.3])
def test_ssim_of_every_frame_is_that_of_the_paper_in_float64(amount):
    a = clip_of(3)
    b = noisy(a, amount)
    found = compared(a, b)
    wanted = [ssim_oracle(*pair) for pair in zip(a, b)]
    assert found.ssim == pytest.approx(wanted, abs=1e-5) and found.window == 11
    assert found.ssim_mean == pytest.approx(np.mean(wanted), abs=1e-5)


@pytest.mark.parametrize(("size", "window"), [((8, 26), 7), ((9, 9), 9), ((2, 3), 1), ((1, 1), 1)])
def test_small_frames_take_a_smaller_window_and_the_report_says_so(size, window):
    a = clip_of(2, *size)
    b = noisy(a, 0.1)
    found = compared(a, b)
    assert found.window == window and f"a window of {window} here" in found.report
    assert found.ssim == pytest.approx([ssim_oracle(*pair, window) for pair in zip(a, b)], abs=1e-5)


def test_a_planted_frame_is_the_worst_one_in_verdict_numbers_and_picture():
    a = torch.full((6, 30, 30, 3), 0.25)
    b = noisy(a, 0.005)
    b[4] = torch.tensor([0.9, 0.1, 0.4])
    found = compared(a, b)
    assert found.worst_frame == 5 and found.ssim_worst == min(found.ssim)
    assert "in the worst frame (frame 5 of 6)." in found.verdict
    assert found.psnr_worst == pytest.approx(psnr_oracle(a[4], b[4]), abs=1e-3)
    picture, row = found.picture[0], 200
    for column, colour in ((160, (0.25, 0.25, 0.25)), (490, (0.9, 0.1, 0.4)), (820, (0.65, 0.15, 0.15))):
        assert picture[row, column].tolist() == pytest.approx(colour, abs=0.01)
    assert found.picture.shape[0] == 1 and found.picture.shape[2:] == (1000, 3) and found.picture.dtype == torch.float32


@pytest.mark.parametrize(("amount", "factor"), [(1.0, 1), (0.3, 2), (0.1, 8), (0.001, 32), (0.0, 1)])
def test_a_difference_is_made_so_strong_that_it_is_seen_and_not_cut(amount, factor):
    from pack.nodes.evidence.clip_picture import strength
    assert strength(torch.full((10, 10), amount)) == factor
    lone = torch.zeros(1000)
    lone[7] = amount
    assert strength(lone) == factor, "a difference in a single spot counts where there is no other"


def test_the_picture_shows_the_difference_times_the_factor():
    a = torch.full((2, 20, 20, 3), 0.5)
    found = compared(a, a + 0.1)
    assert found.picture[0, 200, 820].tolist() == pytest.approx([0.8] * 3, abs=0.01)


def test_flicker_that_was_planted_is_measured_and_told():
    a = torch.full((7, 16, 16, 3), 0.5)
    a[1::2] += 0.1
    b = torch.full((7, 16, 16, 3), 0.5)
    b[1::2] += 0.25
    found = compared(a, b)
    assert found.motion_ratio == pytest.approx(2.5, rel=1e-5)
    assert found.motion_reference == pytest.approx(0.1, rel=1e-5) and found.motion_clip == pytest.approx(0.25, rel=1e-5)
    assert "- the clip moves 2.50 times as much from frame to frame as the reference" in found.report


def test_movement_is_not_divided_by_that_of_a_still_clip():
    still, moving = torch.full((4, 16, 16, 3), 0.5), clip_of(4, 16, 16)
    found = compared(still, moving)
    assert found.motion_ratio is None and "- the reference stands still, the clip changes by " in found.report
    assert "- the clip stands still, the reference does not" in compared(moving, still).report
    assert "- both clips stand still" in compared(still, still + 0.1).report


def test_a_single_frame_has_no_movement_and_no_curve():
    a = clip_of(2)
    one, two = compared(a[:1], noisy(a, 0.1)[:1]), compared(a, noisy(a, 0.1))
    assert one.verdict.endswith("(one frame).") and one.motion_ratio is None and one.worst_frame == 1
    assert "- movement is not compared: that needs two frames in a row" in one.report
    assert one.picture.shape[1] < two.picture.shape[1]


def test_the_same_clip_is_identical_bit_for_bit_however_dark():
    for a in (clip_of(), torch.zeros(2, 16, 16, 3)):
        found = compared(a, a.clone())
        assert found.verdict == f"The clips are identical, bit for bit ({len(a)} frames)."
        assert found.identical and set(found.ssim) == {1.0} and set(found.psnr) == {None}
        assert "sparse attention has changed nothing" in found.report


def test_the_smallest_difference_is_not_called_identical():
    a = clip_of()
    b = a.clone()
    b[2, 3, 3, 0] += 1e-4
    found = compared(a, b)
    assert not found.identical and found.worst_frame == 3 and "SSIM 1.00" not in found.report
    assert "4 frames identical, bit for bit, left out of the PSNR" in found.report


@pytest.mark.parametrize(("scores", "words", "average", "worst"), [
    ([0.98, 0.96], "are nearly the same", "0.97", "0.96 in the worst frame (frame 2 of 2)"),
    ([0.9, 0.8], "look alike and differ in detail", "0.85", "0.80 in the worst frame (frame 2 of 2)"),
    ([0.5, 0.6], "differ as much as another picture does", "0.55", "0.50 in the worst frame (frame 1 of 2)"),
    ([0.99] * 30 + [0.4], "are nearly the same, except for some", "0.97", "0.40 in the worst frame (frame 31 of 31)"),
    ([0.9999999, 0.9999998], "are nearly the same", "0.9999", "0.9999 in the worst frame (frame 2 of 2)"),
    ([0.9496, 0.9504], "are nearly the same", "0.95", "0.95 in the worst frame (frame 1 of 2)"),
])
def test_the_verdict_has_three_bands_that_agree_with_the_numbers_as_shown(scores, words, average, worst):
    from pack.nodes.evidence.clip_numbers import ClipNumbers
    from pack.nodes.evidence.compare_clips import verdict
    numbers = ClipNumbers((16, 16), 11, list(scores), [30.0] * len(scores), [False] * len(scores))
    assert verdict(numbers) == f"Frames {words}: SSIM {average} on average, {worst}."


def test_one_sentence_says_that_sameness_is_not_quality():
    a = clip_of()
    assert compared(a, noisy(a, 0.1)).report.count("measure sameness, not quality") == 1


def test_of_clips_of_different_lengths_the_common_frames_are_compared_and_that_is_said():
    a = clip_of(6)
    b = noisy(a, 0.05)
    found, wanted = compared(a, b[:4]), compared(a[:4], b[:4])
    assert found.ssim == wanted.ssim and found.frames == 4
    assert found.report.splitlines()[1] == ("- the reference has 6 frames and the clip 4 frames: only the first 4 are "
                                            "compared. Sample both with the same length")


def test_alpha_is_left_out_and_that_is_said():
    a, alpha = clip_of(), torch.rand(5, 20, 26, 1)
    b = noisy(a, 0.05)
    found = compared(a, torch.cat((b, alpha), dim=-1))
    assert found.ssim == compared(a, b).ssim and "- the clip has an alpha channel: it is left out" in found.report


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_frames_are_named_first_and_left_out(value):
    a = clip_of(6)
    b = noisy(a, 0.05)
    wanted = compared(a, b)
    b[3, 0, 0, 0] = value
    found = compared(a, b)
    assert found.verdict == ("Frames are BROKEN: values that are not numbers (NaN or infinite) in 1 of 6 frames of the "
                             "clip (first in frame 4). They are left out.")
    assert found.broken_frames == {"reference": [], "clip": [4]} and found.ssim[3] is None and found.psnr[3] is None
    assert [s for s in found.ssim if s is not None] == [s for i, s in enumerate(wanted.ssim) if i != 3]
    assert math.isfinite(found.motion_ratio) and torch.isfinite(found.picture).all() and "--fp32-vae" in found.report


def test_clips_that_are_broken_throughout_still_end_in_a_sentence_and_a_picture():
    nothing = torch.full((3, 16, 16, 3), math.nan)
    found = compared(nothing, nothing)
    assert "3 of 3 frames of the reference (first in frame 1) and in 3 of 3 frames of the clip" in found.verdict
    assert found.verdict.endswith("There is nothing left to compare.") and found.ssim_mean is None
    assert torch.isfinite(found.picture).all() and not found.identical


def test_values_that_no_picture_has_are_told():
    a = clip_of()
    assert "a picture has 0 to 1" not in compared(a, noisy(a, 0.1)).report
    assert "- values go from " in compared(a * 255, noisy(a, 0.1) * 255).report


@pytest.mark.parametrize(("reference", "clip", "said"), [
    ((3, 480, 832, 3), (3, 480, 640, 3),
     "found 832x480 and 640x480: wanted clips of one size; decode both with the same settings"),
    ((3, 16, 16, 3), (0, 16, 16, 3), "clip: found no picture (0x16x16x3: frames x height x width x channels), wanted"),
    ((3, 16, 16, 1), (3, 16, 16, 3), "reference: found 1 channel, wanted 3 (red, green, blue). Connect the decoded"),
    ((3, 16, 16, 3), (3, 16, 16, 16), "clip: found 16 channels, wanted 3"),
    ((3, 16, 16), (3, 16, 16, 3), "reference: found a float32 tensor of shape 3x16x16, wanted the frames of a clip"),
])
def test_what_cannot_be_compared_is_refused_with_what_was_found_wanted_and_to_do(reference, clip, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        compared(torch.zeros(reference), torch.zeros(clip))


@pytest.mark.parametrize("wrong", [torch.zeros(2, 16, 16, 3, dtype=torch.uint8), None, "clip"])
def test_what_is_no_image_is_refused(wrong):
    with pytest.raises(ValueError, match=r"^clip: found a (uint8 tensor|NoneType|str).*VAE Decode$"):
        compared(torch.zeros(2, 16, 16, 3), wrong)


def test_frame_by_frame_gives_what_one_go_over_the_whole_clip_gives_and_holds_one_frame(monkeypatch):
    import kornia.metrics
    a = clip_of(9)
    b = noisy(a, 0.05)
    whole = kornia.metrics.ssim(*(clip.movedim(-1, 1).contiguous() for clip in (a, b)), 11, eps=0.0, padding="valid")
    original, sizes = kornia.metrics.ssim, []

    def ssim(x, y, *args, **kwargs):
        sizes.append((len(x), len(y), x.dtype))
        return original(x, y, *args, **kwargs)
    monkeypatch.setattr(kornia.metrics, "ssim", ssim)
    found = compared(a, b)
    assert found.ssim == pytest.approx(whole.mean((1, 2, 3)).tolist(), abs=1e-6)
    assert sizes == [(1, 1, torch.float32)] * 9
    assert found.motion_clip == pytest.approx(b.double().diff(dim=0).abs().mean().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_floating_dtype_is_compared_in_float32_and_the_inputs_stay_as_they_are(dtype):
    a, b = clip_of().to(dtype), noisy(clip_of(), 0.05).to(dtype)
    before = a.clone(), b.clone()
    found = compared(a, b)
    assert found.ssim == compared(a.float(), b.float()).ssim
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])


def test_inputs_that_share_memory_with_one_pixel_frames_stay_as_they_are():
    a = torch.rand(4, 1, 1, 3)
    before = a.clone()
    compared(a, a.flip(0))
    assert torch.equal(a, before)


def test_an_interrupt_ends_it_at_the_next_frame_and_progress_is_told(monkeypatch):
    import comfy.model_management
    import comfy.utils
    told = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK",
                        lambda value, total, preview, node_id=None: told.append((value, total)))
    a = clip_of(4)
    compared(a, noisy(a, 0.1))
    assert told[0] == (1, 4) and told[-1] == (4, 4)
    told.clear()
    comfy.model_management.interrupt_current_processing(True)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            compared(a, noisy(a, 0.1))
    finally:
        comfy.model_management.interrupt_current_processing(False)
    assert told == [(1, 4)]


def test_without_kornia_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia.metrics", None)
    with pytest.raises(RuntimeError, match="^found no kornia that works here .* -m pip install --upgrade kornia, "):
        compared(clip_of(), clip_of())


def test_kornia_is_imported_only_when_the_node_runs():
    for file in (ROOT / "nodes").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found = [ast.unparse(line) for line in tree.body if isinstance(line, ast.Import | ast.ImportFrom)]
        assert not any("kornia" in line for line in found), file


def test_comfyui_runs_the_node_and_shows_a_run_from_the_cache_too(monkeypatch):
    import execution
    import server

    import nodes
    from pack.nodes.evidence.compare_clips import CompareClips
    sent = []

    class Server:
        client_id = last_node_id = last_prompt_id = None

        def send_sync(self, event, data, sid=None):
            sent.append((event, data))

        def send_progress_text(self, text, node_id, sid=None):
            sent.append(("text", (node_id, text)))
    there = Server()
    monkeypatch.setattr(server.PromptServer, "instance", there, raising=False)
    monkeypatch.setitem(nodes.NODE_CLASS_MAPPINGS, "CompareClips", CompareClips)

    def frames(color):
        return {"class_type": "EmptyImage",
                "inputs": {"width": 32, "height": 24, "batch_size": 3, "color": color}}
    prompt = {"1": frames(0x404040), "2": frames(0xF0F0F0),
              "3": {"class_type": "CompareClips", "inputs": {"reference": ["1", 0], "clip": ["2", 0]}}}
    valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("id", prompt, None))
    assert valid and outputs == ["3"], (error, node_errors)
    executor = execution.PromptExecutor(there, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})
    for _ in range(2):
        executor.execute(prompt, "id", {"client_id": "page"}, outputs)
        assert executor.success, executor.status_messages
        shown = executor.history_result["outputs"]["3"]
        assert shown["text"][0].startswith("Frames differ as much as another picture does: SSIM ")
        assert shown["compare_clips"][0]["frames"] == 3 and shown["images"][0]["type"] == "temp"
    assert ("text", ("3", shown["text"][0])) in sent
