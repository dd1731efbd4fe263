"""The judge of finished clips: what it finds in clips whose content is known, and what it must not overlook."""
import dataclasses

import pytest
import torch

from pack.quality import judge, scenes


def drawn(seed, **knobs):
    return scenes.draw_scene(torch.Generator().manual_seed(seed), 8, 32, 32, **knobs)


@pytest.fixture(scope="module")
def scene():
    return drawn(1004)


@pytest.mark.parametrize("woven", [True, False])
def test_what_was_drawn_is_found_in_nearly_every_clip(woven):
    all_scenes = [drawn(seed, woven=woven) for seed in range(24)]
    judged = [judge.judge(scenes.render(scene), scene) for scene in all_scenes]
    assert sum(j.count_right for j in judged) >= 23 and sum(j.colours_right for j in judged) >= 23
    assert sum(j.kinds for j in judged) >= 23


def test_a_preview_of_the_latent_shows_the_clip(scene):
    rgb = scenes.render(scene)
    assert judge.relative(scenes.to_rgb(scenes.to_latent(rgb)), rgb) < 1e-5


@pytest.mark.parametrize("change", [
    lambda shapes: shapes[1:],                                                           # one is missing
    lambda shapes: (*shapes, dataclasses.replace(shapes[0], colour="cyan", path=tuple((y / 2, x / 2 + 8) for y, x in
                                                                                      shapes[0].path))),
    lambda shapes: (dataclasses.replace(shapes[0], colour="cyan"), *shapes[1:]),
])
def test_a_missing_an_added_and_a_recoloured_shape_are_seen(scene, change):
    assert "cyan" not in {s.colour for s in scene.shapes}
    other = scenes.render(dataclasses.replace(scene, shapes=change(scene.shapes)))
    assert judge.judge(scenes.render(scene), scene).colours_right and not judge.judge(other, scene).colours_right
    assert judge.content(other) != judge.content(scenes.render(scene))


def test_a_shape_in_two_pieces_is_a_wrong_count_of_the_right_colours():
    scene = drawn(7, shapes=1)
    twin = dataclasses.replace(scene.shapes[0], path=tuple((y + 16, x - 12) for y, x in scene.shapes[0].path))
    judged = judge.judge(scenes.render(dataclasses.replace(scene, shapes=(*scene.shapes, twin))), scene)
    assert judged.colours_right and not judged.count_right


def test_a_disc_where_a_square_was_asked_for_is_a_wrong_kind(scene):
    swap = {"disc": "square", "square": "disc"}
    asked = dataclasses.replace(scene, shapes=tuple(dataclasses.replace(s, kind=swap[s.kind]) for s in scene.shapes))
    assert judge.judge(scenes.render(scene), scene).kinds == 1 and judge.judge(scenes.render(scene), asked).kinds == 0


def test_a_shape_that_is_there_in_a_few_frames_only_does_not_count(scene):
    rgb = scenes.render(scene)
    rgb[:, 3:] = scenes.render(dataclasses.replace(scene, shapes=scene.shapes[1:]))[:, 3:]
    assert scene.shapes[0].colour not in judge.content(rgb)


def test_noise_flickers_and_even_motion_does_not():
    even = torch.arange(8.0)[None, :, None, None].expand(3, 8, 4, 4)
    assert judge.flicker(even) == 0
    assert 1.6 < judge.flicker(torch.randn(3, 8, 32, 32, generator=torch.Generator().manual_seed(0))) < 1.9


def test_likeness_of_equal_clips_is_whole_and_falls_with_noise(scene):
    rgb = scenes.render(scene)
    same, near = judge.likeness(rgb, rgb), judge.likeness(rgb, rgb + 0.1 * torch.randn_like(rgb))
    assert same == {"psnr": 100.0, "ssim": pytest.approx(1, abs=1e-4)}
    assert near["psnr"] == pytest.approx(26, abs=2) and near["ssim"] < 0.97


def test_the_interval_of_a_share_is_wilsons():
    assert judge.interval(8, 16) == (pytest.approx(0.2800, abs=1e-4), pytest.approx(0.7200, abs=1e-4))
    assert judge.interval(16, 16)[0] == pytest.approx(0.8064, abs=1e-4) and judge.interval(0, 0) == (0.0, 1.0)
