"""The node "Compare Clips": how alike a dense and a sparse clip are, in words, as numbers and as a picture."""
from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..hook.status import show_under_node
from ..hook.verdict import bullets
from .clip_numbers import STILL, WINDOW, ClipNumbers, compare, mean
from .clip_picture import draw_pair

NEARLY, ALIKE = 0.95, 0.8
"""SSIM from which frames are nearly the same, and from which they differ in detail only."""
SAMENESS = "SSIM and PSNR measure sameness, not quality: a sparse clip may differ from the dense one and still be good"
NOTHING_CHANGED = ("sparse attention has changed nothing, if it was on at all: the node Sparse Attention Report says "
                   "whether it was")
SLACK = 0.01


class CompareClips(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CompareClips",
            display_name="Compare Clips",
            category="model/patch",
            description=(
                "Says how alike two clips are, such as one sampled with dense and one with sparse attention at the "
                "same seed: SSIM and PSNR of the frames, whether it flickers more, and the frame that differs most."),
            search_aliases=["SSIM", "PSNR", "clip difference", "flicker", "dense against sparse"],
            is_output_node=True,
            inputs=[
                io.Image.Input("reference", tooltip="The clip to compare with: sampled with dense attention, that is "
                                                    "without the sparse node, and with the same seed."),
                io.Image.Input("clip", tooltip="The clip to judge: sampled with the sparse node. Frames of the same "
                                               "size as the reference."),
            ],
            hidden=[io.Hidden.unique_id],
            outputs=[io.String.Output("report"), io.Image.Output("picture")],
        )

    @classmethod
    def execute(cls, reference, clip) -> io.NodeOutput:
        reference, clip, notes = comparable(reference, clip)
        bar = comfy.utils.ProgressBar(len(reference))

        def done(frames: int) -> None:
            bar.update_absolute(frames)
            comfy.model_management.throw_exception_if_processing_interrupted()
        numbers = compare(reference, clip, done)
        report = report_text(numbers, notes)
        shown = numbers.worst if numbers.worst is not None else 0
        picture = draw_pair(reference[shown], clip[shown], f"frame {shown + 1} of {len(reference)}",
                            report.splitlines()[0], numbers.ssim if numbers.known else [], numbers.worst)
        show_under_node(report, getattr(getattr(cls, "hidden", None), "unique_id", None))
        return io.NodeOutput(report, picture, ui={
            **ui.PreviewImage(picture, cls=cls).as_dict(), "text": [report], "compare_clips": [plain(numbers)]})


def comparable(reference: Tensor, clip: Tensor) -> tuple[Tensor, Tensor, list[str]]:
    """Both clips as views [frames, h, w, 3] of one shape, and what was left out for that. Raises ValueError."""
    notes, clips = [], {"reference": reference, "clip": clip}
    for name, images in clips.items():
        if not isinstance(images, torch.Tensor) or images.ndim != 4 or not images.is_floating_point():
            found = (f"a {str(images.dtype).removeprefix('torch.')} tensor of shape {_x(images.shape)}"
                     if isinstance(images, torch.Tensor) else f"a {type(images).__name__}")
            raise ValueError(f"{name}: found {found}, wanted the frames of a clip (frames x height x width x 3, values "
                             "from 0 to 1). Connect the output of VAE Decode")
        if not images.numel():
            raise ValueError(f"{name}: found no picture ({_x(images.shape)}: frames x height x width x channels), "
                             "wanted one frame or more. Look at what the node before this one lets through")
        if images.shape[-1] not in (3, 4):
            raise ValueError(f"{name}: found {images.shape[-1]} channel{'s' * (images.shape[-1] != 1)}, wanted 3 (red, "
                             "green, blue). Connect the decoded clip, not a mask or a latent")
        if images.shape[-1] == 4:
            notes.append(f"the {name} has an alpha channel: it is left out, colours are compared as they are stored")
            clips[name] = images[..., :3]
    reference, clip = clips.values()
    if reference.shape[1:3] != clip.shape[1:3]:
        sizes = " and ".join(f"{images.shape[2]}x{images.shape[1]}" for images in (reference, clip))
        raise ValueError(f"found {sizes}: wanted clips of one size; decode both with the same settings")
    frames = min(len(reference), len(clip))
    if len(reference) != len(clip):
        notes.insert(0, f"the reference has {_frames(len(reference))} and the clip {_frames(len(clip))}: only the "
                        f"first {frames} {'are' if frames > 1 else 'is'} compared. Sample both with the same length")
    return reference[:frames], clip[:frames], notes


def report_text(numbers: ClipNumbers, notes: list[str]) -> str:
    """The verdict, then a list: what was left out, what the numbers mean, and the numbers. Plain text and Markdown."""
    total = len(numbers.ssim)
    lines = list(notes)
    if numbers.window < WINDOW:
        lines.append(f"the frames are smaller than {WINDOW} pixels: SSIM has a window of {numbers.window} here, so it "
                     "does not compare with that of larger clips")
    if numbers.known and (numbers.low < -SLACK or numbers.high > 1 + SLACK):
        lines.append(f"values go from {numbers.low:.3g} to {numbers.high:.3g} and a picture has 0 to 1: SSIM and PSNR "
                     "are too far off to be trusted")
    if any(numbers.broken.values()):
        first, said = _broken(numbers), [verdict(numbers)] if numbers.known else []
        lines = ["a VAE or a model in 16 bits can do that. Try the VAE in 32 bits first: start ComfyUI with --fp32-vae",
                 *said, *lines]
    else:
        first = verdict(numbers)
    if all(numbers.identical):
        lines.append(NOTHING_CHANGED)
    elif numbers.known:
        lines += [SAMENESS, _decibels(numbers), _motion(numbers)]
    lines.append(f"{_frames(total)} of {_x(numbers.size)} compared one by one")
    return "\n".join([first, *bullets(lines)])


def verdict(numbers: ClipNumbers) -> str:
    """One sentence on how alike the frames are that could be compared."""
    average, least, total = mean(numbers.known), min(numbers.known), len(numbers.ssim)
    same = sum(numbers.identical)
    if same == len(numbers.known):
        return f"The clips are identical, bit for bit ({_frames(same)})."
    if round(average, 2) >= NEARLY:
        words = "are nearly the same"
    elif round(average, 2) >= ALIKE:
        words = "look alike and differ in detail"
    else:
        words = "differ as much as another picture does"
    if round(average, 2) >= ALIKE > round(least, 2):
        words += ", except for some"
    if total == 1:
        return f"The frames {words}: SSIM {_score(average)} (one frame)."
    return (f"Frames {words}: SSIM {_score(average)} on average, {_score(least)} in the worst frame (frame "
            f"{numbers.worst + 1} of {total}).")


def plain(numbers: ClipNumbers) -> dict[str, Any]:
    """What JSON can hold: frames counted from 1, None for what there is no number for."""
    worst = numbers.worst
    return {
        "frames": len(numbers.ssim), "width": numbers.size[0], "height": numbers.size[1],
        "identical": all(numbers.identical), "ssim_mean": mean(numbers.known),
        "ssim_worst": None if worst is None else numbers.ssim[worst],
        "worst_frame": None if worst is None else worst + 1,
        "psnr_mean": mean([value for value in numbers.psnr if value is not None]),
        "psnr_worst": None if worst is None else numbers.psnr[worst],
        "motion_ratio": numbers.motion_ratio, "motion_reference": numbers.mean_move("reference"),
        "motion_clip": numbers.mean_move("clip"), "window": numbers.window, "ssim": numbers.ssim,
        "psnr": numbers.psnr, "broken_frames": {name: [frame + 1 for frame in frames]
                                                for name, frames in numbers.broken.items()},
    }


def _broken(numbers: ClipNumbers) -> str:
    parts = [f"in {len(frames)} of {_frames(len(numbers.ssim))} of the {name} (first in frame {frames[0] + 1})"
             for name, frames in numbers.broken.items() if frames]
    rest = " They are left out." if numbers.known else " There is nothing left to compare."
    return f"Frames are BROKEN: values that are not numbers (NaN or infinite) {' and '.join(parts)}.{rest}"


def _decibels(numbers: ClipNumbers) -> str:
    known, worst, same = [value for value in numbers.psnr if value is not None], numbers.worst, sum(numbers.identical)
    if not known:
        return "the difference is too small for a PSNR"
    if len(numbers.ssim) == 1:
        return f"PSNR {known[0]:.1f} dB; higher is closer"
    at_worst = "" if numbers.psnr[worst] is None else f", {numbers.psnr[worst]:.1f} dB in the worst frame"
    without = f"; {_frames(same)} identical, bit for bit, left out of the PSNR" if same else ""
    return f"PSNR {mean(known):.1f} dB on average{at_worst}; higher is closer{without}"


def _motion(numbers: ClipNumbers) -> str:
    """Whether the clip changes more from frame to frame than the reference does."""
    before, after = numbers.mean_move("reference"), numbers.mean_move("clip")
    if before is None:
        return "movement is not compared: that needs two frames in a row"
    if before < STILL:
        return ("both clips stand still" if after < STILL else
                f"the reference stands still, the clip changes by {after:.2%} of full brightness from frame to frame")
    if after < STILL:
        return "the clip stands still, the reference does not"
    return (f"the clip moves {numbers.motion_ratio:.2f} times as much from frame to frame as the reference: well above "
            "1 it flickers or moves more, well below 1 it lost motion")


def _score(value: float) -> str:
    """Two decimals, more where two would say that frames are identical which are not."""
    shown = f"{value:.2f}"
    return f"{min(value, 0.9999):.4f}" if shown == "1.00" else shown


def _frames(count: int) -> str:
    return f"{count} frame{'s' * (count != 1)}"


def _x(sizes) -> str:
    return "x".join(map(str, sizes))
