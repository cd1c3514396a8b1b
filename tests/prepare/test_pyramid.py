"""Pyramids as they are made: neighbours do not matter, and what cannot be used is named."""

from __future__ import annotations

import numpy as np
import pytest

from dinogen.config import GuideConfig
from dinogen.features import load_guide
from dinogen.prepare.faces.crop import Crop
from dinogen.prepare.photos.read import PrepareError
from dinogen.prepare.pyramid import PyramidMaker
from tests.prepare.counting_guide import CONFIG, CPU, Counting, random_photo


@pytest.fixture
def guide(checkpoint):
    return Counting(load_guide(GuideConfig(path=str(checkpoint)), CPU))


@pytest.fixture
def make(guide):
    return lambda **changes: PyramidMaker(guide, CONFIG.model_copy(update=changes), CPU)


def test_the_guide_always_sees_the_same_batch_so_neighbours_do_not_matter(make, guide):
    crops = [Crop(f"f{i}", random_photo(i), "png") for i in range(5)]
    seen = []

    class Watched(Counting):
        def __call__(self, images):
            seen.append(len(images))
            return super().__call__(images)

    maker = make(batch=4, kinds=("pooled",))
    maker.guide = Watched(guide)
    together = {crop.key: levels for crop, levels in maker.levels(crops)}
    assert seen == [4, 4]
    assert list(together) == [crop.key for crop in crops]
    for crop in crops:
        ((_, levels),) = maker.levels([crop])
        assert all(np.array_equal(levels[name], together[crop.key][name]) for name in levels)


def test_faces_that_cannot_be_used_are_named(make):
    good = Crop("good", random_photo(0), "png")
    with pytest.raises(PrepareError, match=r"odd: the face is 24x24 pixels, but others are 32x32"):
        list(make().levels([good, Crop("odd", random_photo(1, 24), "png")]))
    for file_format in ("png", "jpg"):
        data = random_photo(1, file_format={"png": "PNG", "jpg": "JPEG"}[file_format])
        broken = Crop("broken", data[: len(data) // 2], file_format)
        with pytest.raises(PrepareError, match=rf"broken\.{file_format}: cannot be decoded"):
            list(make().levels([good, broken]))


def test_sizes_without_an_exact_native_grid_are_refused_at_once(make):
    crops = [Crop("a", random_photo(0, 40), "png")]
    with pytest.raises(PrepareError, match=r"prepare\.faces\.size: 40 .* native grid 16"):
        list(make().levels(crops))
    assert len(list(make(kinds=("pooled",)).levels(crops))) == 1


def test_features_beyond_float16_are_refused(make, guide):
    class Loud(Counting):
        def __call__(self, images):
            return super().__call__(images) * 1e5

    maker = make()
    maker.guide = Loud(guide)
    with pytest.raises(PrepareError, match=r"a: level p4 is not finite in float16"):
        list(maker.levels([Crop("a", random_photo(0), "png")]))
