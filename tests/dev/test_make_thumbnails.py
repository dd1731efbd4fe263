"""The cards of the example graphs in the template browser."""
import io

from PIL import Image, ImageChops

import make_thumbnails

GRAPHS = sorted((make_thumbnails.ROOT / "workflows").glob("*.json"))


def test_every_graph_has_the_card_that_is_drawn_for_it_and_no_two_are_alike():
    drawn = {path: make_thumbnails.card(path.stem) for path in GRAPHS}
    for path, picture in drawn.items():
        stored = Image.open(path.with_suffix(".jpg"))
        kept = io.BytesIO()
        picture.save(kept, "JPEG", quality=88)
        difference = ImageChops.difference(stored.convert("RGB"), Image.open(kept).convert("RGB"))
        assert max(high for _, high in difference.getextrema()) <= 40, path.name
    assert len({picture.tobytes() for picture in drawn.values()}) == len(GRAPHS) >= 19


def test_the_methods_are_told_apart_by_what_they_keep():
    dense, vsa, sta = (make_thumbnails.kept(method) for method in ("dense", "VSA", "STA"))
    assert len(dense) == 144 and make_thumbnails.QUERY in vsa & sta and vsa != sta and len(vsa) < 40 >= len(sta)


def test_a_card_shows_as_many_tiles_as_the_sparsity_keeps_and_the_window_of_sta():
    assert len(make_thumbnails.kept("VSA", 0.1)) == 15 and len(make_thumbnails.kept("VSA", 1.0)) == 144
    assert len(make_thumbnails.kept("STA", window=(1.0, 0.5, 0.5))) == 3 * 4 * 3


def test_every_card_names_a_family_and_says_what_is_special():
    words = {path.stem: make_thumbnails.described(path.stem) for path in GRAPHS}
    assert all(family and task for family, _, task in words.values())
    assert words["wan22_i2v_14b_4step_vsa"][::2] == ("Wan 2.2 14B", "image to video · 4 steps")
    assert words["fastwan_attach_gates_vsa"][2] == "text to video · gates attached"
