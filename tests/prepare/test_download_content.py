"""Downloads are named by their content where a name lacks, and what is no photo is not kept."""

import gzip
import hashlib
import io
import os

import pytest
from PIL import Image

from dinogen.prepare.photos.find import find_photos
from dinogen.prepare.photos.read import PrepareError
from tests.prepare.wrong_server import BODY, JPEG, SHA256, names, serve, status

KINDS = {
    "JPEG": ".jpg",
    "PNG": ".png",
    "WEBP": ".webp",
    "TIFF": ".tif",
    "BMP": ".bmp",
    "GIF": ".gif",
    "JPEG2000": ".jp2",
    "AVIF": ".avif",
}
PAGE = b"\n<!DOCTYPE html><html><body>enable JavaScript</body></html>"


def image(kind="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 40, 90)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_the_suffix_follows_from_the_content(server, fetch, kind):
    url = server.url("photo/123", serve(image(kind)))
    for _ in range(2):
        assert fetch(url).failures == ()
    assert names(fetch.out) == [f"123{KINDS[kind]}"]
    assert len(server.requests) == 1


def test_names_without_an_image_suffix(server, fetch):
    """Each gets one, all are found as photos, and no second run fetches any again."""
    lines = [
        server.url("a.jpg", serve(image())),
        server.url("image?id=17", serve(image())),
        f"http://127.0.0.1:{server.server_port}/image?id=18",
        f"http://127.0.0.1:{server.server_port}/image?file=me.png",
        f"http://127.0.0.1:{server.server_port}/image?signature={'f' * 100}",
        server.url("media/F00.jpg:large", serve(image())),
        server.url("thumb.php", serve(image("PNG"))),
        server.url("photo/12345/", serve(image())),
        server.url("photo.v2", serve(image())),
        server.url("real.webp.jpg", serve(image("WEBP"))),
        server.url("x", serve(image(), Content_Disposition='attachment; filename="../evil.jpg"')),
        server.url("y", serve(image())) + "\tmine",
        server.url("z", serve(image())) + "\tno. 7",
        server.url("w", serve(image())) + "\tkept.webp",
    ]  # fmt: skip
    assert fetch(*lines).num_fetched == len(lines)
    found = names(fetch.out)
    expected = ["a.jpg", "image_id_17.jpg", "image_id_18.jpg", "image_file_me.jpg", "image.jpg"]
    expected += ["F00.jpg_large.jpg", "thumb.php.png", "12345.jpg", "photo.v2.jpg"]
    expected += ["real.webp.jpg", "x.jpg", "mine.jpg", "no. 7.jpg", "kept.webp"]
    assert found == sorted(expected)
    assert len(find_photos(fetch.out).photos) == len(lines)
    server.requests.clear()
    again = fetch(*reversed(lines))
    assert (again.num_present, server.requests) == (len(lines), [])
    assert names(fetch.out) == found


@pytest.mark.parametrize(
    ("path", "body", "reason", "part"),
    [
        ("a.jpg", PAGE, "not_an_image", "a web page"),
        ("a", PAGE, "not_an_image", "a web page"),
        ("a", b'{"error": "gone"}', "not_an_image", "gone"),
        ("a.jpg", b"", "empty", "no data"),
        ("a", b"", "empty", "no data"),
        ("a.zip", PAGE, "web_page", "a web page"),
        ("a.svg", b"<svg/>", "not_an_image", "<svg/>"),
    ],
)
def test_what_is_no_photo_is_not_kept(server, fetch, path, body, reason, part):
    good = server.url("good.jpg", serve(image()))
    bad = server.url(path, serve(body))
    (failure,) = fetch(bad, good).failures
    assert failure.reason == reason
    assert part in failure.detail
    assert names(fetch.out) == ["failed.csv", "good.jpg"]
    # What an earlier version kept is no photo either.
    (fetch.out / path).write_bytes(body)
    server.url(path, serve(image()))
    assert fetch(bad, good).failures == ()


def test_other_files_are_kept_under_their_names(server, fetch):
    lines = [
        server.url("a.zip", serve(b"PK\x03\x04")),
        server.url("b", serve(b"anything")) + "\tb.bin",
        server.url("c", serve(b"II*\0 raw of a camera")) + "\tc.NEF",
        server.url("d.dng", serve(b"II*\0 raw of a camera")),
        f"{server.url('e.jpg', serve(b'so be it'))} {hashlib.sha256(b'so be it').hexdigest()}",
    ]
    assert fetch(*lines).failures == ()
    assert names(fetch.out) == ["a.zip", "b.bin", "c.NEF", "d.dng", "e.jpg"]


def test_what_an_earlier_version_kept_without_suffix_gets_one(server, fetch):
    fetch.out.mkdir()
    (fetch.out / "photo").write_bytes(image("PNG"))
    assert fetch(server.url("photo", serve(image()))).num_present == 1
    assert server.requests == []
    assert names(fetch.out) == ["photo.png"]


def test_with_a_checksum_the_content_is_as_the_list_wants_it(server, fetch):
    line = f"{server.url('a', serve())} {SHA256}"
    for _ in range(2):
        assert fetch(line).failures == ()
    assert names(fetch.out) == ["a.jpg"]
    assert (fetch.out / "a.jpg").read_bytes() == BODY
    assert len(server.requests) == 1


def test_a_server_that_compresses_unasked(server, fetch):
    """It is unpacked, and begins again after a break: its bytes are not those of the file."""
    packed = {"body": gzip.compress(BODY, mtime=0), "Content_Encoding": "gzip"}
    url = server.url("a.jpg", serve(stop_after=1000, **packed), serve(**packed))
    assert fetch(url).failures == ()
    assert server.ranges("a.jpg") == [None, None]
    assert (fetch.out / "a.jpg").read_bytes() == BODY


@pytest.mark.parametrize(
    "target", ["ftp://127.0.0.1/a.jpg", f"http://{'x' * 70}/", "file:///etc/passwd"]
)
def test_redirects_lead_to_web_addresses_alone(server, fetch, target):
    good = server.url("b.jpg", serve(JPEG))
    summary = fetch(server.url("a.jpg", status(302, Location=target)), good, num_attempts=1)
    assert [failure.reason for failure in summary.failures] in (["protocol"], ["connection"])
    assert names(fetch.out) == ["b.jpg", "failed.csv"]


def test_a_redirect_names_nothing(server, fetch):
    target = server.url("x/..%2f..%2fevil.png", serve(JPEG))
    server.scripts["/x/..%2f..%2fevil.png"] = [serve(JPEG)]
    fetch(server.url("a", status(302, Location=target)))
    assert names(fetch.out) == ["a.jpg"]
    assert names(fetch.out.parent) == ["list.txt", "out"]


def test_a_name_that_cannot_be_written_stops_no_other(server, fetch):
    (fetch.out / "a.jpg").mkdir(parents=True)
    (fetch.out / "a.jpg" / "precious").touch()
    summary = fetch(server.url("a.jpg", serve(JPEG)), server.url("b.jpg", serve(JPEG)))
    assert [failure.reason for failure in summary.failures] == ["unwritable"]
    assert names(fetch.out) == ["a.jpg", "b.jpg", "failed.csv"]
    assert (fetch.out / "a.jpg" / "precious").exists()


def test_a_folder_that_cannot_be_written(server, fetch, monkeypatch):
    url = server.url("a.jpg", serve())
    fetch.out.mkdir()
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    with pytest.raises(PrepareError, match="cannot be written"):
        fetch(url)
    monkeypatch.undo()
    fetch.out.rmdir()
    fetch.out.touch()
    with pytest.raises(PrepareError, match="is a file"):
        fetch(url)
    assert server.requests == []


def test_the_account_adds_up(server, fetch):
    lines = ["# photos", server.url("a.jpg", serve(JPEG)), "", server.url("b.jpg", status(404))]
    lines += [lines[1], "ftp://x/y", server.url("c", serve(JPEG))]
    for present, fetched in ((0, 2), (2, 0)):
        summary = fetch(*lines)
        assert (summary.num_present, summary.num_fetched) == (present, fetched)
        assert [failure.line for failure in summary.failures] == [4, 6]
        assert summary.num_repeated == 1
        assert summary.num_files == present + fetched + len(summary.failures)
        assert summary.num_files + summary.num_repeated + 2 == len(lines)
