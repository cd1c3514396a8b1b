"""Features of mirrored images: in one pass, in steps, found again, and read by what knows none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dinogen.config import ConfigError, parse_config
from dinogen.features import native_pyramid, pooled_pyramid
from dinogen.prepare import join, pipeline
from dinogen.prepare.export_pt import export_pt
from dinogen.prepare.faces.folder import write_faces
from dinogen.prepare.parts import write_pyramids
from dinogen.prepare.photos.read import PrepareError
from shards import open_dataset
from shards.check.repair import repair
from shards.check.verify import verify
from shards.errors import PackError
from shards.format.sample import flipped_level, level_grid, level_guide
from shards.image.decode import decode_image
from tests.prepare.several_guides import all_samples, contents, fill, maker_of, settings

FLIPS = settings(pyramids={"flips": True})


def flipping():
    return maker_of(config=FLIPS.pyramids)


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    """Photos prepared with the features of both orientations, and what made them."""
    folder = tmp_path_factory.mktemp("flipped")
    maker = flipping()
    pipeline.prepare(fill(folder / "photos"), folder / "data", FLIPS, maker)
    return folder / "data", maker


def without_wide():
    maker = flipping()
    maker.guides = {name: guide for name, guide in maker.guides.items() if name != "wide"}
    return maker


def test_names_of_mirrored_levels_are_those_of_further_guides():
    assert flipped_level("p16") == "flipped.p16"
    assert flipped_level("pixels.n8") == "pixels_flipped.n8"
    assert level_guide("pixels_flipped.n8") == "pixels_flipped" and level_grid("flipped.p16") == 16


def test_each_sample_has_the_features_of_its_mirror_image_too(flipped):
    data, maker = flipped
    plain = {f"{g}{k}{n}" for g in ("", "pixels.", "wide.") for k in "pn" for n in (4, 8)}
    for sample in all_samples(data):
        assert set(sample.levels) == plain | set(map(flipped_level, plain)) | {"clip", "text"}
        pixels = decode_image(sample.image, sample.image_format)[:, ::-1].astype(np.float32)
        images = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 127.5 - 1
        for prefix, guide in (("", maker.guide), *((f"{n}.", g) for n, g in maker.guides.items())):
            made = {"p": pooled_pyramid(guide, images, (4, 8), 8)}
            made["n"] = native_pyramid(guide, images, (4, 8))
            for kind, pyramid in made.items():
                for grid, expected in pyramid.items():
                    found = sample.levels[flipped_level(f"{prefix}{kind}{grid}")]
                    np.testing.assert_allclose(found, expected[0], rtol=1e-3, atol=1e-3)
    assert verify(open_dataset(data)) == []


def test_the_colours_of_a_mirror_image_are_the_mirrored_colours(flipped):
    for sample in all_samples(flipped[0]):
        grid = sample.levels["pixels.p8"].reshape(8, 8, 3)
        mirrored = sample.levels["pixels_flipped.p8"].reshape(8, 8, 3)
        np.testing.assert_allclose(mirrored, grid[:, ::-1], rtol=1e-3, atol=1e-3)
        own, other = (sample.levels[name] for name in ("p8", "flipped.p8"))
        swapped = other.reshape(8, 8, -1)[:, ::-1].reshape(64, -1)
        assert np.abs(own.astype(np.float32) - swapped).max() > 0.1, "the guide is not symmetric"


def test_the_manifest_names_the_guides_twice(flipped):
    data, maker = flipped
    manifest = open_dataset(data).manifest
    info = {name: guide.info.to_dict() for name, guide in maker.guides.items()}
    assert manifest.guide == maker.guide.info.to_dict() == manifest.guides["flipped"]
    assert manifest.guides == {
        **info, **{f"{name}_flipped": one for name, one in info.items()}, "flipped": manifest.guide
    }  # fmt: skip
    assert manifest.prepare["pyramids"]["flips"] is True


def test_one_pass_gives_the_bytes_of_the_three_steps(flipped, tmp_path):
    photos = fill(tmp_path / "photos")
    faces, parts, data = (tmp_path / name for name in ("faces", "parts", "data"))
    write_faces(photos, faces, FLIPS.faces)
    write_pyramids(faces, parts, flipping())
    source = join.open_pyramids(parts)
    join.pack_faces(faces, source, data, FLIPS.pack, join.guide_of(source, None))
    assert contents(data) == contents(flipped[0])
    with pytest.raises(PrepareError, match=r"\(prepare\.pyramids\.flips: true, now false\)"):
        write_pyramids(faces, parts, maker_of())
    with pytest.raises(PrepareError, match=r"\(guides\.wide: [^;]*, now none\)"):
        write_pyramids(faces, parts, without_wide())


def test_features_of_images_as_they_are_do_not_change(flipped, tmp_path):
    photos = fill(tmp_path / "photos")
    pipeline.prepare(photos, tmp_path / "data", settings(), maker_of())
    for plain, both in zip(all_samples(tmp_path / "data"), all_samples(flipped[0]), strict=True):
        assert all(np.array_equal(both.levels[n], found) for n, found in plain.levels.items())
    # finished, and found again as it was; what it lacks is said
    pipeline.prepare(photos, tmp_path / "data", settings(), maker_of())
    with pytest.raises(PrepareError, match=r"\(prepare\.pyramids\.flips: false, now true\)"):
        pipeline.prepare(photos, tmp_path / "data", FLIPS, flipping())


def test_a_dataset_with_both_orientations_does_where_one_is_asked_for(flipped):
    data = flipped[0]
    before = contents(data)
    pipeline.prepare(data.parent / "photos", data, settings(), maker_of())
    pipeline.prepare(data.parent / "photos", data, FLIPS, flipping())
    assert contents(data) == before
    other = flipping()
    other.guides["more"] = other.guides["wide"]
    with pytest.raises(PrepareError, match=r"\(guides\.more: none, now [^;]*\)"):
        pipeline.prepare(data.parent / "photos", data, FLIPS, other)


class Killed(BaseException):
    pass


def test_interrupted_and_resumed_gives_the_same_bytes(flipped, tmp_path):
    def kill(done, total):
        if done > 6:
            raise Killed

    photos, data = fill(tmp_path / "photos"), tmp_path / "data"
    with pytest.raises(Killed):
        pipeline.prepare(photos, data, FLIPS, flipping(), progress=kill)
    with pytest.raises(
        PackError, match=r"unfinished packing with other settings \(prepare, guides\)"
    ):
        pipeline.prepare(photos, data, settings(), maker_of())
    pipeline.prepare(photos, data, FLIPS, flipping())
    assert contents(data) == contents(flipped[0])


def test_without_a_guide_there_is_nothing_to_mirror():
    maker = maker_of(guide=None, guides={}, config=FLIPS.pyramids)
    assert maker.settings() == {}
    assert {n: v for n, v in maker.identity().items() if n != "clip"} == {"guide": {}, "guides": {}}


def test_repair_keeps_them(flipped, tmp_path):
    data = tmp_path / "data"
    pipeline.prepare(fill(tmp_path / "photos"), data, FLIPS, flipping())
    (data / "manifest.json").unlink()
    for index in data.glob("*.idx"):
        index.unlink()
    repair(data)
    again, before = (open_dataset(folder).manifest for folder in (data, flipped[0]))
    assert again.levels == before.levels and again.guides == before.guides


@pytest.mark.parametrize("name", ["flipped", "pixels_flipped"])
def test_their_names_are_not_free(name):
    with pytest.raises(ConfigError, match=rf"'{name}' cannot be the name.*pyramids\.flips"):
        parse_config({"guides": {name: {"name": "pixels"}}})


def test_the_exchange_format_holds_images_as_they_are(tmp_path):
    config = settings(pyramids={"flips": True, "grids": [4, 8, 16], "base_grid": 16})
    maker = maker_of(config=config.pyramids)
    pipeline.prepare(fill(tmp_path / "photos"), tmp_path / "data", config, maker)
    export_pt(tmp_path / "data", tmp_path / "pt")
    first = all_samples(tmp_path / "data")[0]
    found = join.open_pyramids(tmp_path / "pt").levels(first.key)
    assert all(np.array_equal(found[name], first.levels[name]) for name in ("p4", "p8", "p16"))
