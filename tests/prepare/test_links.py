"""Lists of addresses: the names that files get from them, and lists that are wrong."""

import csv
import hashlib
import io
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinogen.prepare.download.download import download
from dinogen.prepare.download.links import address, read_list
from dinogen.prepare.photos.read import PrepareError
from tests.prepare.wrong_server import JPEG, names, serve


def test_the_same_name_from_other_addresses(server, fetch):
    lines = [
        server.url("a/x.jpg", serve(JPEG + b"1")),
        server.url("b/x.jpg", serve(JPEG + b"2")),
        server.url("a/x.jpg?size=2", serve(JPEG + b"1")),
        server.url("b/x.jpg", serve(JPEG + b"2")),
    ]
    fetch(*lines)
    found = names(fetch.out)
    assert len(found) == 3
    assert "x.jpg" in found
    assert all(re.fullmatch(r"x(-[0-9a-f]{16})?\.jpg", name) for name in found)
    assert sorted((fetch.out / name).read_bytes() for name in found) == [
        JPEG + b"1",
        JPEG + b"1",
        JPEG + b"2",
    ]
    server.requests.clear()
    fetch(*lines)
    assert server.requests == []


def write(tmp_path, data, suffix="txt"):
    listing = tmp_path / f"list.{suffix}"
    listing.write_bytes(data if isinstance(data, bytes) else data.encode())
    return listing


def read(tmp_path, data, suffix="txt"):
    return read_list(write(tmp_path, data, suffix), reserved={"failed.csv"})


def urls(found):
    return [item.url for item in found.items]


@pytest.mark.parametrize(
    ("line", "reason", "part"),
    [
        ("ftp://example.org/a.jpg", "bad_url", "not an http"),
        ("file:///etc/passwd", "bad_url", "not an http"),
        ("data:image/png;base64,AAAA", "bad_url", "not an http"),
        ("//cdn.example.org/x.jpg", "bad_url", "write https: before it"),
        ("photo.jpg", "bad_url", "not an http"),
        ("http://[::1/a.jpg", "bad_url", "is not a valid URL"),
        ("http://example.org:99999/a.jpg", "bad_url", "port"),
        ("http:///a.jpg", "bad_url", "host"),
        (f"http://{'x' * 70}.org/a.jpg", "bad_url", "host"),
        ("http://example..org/a.jpg", "bad_url", "host"),
        ("http://exa mple.org/a.jpg", "bad_url", "host"),
        ("http://example.org\\@evil.org/a.jpg", "bad_url", "credentials"),
        ("http://me:secret@example.org/a.jpg", "bad_url", "credentials"),
        ("http://example.org/photo #1.jpg\tx.jpg", "bad_url", "write %23"),
        ("http://example.org/a\0b.jpg", "bad_url", "control characters"),
        ("http://example.org/my photo.jpg", "bad_url", "write %20 .* put a tab"),
        ("http://example.org/?q=my photo.jpg", "bad_url", "write %20 .* put a tab"),
        ("http://example.org/1 http://example.org/2", "bad_line", "one per line"),
        ("http://example.org/a.jpg ../b.jpg", "bad_filename", "not a plain file name"),
        ("http://example.org/a.jpg /etc/b.jpg", "bad_filename", "not a plain file name"),
        ("http://example.org/a.jpg c\\b.jpg", "bad_filename", "not a plain file name"),
        ("http://example.org/a.jpg ..", "bad_filename", "not a plain file name"),
        ("http://example.org/a.jpg .hidden", "bad_filename", "not a plain file name"),
        (f"http://example.org/a.jpg {'x' * 201}", "bad_filename", "200 bytes"),
        ("http://example.org/a.jpg failed.csv", "bad_filename", "written by dinogen"),
        ("http://example.org/a.jpg first.jpg", "bad_filename", "used by line 1"),
    ],
)
def test_a_bad_line_stops_no_other(server, fetch, line, reason, part):
    first = f"{server.url('first', serve(JPEG))}\tfirst.jpg"
    summary = fetch(first, line, server.url("last.jpg", serve(JPEG)))
    assert names(fetch.out) == ["failed.csv", "first.jpg", "last.jpg"]
    (failure,) = summary.failures
    assert (failure.line, failure.reason) == (2, reason)
    assert re.search(part, failure.detail)
    assert "secret" not in (fetch.out / "failed.csv").read_text()
    with (fetch.out / "failed.csv").open(newline="") as file:
        assert [(row["line"], row["reason"]) for row in csv.DictReader(file)] == [("2", reason)]


def test_a_list_of_bad_lines_alone(tmp_path, fetch):
    with pytest.raises(PrepareError, match=r"none of its lines .*line 1: bad_url: .*http"):
        fetch("photo.jpg", "ftp://example.org/a.jpg")
    assert len((fetch.out / "failed.csv").read_text().splitlines()) == 3


def test_what_is_no_list(tmp_path, fetch):
    with pytest.raises(PrepareError, match="no such list"):
        download(tmp_path / "absent.txt", tmp_path)
    with pytest.raises(PrepareError, match="cannot be read"):
        download(tmp_path, tmp_path / "out")
    for data in ("", "# nothing", "\n \n", "url,caption\n"):
        with pytest.raises(PrepareError, match="no address"):
            read(tmp_path, data)
    for data, what in ((b"PAR1....", "Parquet"), (JPEG, "JPEG"), (b"PK\x03\x04", "Excel")):
        with pytest.raises(PrepareError, match=what):
            read(tmp_path, data)


SHA256_OF_JPEG = hashlib.sha256(JPEG).hexdigest()
A, B = "http://example.org/a.jpg", "http://example.org/b.jpg"


@pytest.mark.parametrize(
    ("text", "suffix"),
    [
        (f"URL,TEXT,WIDTH\n{A},x,64\n{B},y,64\n", "csv"),
        (f"caption;Image_URL\nx;{A}\ny;{B}\n", "csv"),
        (f"caption\turl\nx\t{A}\ny\t{B}\n", "tsv"),
        (f"caption\turl\nx\t{A}\ny\t{B}\n", "txt"),
        (f"sep=;\r\nurl;caption\r\n{A};x\r\n{B};y\r\n", "csv"),
        (f"\ufeffurl,,,\n\n{A},,,\n,,,\n{B},,,\n# end\n", "csv"),
        (f'"image url"|"x"\n"{A}"|"say ""a"""\n"{B}"|"x\ny"\n', "csv"),
        (f'url,caption\n{A},the "best" dog\n{B},"the "best" dog"\n', "csv"),
        (f"{A};;a\n{B};;b\n", "csv"),
        (f"{A}\t\ta\n{B}\n", "tsv"),
        (f"{A}\r\n\r\n  {B}  \r\n", "txt"),
        (f"{A}\r{B}", "txt"),
        (f"url\n{A}\n{B}\n", "txt"),
        (f"url,caption\n{A},{'x' * 200_000}\n{B},y\n", "csv"),
    ],
)
def test_lists_as_people_have_them(tmp_path, text, suffix):
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"):
        data = text.removeprefix("\ufeff").encode(encoding)
        found = read(tmp_path, data, suffix)
        assert urls(found) == [A, B], encoding
        assert found.bad == ()
        parts = len(found.items) + found.num_blank + found.num_continued
        assert parts == found.num_lines == len(re.findall(r"[^\r\n]*\r?\n|[^\r\n]+\r?", text))


@pytest.mark.parametrize(
    ("row", "reason", "part"),
    [
        ('{url},"never closed', "bad_line", "quote"),
        ('"{url},never closed', "bad_line", "quote"),
        ('"{url}"x,"odd"', "bad_line", "quote"),
        ("http://example.org/w_10,h_10/a.jpg,resized", "bad_line", "3 cells"),
        (",no url", "bad_url", "no address"),
    ],
)
def test_a_bad_row_of_a_table_stops_no_other(tmp_path, row, reason, part):
    rows = ["url,caption", f"{A},x", row.format(url="http://example.org/c.jpg"), f'{B},"y"']
    found = read(tmp_path, "\n".join(rows), "csv")
    assert urls(found) == [A, B]
    assert [(bad.line, bad.reason) for bad in found.bad] == [(3, reason)]
    assert part in found.bad[0].detail


def test_bytes_that_are_not_utf8_matter_in_addresses_alone(tmp_path):
    text = f"url;caption\n{A};caf\xe9\nhttp://example.org/caf\xe9.jpg;x\n{B};y\n"
    found = read(tmp_path, text.encode("latin-1"), "csv")
    assert urls(found) == [A, B]
    assert found.bad[0].url == "http://example.org/caf\\xe9.jpg"
    assert "save the list as UTF-8" in found.bad[0].detail


def test_a_checksum_that_is_none_and_two_for_one_address(tmp_path):
    found = read(tmp_path, f"{A},abc\n{B}\n", "csv")
    assert urls(found) == [B]
    assert "64 hex digits" in found.bad[0].detail
    one, two = "1" * 64, "2" * 64
    found = read(tmp_path, f"{A}\n{A} {one}\n{A} {two}\n{A} {one}\n")
    assert [(item.url, item.sha256) for item in found.items] == [(A, one)]
    assert [(bad.line, bad.reason) for bad in found.bad] == [(3, "bad_checksum")]
    assert found.num_repeated == 2


@pytest.mark.parametrize(
    ("line", "path", "name"),
    [
        ("{}/my photo.jpg\tmine.jpg", "/my%20photo.jpg", "mine.jpg"),
        ("{}/my album/a 1.jpg", "/my%20album/a%201.jpg", "a_1.jpg"),
        (f"{{}}/my photo.jpg {SHA256_OF_JPEG} me.jpg", "/my%20photo.jpg", "me.jpg"),
        ("{}/b.jpg my own.jpg", "/b.jpg", "my own.jpg"),
        ("{}/ü/ï.jpg", "/%C3%BC/%C3%AF.jpg", "ï.jpg"),
        ("{}/100%.jpg", "/100%25.jpg", "100_.jpg"),
        ("{}/a%20b.jpg", "/a%20b.jpg", "a_b.jpg"),
    ],
)  # fmt: skip
def test_addresses_are_encoded_never_cut(server, fetch, line, path, name):
    server.scripts[path] = [serve(JPEG)]
    assert fetch(line.format(f"http://127.0.0.1:{server.server_port}")).failures == ()
    assert [asked for asked, _ in server.requests] == [path]
    assert names(fetch.out) == [name]


def test_hosts_of_other_alphabets(tmp_path):
    (item,) = read(tmp_path, "http://bücher.example/ü.jpg").items
    assert address(item.url).raw_host == b"xn--bcher-kva.example"
    assert item.filename == "ü.jpg"


def test_given_names_come_first_and_names_by_content_take_every_suffix(tmp_path):
    found = read(
        tmp_path,
        "http://example.org/x/cat\nhttp://example.org/cat.png\nhttp://example.org/1\tcat.jpg\n"
        "http://example.org/2\tcat\n",
    )
    assert [(item.filename, item.by_content) for item in found.items[2:]] == [("cat.jpg", False)]
    assert re.fullmatch("cat-[0-9a-f]{16}", found.items[0].filename)
    assert found.items[0].by_content
    assert found.items[1].filename == "cat.png"
    assert [bad.line for bad in found.bad] == [4]


GARBAGE = [
    '"open',
    'x,"open',
    ",,,,",
    'a"b,"c',
    '"a"b,c',
    "\0",
    '"',
    '"""',
    "x,y,z",
    '"http://h/1,',
]
CAPTIONS = ["a dog", 'a "dog"', "a, dog", "a\ndog", '5"', 'end"', "", '"', "http://h/caption"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(GARBAGE) | st.integers(0, len(CAPTIONS) - 1), max_size=8))
def test_garbage_hides_no_row_of_a_table(tmp_path_factory, rows):
    """Whatever stands between them, rows that Python's csv wrote are read."""
    buffer = io.StringIO("url,caption\n")
    buffer.seek(0, io.SEEK_END)
    expected = []
    for number, row in enumerate(rows):
        if isinstance(row, str):
            buffer.write(row + "\n")
        else:
            expected.append(f"http://example.org/{number}.jpg")
            csv.writer(buffer, lineterminator="\n").writerow([expected[-1], CAPTIONS[row]])
    found = read(tmp_path_factory.mktemp("list"), buffer.getvalue() + A, "csv")
    assert [url for url in urls(found) if "example" in url] == [*expected, A]


WORDS = f"{A} {B} http://h/c , ; | url sha256 filename # sep=; \ufeff é .. / % x.jpg failed.csv"
BLANKS = ["\t", " ", '"', "\n", "\n", "\r\n", "\r", "\0", "\x85", "\u2028", "1" * 64]
PIECES = st.sampled_from(WORDS.split() + BLANKS)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=40).map("".join)),
    st.sampled_from(["txt", "csv", "tsv"]),
)
def test_every_line_is_accounted_for(tmp_path_factory, data, suffix):
    data = data if isinstance(data, bytes) else data.encode()
    folder = tmp_path_factory.mktemp("list")
    try:
        found = read(folder, data, suffix)
    except PrepareError as error:
        assert re.search("no address|is a|is an|compressed", str(error))
        return
    parts = [found.num_blank, found.num_repeated, found.num_continued]
    assert len(found.items) + len(found.bad) + sum(parts) == found.num_lines
    if not data.startswith((b"\xff\xfe", b"\xfe\xff")) and b"\0" not in data:
        lines = re.split(rb"\r\n|\r|\n", data)
        assert found.num_lines == len(lines) - (lines[-1] == b"")
    for item in found.items:
        assert not set(item.filename) & set("/\\\0")
        assert not item.filename.startswith(".")
        assert item.filename != "failed.csv"
        address(item.url)
    for bad in found.bad:
        f"{bad.url}{bad.filename}{bad.detail}".encode()
        assert "\n" not in bad.url


PARTS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Z", "C"), exclude_characters="#"),
    max_size=300,
)


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
    items = read_list(listing, reserved={"failed.csv"}).items
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
