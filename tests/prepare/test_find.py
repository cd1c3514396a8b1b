"""Photos are found below a folder, and each has a key of its own that its path alone decides."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinogen.prepare.find import find_photos, photo_key
from dinogen.prepare.read import PrepareError


def test_photos_are_found_sorted_and_others_counted(tmp_path, noise):
    for name in ("b/x.JPG", "a/x.jpeg", "z.webp", "a.b/ü ñ.png", "A.TIF", "notes.txt", "a/raw.cr2"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"?")
    (tmp_path / "folder.png").mkdir()
    found = find_photos(tmp_path)
    assert [photo.source for photo in found.photos] == [
        "A.TIF",
        "a.b/ü ñ.png",
        "a/x.jpeg",
        "b/x.JPG",
        "folder.png",
        "z.webp",
    ]
    assert found.num_ignored == 2
    assert len({photo.key for photo in found.photos}) == 6


def test_linked_folders_are_searched_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.jpg").write_bytes(b"?")
    (tmp_path / "real" / "loop").symlink_to(tmp_path)
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "one").symlink_to(tmp_path / "real")
    (tmp_path / "src" / "two").symlink_to(tmp_path / "real")
    names = [photo.path.name for photo in find_photos(tmp_path / "src").photos]
    assert names == ["a.jpg"]


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "only text"])
def test_a_folder_without_photos_is_one_clear_error(tmp_path, kind):
    src = tmp_path / "src"
    if kind == "file":
        src.write_bytes(b"")
    elif kind != "missing":
        src.mkdir()
    if kind == "only text":
        (src / "notes.txt").touch()
    with pytest.raises(PrepareError, match=re.escape(str(src))) as caught:
        find_photos(src)
    assert "give" in str(caught.value)


PATHS = st.lists(
    st.text(st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=120),
    min_size=1,
    max_size=3,
).map("/".join)
SUFFIXES = st.sampled_from([".jpg", ".JPG", ".png", ".webp"])


@settings(max_examples=40)
@given(st.lists(st.tuples(PATHS, SUFFIXES).map("".join), unique=True, max_size=20))
def test_keys_are_unique_safe_and_depend_on_the_path_alone(paths):
    keys = [photo_key(path) for path in paths]
    assert len(set(keys)) == len(keys)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,100}", key) for key in keys)
    assert [photo_key(path) for path in reversed(paths)] == keys[::-1]


def test_plain_names_stay_and_look_alikes_do_not_collide():
    assert photo_key("00042.jpg") == "00042"
    assert photo_key("IMG_0001.jpg") == "IMG_0001"
    alike = [
        "x.jpg",
        "x.png",
        "x.JPG",
        "a/x.jpg",
        "b/x.jpg",
        "a-x.jpg",
        "x_1.jpg",
        "ü.jpg",
        "ö.jpg",
    ]
    keys = [photo_key(path) for path in alike]
    assert len(set(keys)) == len(keys)
    # x_1 is the second face of x.jpg; the others stand beside the crops.
    assert photo_key("x_1.jpg") != "x_1"
    assert photo_key("summary.jpg") != "summary"
    assert photo_key(f"{photo_key('a/x.jpg')}.jpg") != photo_key("a/x.jpg")
