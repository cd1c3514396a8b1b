"""Captions beside photos, with an embedder or without, and embeddings without pyramids."""

from __future__ import annotations

import csv

import pytest

from dinogen.prepare import join, pipeline
from dinogen.prepare.captions import read_caption
from dinogen.prepare.faces import read_faces, write_faces
from dinogen.prepare.parts import write_pyramids
from dinogen.prepare.read import PrepareError
from shards import open_dataset
from tests.prepare.several_guides import all_samples, contents, fill, maker_of, settings


@pytest.fixture
def photos(tmp_path):
    return fill(tmp_path / "photos")


def test_embeddings_alone(photos, tmp_path):
    """For a family that reads no pyramids but clip."""
    maker = maker_of(guide=None, guides={})
    pipeline.prepare(photos, tmp_path / "data", settings(), maker)
    data = open_dataset(tmp_path / "data")
    assert set(data.manifest.levels) == {"clip", "text"} and data.manifest.guide == {}
    assert "pyramids" not in data.manifest.prepare
    assert data.read([0, 1], levels=["clip", "text"])["clip"].shape == (2, 6)
    faces, parts = tmp_path / "faces", tmp_path / "parts"
    write_faces(photos, faces, settings().faces)
    write_pyramids(faces, parts, maker)
    source = join.open_pyramids(parts)
    join.pack_faces(faces, source, tmp_path / "steps", settings().pack, join.guide_of(source, None))
    assert contents(tmp_path / "steps") == contents(tmp_path / "data")


def test_without_captions_there_is_no_text(photos, tmp_path):
    for path in photos.glob("*.txt"):
        path.unlink()
    pipeline.prepare(photos, tmp_path / "data", settings(), maker_of())
    assert "text" not in open_dataset(tmp_path / "data").manifest.levels
    assert "clip" in open_dataset(tmp_path / "data").manifest.levels


def test_captions_without_an_embedder_are_kept_as_they_are(photos, tmp_path):
    pipeline.prepare(photos, tmp_path / "data", settings(), None)
    found = {sample.key: sample.caption for sample in all_samples(tmp_path / "data")}
    assert found["f01"] == "a grey square" and found["f00"] is None
    assert open_dataset(tmp_path / "data").manifest.levels == {}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the caption is empty"),
        (b" \n", "the caption is empty"),
        (b"gr\xf6\xdfer", r"the caption is not UTF-8 \(byte 2\)"),
        (b"x" * 4097, "at most 4096 bytes"),
        (None, "cannot be read"),
    ],
)
def test_a_caption_that_cannot_be_used_is_named(photos, tmp_path, content, message):
    path = photos / "f07.txt"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(PrepareError, match=rf"f07\.txt: .*{message}"):
        pipeline.prepare(photos, tmp_path / "data", settings(), maker_of())
    with pytest.raises(PrepareError, match=rf"f07\.txt: .*{message}"):
        write_faces(photos, tmp_path / "faces", settings().faces)


def test_a_byte_order_mark_is_no_letter(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffhello\r\n".encode())
    assert read_caption(tmp_path / "a.jpg") == "hello"
    assert read_caption(tmp_path / "b.jpg") is None


def test_every_face_of_a_photo_has_its_caption(photos, tmp_path):
    write_faces(photos, tmp_path / "faces", settings().faces)
    found = {crop.key: crop.caption for crop in read_faces(tmp_path / "faces")}
    assert found["f05"] == "two\nlines" and found["f02"] is None
    with (tmp_path / "faces" / "rejected.csv").open() as file:
        assert [row["source"] for row in csv.DictReader(file)] == ["f00x.jpg"]
