"""Captions beside photos, with an embedder or without, and embeddings without pyramids."""

from __future__ import annotations

import pytest

from dinogen.prepare import join, pipeline
from dinogen.prepare.faces.folder import read_faces, write_faces
from dinogen.prepare.parts import write_pyramids
from dinogen.prepare.photos.read import PrepareError, read_caption
from shards import open_dataset
from tests.prepare.face_folders import rejected
from tests.prepare.several_guides import (
    CAPTIONS,
    NUM,
    all_samples,
    contents,
    fill,
    maker_of,
    photos_as_faces,
    settings,
)


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


def test_without_an_embedder_captions_are_not_read(photos, tmp_path):
    """Nothing in the config asks for text: one that cannot be used is no matter."""
    (photos / "f07.txt").write_bytes(b"gr\xf6\xdfer")
    summary, _ = pipeline.prepare(photos, tmp_path / "data", settings(), None)
    assert {sample.caption for sample in all_samples(tmp_path / "data")} == {None}
    assert summary.num_captions_not_read == len(CAPTIONS) + 1
    assert "bad_caption" not in summary.rejected
    again, _ = pipeline.prepare(photos, tmp_path / "data", settings(), None)
    assert again.num_captions_not_read == summary.num_captions_not_read


BAD = [
    (b"", "the caption is empty"),
    (b" \n", "the caption is empty"),
    (b"\xef\xbb\xbf", "the caption is empty"),
    (b"gr\xf6\xdfer", "the caption is not UTF-8 (byte 2)"),
    ("größer".encode("utf-16"), "is UTF-16 or no text"),
    ("larger".encode("utf-16-le"), "is UTF-16 or no text"),
    (b"x" * 4097, "longer than 4096 bytes"),
]


@pytest.mark.parametrize(("content", "message"), BAD)
def test_one_bad_caption_is_one_line_and_its_photo_is_used(photos, tmp_path, content, message):
    (photos / "f07.txt").write_bytes(content)
    faces, parts = tmp_path / "faces", tmp_path / "parts"
    summary, _ = pipeline.prepare(photos, tmp_path / "data", settings(), maker_of())
    write_faces(photos, faces, settings().faces)
    assert (tmp_path / "data" / "rejected.csv").read_text() == (faces / "rejected.csv").read_text()
    (empty, line) = rejected(faces)
    assert empty[:2] == ("f00x.jpg", "empty")
    assert line[:2] == ("f07.jpg", "bad_caption") and message in line[2]
    assert (summary.num_used, summary.num_rejected) == (NUM, 1)
    assert summary.rejected == {"empty": 1, "bad_caption": 1}
    found = {sample.key: sample.caption for sample in all_samples(tmp_path / "data")}
    assert len(found) == NUM and found["f07"] is None and found["f01"] == "a grey square"
    write_pyramids(faces, parts, maker_of())
    source = join.open_pyramids(parts)
    join.pack_faces(faces, source, tmp_path / "steps", settings().pack, join.guide_of(source, None))
    assert contents(tmp_path / "steps") == contents(tmp_path / "data")


def test_a_bad_caption_in_a_plain_folder_is_listed_where_text_is_asked_for(photos, tmp_path):
    photos_as_faces(photos)
    (photos / "f07.txt").write_bytes(b"")
    join.pack_faces(photos, None, tmp_path / "plain", settings().pack, {})
    assert not (tmp_path / "plain" / "rejected.csv").exists()
    write_pyramids(photos, tmp_path / "parts", maker_of())
    source = join.open_pyramids(tmp_path / "parts")
    join.pack_faces(photos, source, tmp_path / "data", settings().pack, join.guide_of(source, None))
    assert [line[:2] for line in rejected(tmp_path / "data")] == [("f07.jpg", "bad_caption")]
    found = {sample.key: sample.caption for sample in all_samples(tmp_path / "data")}
    assert len(found) == NUM and found["f07"] is None


def test_captions_of_faces_follow_those_of_the_photos(photos, tmp_path):
    out = tmp_path / "faces"
    write_faces(photos, out, settings().faces, with_captions=False)
    assert not list(out.glob("*.txt"))
    for change, expected in ((None, "a grey square"), ("other", "other"), ("", None)):
        if change is not None:
            (photos / "f01.txt").write_text(change)
        assert write_faces(photos, out, settings().faces).num_new == 0
        assert read_caption(out / "f01.txt") == expected
    assert ("f01.jpg", "bad_caption") in [line[:2] for line in rejected(out)]
    (photos / "f04.txt").unlink()
    write_faces(photos, out, settings().faces)
    assert read_caption(out / "f04.txt") is None


def test_a_byte_order_mark_is_no_letter(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffhello\r\n".encode())
    assert read_caption(tmp_path / "a.txt") == "hello"
    assert read_caption(tmp_path / "b.txt") is None


def test_every_face_of_a_photo_has_its_caption(photos, tmp_path):
    write_faces(photos, tmp_path / "faces", settings().faces)
    found = {crop.key: crop.caption for crop in read_faces(tmp_path / "faces")}
    assert found["f05"] == "two\nlines" and found["f02"] is None
    assert [line[0] for line in rejected(tmp_path / "faces")] == ["f00x.jpg"]


def test_the_suffix_of_a_caption_may_be_in_capitals(photos, tmp_path):
    (photos / "f01.txt").rename(photos / "f01.TXT")
    (photos / "f02.Txt").write_text("second")
    (photos / "f03.TXT").write_text("not this one")
    (photos / "f03.txt").write_text("small letters first")
    write_faces(photos, tmp_path / "faces", settings().faces)
    found = {crop.key: crop.caption for crop in read_faces(tmp_path / "faces")}
    assert [found[key] for key in ("f01", "f02", "f03")] == [
        "a grey square",
        "second",
        "small letters first",
    ]


def test_a_caption_that_changes_after_the_dataset_is_finished_is_said(photos, tmp_path):
    data = tmp_path / "data"
    pipeline.prepare(photos, data, settings(), maker_of())
    pipeline.prepare(photos, data, settings(), maker_of())
    (photos / "f01.txt").write_text("another one")
    (photos / "f02.txt").write_text("the first one")
    with pytest.raises(PrepareError, match=r"2 with another caption \(f01.jpg, f02.jpg\)"):
        pipeline.prepare(photos, data, settings(), maker_of())
    (photos / "f02.txt").unlink()
    (photos / "f01.txt").write_text("a grey square\n")
    pipeline.prepare(photos, data, settings(), maker_of())
    listed = (data / "photos.csv").read_text()  # of a version that did not record captions
    lines = [line.rsplit(",", 1)[0] for line in listed.splitlines()]
    (data / "photos.csv").write_text("\n".join(lines) + "\n")
    (photos / "f01.txt").write_text("another one")
    pipeline.prepare(photos, data, settings(), maker_of())
