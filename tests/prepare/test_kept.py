"""A folder of faces or a dataset that follows its photos removes nothing that it should keep."""

from __future__ import annotations

import pytest

from dinogen.config import FacesConfig
from dinogen.prepare.faces.folder import read_metas, write_faces
from dinogen.prepare.photos.find import photo_key
from dinogen.prepare.photos.read import PrepareError
from tests.prepare.pipelines import dinogen, random_photo

CONFIG = FacesConfig(detect="none", size=32)
WORDS = ("prepare.faces.detect=none", "prepare.faces.size=32", "prepare.pyramids.make=never")


@pytest.fixture
def src(tmp_path):
    (tmp_path / "photos").mkdir()
    for seed, name in enumerate(["a.jpg", "b.jpg", "c.png"]):
        random_photo(seed).save(tmp_path / "photos" / name)
    return tmp_path / "photos"


def tars(data):
    return {path.name: path.read_bytes() for path in data.glob("*.tar")}


def test_a_link_to_a_folder_that_is_not_mounted_withdraws_nothing(src, tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    random_photo(40).save(disk / "x.jpg")
    (src / "more").symlink_to(disk)
    out = tmp_path / "faces"
    write_faces(src, out, CONFIG)
    disk.rename(tmp_path / "elsewhere")
    assert write_faces(src, out, CONFIG).num_withdrawn == 0
    assert (out / f"{photo_key('more/x.jpg')}.jpg").exists()
    assert "more: cannot be listed" in caplog.text


def test_captions_that_were_written_beside_crops_are_kept(src, tmp_path, caplog):
    out = tmp_path / "faces"
    (src / "c.txt").write_text("from the photos")
    (src / "a.txt").write_text("from the photos")
    write_faces(src, out, CONFIG)
    assert "caption_sha256" not in dict(read_metas(out))["a"]
    (out / "b.txt").write_text("by a captioner")
    (out / "a.txt").write_text("edited by hand")
    (src / "c.png").with_suffix(".txt").unlink()
    write_faces(src, out, CONFIG)
    assert (out / "b.txt").read_text() == "by a captioner"
    assert (out / "a.txt").read_text() == "edited by hand"
    assert not (out / f"{photo_key('c.png')}.txt").exists()
    assert "was not copied from the photos" in caplog.text


def test_repack_that_was_killed_between_two_renames_goes_on(src, tmp_path):
    data = tmp_path / "data"
    assert dinogen("prepare", src, data, *WORDS).exit_code == 0
    before = tars(data)
    data.rename(tmp_path / "data.before-repack")
    assert dinogen("prepare", src, data, *WORDS, "--repack").exit_code == 0
    assert tars(data) == before
    assert not (tmp_path / "data.before-repack").exists()
    (tmp_path / "data.before-repack").mkdir()
    refused = dinogen("prepare", src, data, *WORDS, "--repack")
    assert "already exists" in str(refused.exception)
    assert not (tmp_path / ".data.repack").exists()  # said before the work, not behind it


@pytest.mark.parametrize("damage", [b"", b"\xff\xd8\xff half a file"])
def test_a_photo_replaced_by_damage_keeps_its_crops_until_it_can_be_read(src, tmp_path, damage):
    out = tmp_path / "faces"
    write_faces(src, out, CONFIG)
    crop = (out / "b.jpg").read_bytes()
    (src / "b.jpg").write_bytes(damage)
    summary = write_faces(src, out, CONFIG)
    assert (summary.num_replaced, summary.num_crops) == (0, 3)
    assert (out / "b.jpg").read_bytes() == crop
    assert "\nb.jpg," in (out / "rejected.csv").read_text()
    random_photo(9).save(src / "b.jpg")
    assert write_faces(src, out, CONFIG).num_replaced == 1
    assert (out / "b.jpg").read_bytes() != crop
    assert "b.jpg" not in (out / "rejected.csv").read_text()


def test_an_empty_folder_that_held_many_photos_may_be_a_disk_that_is_not_mounted(src, tmp_path):
    (src / "disk").mkdir()
    for number in range(12):
        random_photo(20 + number).save(src / "disk" / f"{number}.jpg")
    for number in range(20):
        random_photo(40 + number).save(src / f"more{number}.jpg")
    out = tmp_path / "faces"
    write_faces(src, out, CONFIG)
    (src / "disk").rename(tmp_path / "unmounted")
    (src / "disk").mkdir()
    with pytest.raises(PrepareError, match=r"12 of the 35 photos .* are gone"):
        write_faces(src, out, CONFIG)
    assert len(list(out.glob("*.jpg"))) == 35
    assert write_faces(src, out, CONFIG, withdraw=True).num_removed == 12


def test_files_of_the_users_beside_crops_stay(src, tmp_path):
    out = tmp_path / "faces"
    write_faces(src, out, CONFIG)
    (out / "b.png").write_bytes(b"of the user")
    (out / "notes.json").write_text('{"key": "notes", "num_crops": 1}')
    (src / "b.jpg").unlink()
    assert write_faces(src, out, CONFIG).num_withdrawn == 1
    assert (out / "b.png").read_bytes() == b"of the user" and not (out / "b.jpg").exists()
