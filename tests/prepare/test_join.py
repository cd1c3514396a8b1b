"""Faces and their pyramids are joined into shards: in which order, and what does not match."""

from __future__ import annotations

import json

import pytest

from dinogen.config import GuideConfig, PackConfig
from dinogen.features import load_guide
from dinogen.prepare import join
from dinogen.prepare.faces.folder import write_faces
from dinogen.prepare.parts import write_pyramids
from dinogen.prepare.photos.read import PrepareError
from dinogen.prepare.pyramid import PyramidMaker
from shards import open_dataset
from tests.prepare.pipelines import CPU, dinogen, fill, random_photo, settings


@pytest.fixture(scope="module")
def guide(checkpoint):
    return load_guide(GuideConfig(path=str(checkpoint)), CPU)


@pytest.fixture
def photos(tmp_path):
    return fill(tmp_path / "photos")


def test_packed_faces_are_not_packed_again(photos, guide, tmp_path):
    config = settings()
    faces, parts, data = (tmp_path / name for name in ("faces", "parts", "data"))
    write_faces(photos, faces, config.faces)
    write_pyramids(faces, parts, PyramidMaker(guide, config.pyramids, CPU))
    command = ("pack", faces, parts, data, "prepare.pack.shard_size=3")
    first, second = dinogen(*command), dinogen(*command)
    assert (first.exit_code, second.exit_code) == (0, 0), second.output
    assert second.stdout == "already finished\n" + first.stdout
    other = dinogen("pack", faces, parts, data, "prepare.pack.shard_size=4")
    assert "prepare.pack.shard_size: 3, now 4" in str(other.exception)
    # A summary of the photos is missing here, and the settings are those of another way.
    config = [f"guide.path={guide.info.path}", "prepare.faces.detect=none", "prepare.faces.size=32"]
    config += ["prepare.faces.max_duplicate_distance=2", "prepare.pack.shard_size=3"]
    done = dinogen("prepare", photos, data, *config)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("already finished\n20 photos, 18 images")
    (faces / "10.jpg").unlink()
    write_pyramids(faces, parts, PyramidMaker(guide, settings().pyramids, CPU))
    fewer = dinogen(*command)
    assert "the faces have changed: 1 removed (10)): add --repack" in str(fewer.exception)


def test_a_photo_with_many_faces_keeps_their_order_on_both_ways(guide, tmp_path):
    """KEY_10 comes behind KEY_9, and the further faces of `a` before the photo `a0`."""
    faces = tmp_path / "faces"
    faces.mkdir()
    (faces / "settings.json").write_text("{}")
    keys = ["a", *(f"a_{number}" for number in range(1, 12)), "a0", "b"]
    for seed, key in enumerate(keys):
        random_photo(seed).resize((32, 32)).save(faces / f"{key}.png")
        meta = {"key": key, "source": f"{key.split('_')[0]}.jpg"}
        (faces / f"{key}.json").write_text(json.dumps(meta))
    config = settings()
    write_pyramids(faces, tmp_path / "parts", PyramidMaker(guide, config.pyramids, CPU))
    source = join.open_pyramids(tmp_path / "parts")
    join.pack_faces(faces, source, tmp_path / "data", PackConfig(), guide.info.to_dict())
    assert open_dataset(tmp_path / "data").keys() == [*keys[:12], "a0", "b"]


def test_faces_and_pyramids_have_to_match(photos, guide, tmp_path):
    config = settings(faces={"max_duplicate_distance": -1})
    faces, parts = tmp_path / "faces", tmp_path / "parts"
    write_faces(photos, faces, config.faces)
    write_pyramids(faces, parts, PyramidMaker(guide, config.pyramids, CPU))
    source = join.open_pyramids(parts)
    for name in ("10", "9"):
        (faces / f"{name}.jpg").rename(faces / f"new{name}.jpg")
        (faces / f"new{name}.json").write_text(json.dumps({"key": f"new{name}"}))
    with pytest.raises(PrepareError) as caught:
        join.pack_faces(faces, source, tmp_path / "data", config.pack, {})
    assert "2 of 19 faces have no pyramid (new10, new9)" in str(caught.value)
    assert "2 pyramids have no face (10, 9)" in str(caught.value)
    assert not (tmp_path / "data").exists()
    with pytest.raises(PrepareError, match="holds no pyramids"):
        join.open_pyramids(faces)
    (parts / "x.pt").write_bytes(b"")
    with pytest.raises(PrepareError, match="holds both"):
        join.open_pyramids(parts)
