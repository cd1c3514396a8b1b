"""Photos are found below a folder, and each has a key of its own that its path alone decides."""

import hashlib
import io
import os
import re
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinogen.prepare.photos.find import (
    face_key,
    face_number,
    find_photos,
    left_out_words,
    photo_key,
)
from dinogen.prepare.photos.read import PrepareError


def test_photos_are_found_sorted_and_others_counted(tmp_path, noise):
    for name in ("b/x.JPG", "a/x.jpeg", "z.webp", "a.b/ü ñ.png", "A.TIF", "notes.txt", "a/raw.cr2"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"?")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "in.png").write_bytes(b"?")
    found = find_photos(tmp_path)
    assert [photo.source for photo in found.photos] == [
        "A.TIF",
        "a.b/ü ñ.png",
        "a/x.jpeg",
        "b/x.JPG",
        "folder.png/in.png",
        "z.webp",
    ]
    assert (found.left_out, found.num_sidecars, found.num_files) == ({".cr2": 1}, 1, 8)
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


HIDDEN = [
    *("._a.jpg", ".git/a.jpg", ".ipynb_checkpoints/a-checkpoint.jpg", ".thumbnails/1.jpg"),
    *(".Trash-1000/files/a.jpg", "@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg", "__MACOSX/._a.jpg"),
    *("__MACOSX/a.jpg", "#recycle/a.jpg", "$RECYCLE.BIN/a.jpg", "lost+found/a.jpg"),
    *("System Volume Information/a.jpg", "Thumbs.db", "desktop.ini", ".DS_Store"),
    *("cat.jpg:Zone.Identifier", "cat.jpg@SynoEAStream"),
]


def test_hidden_and_system_files_are_skipped(tmp_path):
    for place in ("", "album/"):
        for name in HIDDEN:
            path = tmp_path / ".hidden" / f"{place}{name}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\xff\xd8\xff")
    (tmp_path / ".hidden" / "album" / "cat.jpg").write_bytes(b"?")
    (tmp_path / ".hidden" / "__macosx.jpg").write_bytes(b"?")
    # The folder that the user names is taken as it is.
    found = find_photos(tmp_path / ".hidden")
    assert [photo.source for photo in found.photos] == ["__macosx.jpg", "album/cat.jpg"]
    assert (found.num_files, found.num_hidden) == (2, 2 * (len(HIDDEN) - 1))
    shutil.rmtree(tmp_path / ".hidden" / "album")
    (tmp_path / ".hidden" / "__macosx.jpg").unlink()
    with pytest.raises(PrepareError, match="16 hidden or system files and folders skipped"):
        find_photos(tmp_path / ".hidden")


def encoded(kind, size=(9, 7)):
    buffer = io.BytesIO()
    Image.new("RGB", size, (200, 40, 90)).save(buffer, kind)
    return buffer.getvalue()


def test_what_the_suffix_does_not_tell_the_content_does(tmp_path):
    used = {
        "photo": "JPEG",
        "img.jpg_large": "JPEG",
        "pic.jpg!d": "PNG",
        "a.jpg.1": "WEBP",
        "scan": "TIFF",
        "b.2019": "BMP",
    }
    for name, kind in used.items():
        (tmp_path / name).write_bytes(encoded(kind))
    others = {
        "raw.NEF": encoded("TIFF"),
        "raw.of_nobody": encoded("TIFF"),
        "c.jpg~": encoded("JPEG"),
        "d.jpg_original": encoded("JPEG"),
        "e.bak": encoded("JPEG"),
        "f.THM": encoded("JPEG"),
        "g.jpg.part": encoded("JPEG"),
        "clip.MOV": b"\0\0\0\x14ftypqt  ",
        "archive": b"PK\x03\x04 and so on",
        "words": b"no image",
        "nothing": b"",
        "h.db": b"SQLite",
    }
    for name, content in others.items():
        (tmp_path / name).write_bytes(content)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    sidecars = ("a.txt", "photo.json", "IMG_1.AAE", "b.xmp")
    for name in sidecars:
        (tmp_path / name).write_bytes(b"?")
    found = find_photos(tmp_path)
    assert {photo.source for photo in found.photos} == used.keys()
    assert found.num_sidecars == len(sidecars)
    once = (".bak", ".db", ".jpg_original", ".jpg~", ".mov", ".nef", ".of_nobody", ".part", ".thm")
    assert found.left_out == {"no suffix": 4, "broken link": 1, **dict.fromkeys(once, 1)}
    assert next(iter(found.left_out)) == "no suffix"
    assert found.num_files == len(used) + len(others) + len(sidecars) + 2
    assert len({photo.key for photo in found.photos}) == len(used)


def test_what_is_left_out_is_said_with_a_remedy():
    lines = left_out_words({".cr2": 4, ".mov": 3, ".mp4": 1, ".qqq": 2})
    assert lines[0] == "10 files left out: 4 .cr2, 3 .mov, 1 .mp4, 2 .qqq"
    assert any(line.startswith("  .cr2: convert to JPEG") for line in lines)
    assert any(line.startswith("  .mov, .mp4: extract frames") for line in lines)
    assert lines[-1] == "  .qqq: not photos by suffix or content"
    assert left_out_words({}) == []


def test_very_many_suffixes_are_counted_together(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"?")
    for number in range(60):
        (tmp_path / f"x.kind{number:02d}").write_bytes(b"?")
    found = find_photos(tmp_path)
    assert sum(found.left_out.values()) == 60 and found.left_out["other suffixes"] == 20


def test_captions_are_known_without_another_look(tmp_path):
    for name in ("a.jpg", "a.txt", "b.jpg", "sub/b.txt", "sub/c.png", "sub/c.txt", "d", "d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded("JPEG"))
    found = {photo.source: photo.has_caption for photo in find_photos(tmp_path).photos}
    assert found == {"a.jpg": True, "b.jpg": False, "sub/c.png": True, "d": True}


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
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) for key in keys)
    assert [photo_key(path) for path in reversed(paths)] == keys[::-1]


def test_any_name_and_depth_gives_a_key_with_room_for_faces(tmp_path):
    long = "x" * 251
    deep = "/".join(["a folder of a long name"] * 40) + "/photo.jpg"
    paths = [f"{long}.jpg", f"{long[:80]}.jpg", f"{long[:81]}.jpg", deep, f"b/{long}.jpg"]
    paths += [os.fsdecode(b"caf\xe9.jpg"), os.fsdecode(b"caf\xe8.jpg"), "写真.jpg", "no suffix"]
    keys = [photo_key(path) for path in paths]
    assert keys[1] == long[:80] and len(set(keys)) == len(keys)
    for key in keys:
        faces = [face_key(key, number) for number in range(13)]
        assert len(set(faces)) == 13 and [face_number(face) for face in faces] == list(range(13))
        assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", face) for face in faces)
    (tmp_path / os.fsdecode(b"caf\xe9" * 40 + b".jpg")).write_bytes(b"?")
    (photo,) = find_photos(tmp_path).photos
    assert photo.source == "caf\\xe9" * 40 + ".jpg"


def test_keys_of_earlier_versions_stay():
    """Up to 80 bytes; longer ones could not be packed."""
    slug = "y" * 63
    assert photo_key("x" * 80 + ".jpg") == "x" * 80
    assert photo_key("a/x.jpg") == "a-x-" + hashlib.sha256(b"a/x.jpg").hexdigest()[:16]
    named = f"{slug}.png"
    assert photo_key(named) == f"{slug}-{hashlib.sha256(named.encode()).hexdigest()[:16]}"
    assert face_key("x" * 78, 1) == "x" * 78 + "_1"


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
