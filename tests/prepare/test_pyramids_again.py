"""Pyramids of faces that were replaced, removed or added since; of those that cannot be used."""

from __future__ import annotations

import io
import shutil

import pytest
from PIL import Image

from dinogen.config import GuideConfig
from dinogen.features import load_guide
from dinogen.prepare.parts import write_pyramids
from dinogen.prepare.pyramid import PyramidMaker
from tests.prepare.counting_guide import (
    CONFIG,
    CPU,
    Counting,
    as_an_older_version_wrote_it,
    names_in,
    random_photo,
    same,
    whole,
)

NUM_FACES = 8


@pytest.fixture
def guide(checkpoint):
    return Counting(load_guide(GuideConfig(path=str(checkpoint)), CPU))


@pytest.fixture
def make(guide):
    return lambda **changes: PyramidMaker(guide, CONFIG.model_copy(update=changes), CPU)


@pytest.fixture
def faces(tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    for number in range(NUM_FACES):
        (folder / f"f{number}.jpg").write_bytes(random_photo(number, file_format="JPEG"))
    return folder


@pytest.mark.parametrize(
    ("change", "num_done", "num_made"),
    [
        ("replaced", 1, 1),
        ("one more", 1, 1),
        ("one fewer", 3, 0),
        ("four fewer", 2, 0),
        ("nothing", 0, 0),
    ],
)
def test_parts_follow_the_faces(faces, tmp_path, make, guide, change, num_done, num_made):
    """As if all had been made at once; what was known is not put through the guide again."""
    out = tmp_path / "out"
    write_pyramids(faces, out, make())
    if change == "replaced":
        shutil.copy(faces / "f0.jpg", faces / "f4.jpg")
    elif change == "one more":
        shutil.copy(faces / "f0.jpg", faces / "f8.jpg")
    elif change != "nothing":
        for number in range(1 if change == "one fewer" else 4):
            (faces / f"f{number}.jpg").unlink()
    before = guide.num_photos
    write_pyramids(faces, tmp_path / "fresh", make(batch=1))
    num_fresh = guide.num_photos - before
    num_faces = len(list(faces.iterdir()))
    calls_of_one = num_fresh // num_faces  # pooled at 16, native at 4, 8 and 16
    before = guide.num_photos
    summary = write_pyramids(faces, out, make(batch=1))
    assert summary.num_done == num_done
    assert guide.num_photos - before == num_made * calls_of_one
    assert names_in(out) == names_in(tmp_path / "fresh")
    assert same(whole(out), whole(tmp_path / "fresh"))
    assert write_pyramids(faces, out, make()).num_done == 0


def test_parts_of_an_older_version_are_kept(faces, tmp_path, make, guide):
    out = tmp_path / "out"
    write_pyramids(faces, out, make())
    before = as_an_older_version_wrote_it(out)
    num_before = guide.num_photos
    assert write_pyramids(faces, out, make()).num_kept == 3
    assert guide.num_photos == num_before
    assert before == {path: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("kind", ["damaged", "other size", "not square"])
def test_one_image_that_cannot_be_used_is_left_out(faces, tmp_path, make, caplog, kind):
    write_pyramids(faces, tmp_path / "whole", make())
    bad = {
        "damaged": random_photo(9, file_format="JPEG")[:200],
        "other size": random_photo(9, size=48, file_format="JPEG"),
        "not square": wide(),
    }[kind]
    (faces / "f3x.jpg").write_bytes(bad)
    (faces / "._f3.jpg").write_bytes(bad)
    write_pyramids(faces, tmp_path / "out", make())
    assert same(whole(tmp_path / "out"), whole(tmp_path / "whole"))
    assert "f3x.jpg: left out" in caplog.text and "._f3" not in caplog.text


def wide():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 32)).save(buffer, "JPEG")
    return buffer.getvalue()
