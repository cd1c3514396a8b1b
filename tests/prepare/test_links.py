"""Lists of addresses: the names that files get from them, and lists that are wrong."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinogen.prepare.download import download
from dinogen.prepare.links import read_list
from dinogen.prepare.read import PrepareError
from tests.prepare.wrong_server import names, serve


def test_the_same_name_from_other_addresses(server, fetch):
    lines = [
        server.url("a/x.jpg", serve(b"1")),
        server.url("b/x.jpg", serve(b"2")),
        server.url("a/x.jpg?size=2", serve(b"1")),
        server.url("b/x.jpg", serve(b"2")),
    ]
    fetch(*lines)
    found = names(fetch.out)
    assert len(found) == 3
    assert "x.jpg" in found
    assert all(re.fullmatch(r"x(-[0-9a-f]{16})?\.jpg", name) for name in found)
    assert sorted((fetch.out / name).read_bytes() for name in found) == [b"1", b"1", b"2"]
    server.requests.clear()
    fetch(*lines)
    assert server.requests == []


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("ftp://example.org/a.jpg", "no http"),
        ("file:///etc/passwd", "no http"),
        ("http://[::1/a.jpg", "no http"),
        ("photo.jpg", "no http"),
        ("http://example.org/a.jpg ../b.jpg", "no plain file name"),
        ("http://example.org/a.jpg /etc/b.jpg", "no plain file name"),
        ("http://example.org/a.jpg c\\b.jpg", "no plain file name"),
        ("http://example.org/a.jpg ..", "no plain file name"),
        ("http://example.org/a.jpg .hidden", "no plain file name"),
        ("http://example.org/a.jpg failed.csv", "written by dinogen"),
        ("http://example.org/a.jpg first.jpg", "already the name"),
    ],
)
def test_a_wrong_line_is_named_before_anything_is_fetched(server, fetch, line, part):
    first = f"{server.url('first', serve())} first.jpg"
    with pytest.raises(PrepareError, match=f"line 2: .*{part}"):
        fetch(first, line)
    assert server.requests == []


def test_wrong_lists(tmp_path, fetch):
    with pytest.raises(PrepareError, match="no such list"):
        download(tmp_path / "absent.txt", tmp_path)
    with pytest.raises(PrepareError, match="no address"):
        fetch("# nothing")
    with pytest.raises(PrepareError, match="64 hex digits"):
        fetch("http://example.org/a.jpg,abc", suffix="csv")
    with pytest.raises(PrepareError, match="different checksums"):
        fetch(*(f"http://example.org/a.jpg {digit * 64}" for digit in "01"))
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PrepareError, match="cannot be read as text"):
        download(tmp_path / "binary.txt", tmp_path)


PARTS = st.text(st.characters(codec="utf-8", exclude_categories=("Z", "C")), max_size=300)


@settings(max_examples=60)
@given(st.lists(PARTS, max_size=8))
def test_names_from_addresses_are_plain_and_differ(tmp_path_factory, parts):
    listing = tmp_path_factory.mktemp("list") / "list.txt"
    awkward = [
        "..",
        "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
        "a%00b.jpg",
        "",
        "failed.csv",
        "x" * 300 + ".jpg",
    ]
    urls = [f"http://example.org/{n}/{part}" for n, part in enumerate([*parts, *awkward])]
    listing.write_text("\n".join(urls), encoding="utf-8")
    items = read_list(listing, reserved={"failed.csv"})
    assert [item.url for item in items] == urls
    found = [item.filename for item in items]
    assert len(set(found)) == len(found)
    for name in found:
        assert name
        assert len(name.encode()) <= 220
        assert name == name.strip()
        assert not set(name) & set("/\\\0")
        assert not name.startswith(".")
        assert name != "failed.csv"
