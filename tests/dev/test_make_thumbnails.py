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
    assert len({picture.tobytes() for picture in drawn.values()}) == len(GRAPHS) >= 7


def test_the_methods_are_told_apart_by_what_they_keep():
    dense, vsa, sta = (make_thumbnails.kept(method) for method in ("dense", "VSA", "STA"))
    assert len(dense) == 180 and make_thumbnails.QUERY in vsa & sta and vsa != sta and len(vsa) < 40 > len(sta)
